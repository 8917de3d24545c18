"""Policies of the user's own: the one of the documentation, entry points, and what is refused."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from policy_views import cache_view, evict, layer_view

from kvlocal.errors import UsageError
from kvlocal.policies import make_policy
from kvlocal.policies import registry as policies

PAGE = Path(__file__).resolve().parents[3] / "docs" / "write-a-policy.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the documentation's example in it."""
    (code,) = re.findall(r"```python\n# strided\.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "strided.py").write_text(code)
    (tmp_path / "broken.py").write_text("import missing_module\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_of_the_documentation(folder: Path) -> None:
    policy = make_policy("strided:Strided", {"stride": "3", "window": "2", "sink": "1"})
    _, kept = evict(policy, cache_view(7, layer_view(np.zeros((2, 20)))))
    assert [slots.tolist() for slots in kept[0]] == [[0, 3, 6, 9, 12, 18, 19]] * 2
    with pytest.raises(UsageError, match="stride=0 is not possible for policy strided"):
        make_policy("strided:Strided", {"stride": "0"})


def test_an_entry_point_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("strided", "strided:Strided", "kvlocal.policies")
    monkeypatch.setattr(policies, "entry_points", lambda group: [point])
    assert make_policy("strided").name == "strided"
    with pytest.raises(UsageError, match="did you mean 'strided'"):
        make_policy("stridde")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere:Policy", "No module named 'nowhere'"),
        ("strided:Other", "no attribute 'Other'"),
        ("broken:Policy", "No module named 'missing_module'"),
        ("strided:dataclass", "is not a policy"),
        (":Strided", "cannot be loaded"),
    ],
)
def test_what_is_refused(name: str, why: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(why)):
        make_policy(name)
