"""Policies of the user's own: the one of the documentation, entry points, and what is refused."""

from __future__ import annotations

import re
import sys
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
    # an installed package is not in the working directory
    monkeypatch.delitem(sys.modules, "strided", raising=False)
    with pytest.raises(UsageError, match="No module named 'strided'"):
        make_policy("strided")
    monkeypatch.syspath_prepend(folder)
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


def test_the_working_directory_can_be_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "strided", raising=False)
    with pytest.raises(UsageError, match="No module named 'strided'"):
        make_policy("strided:Strided", here=False)
    assert make_policy("strided:Strided", here=True).name == "strided"


@pytest.mark.parametrize(
    "code",
    [
        "sys.path.append('added')",
        "sys.path.insert(0, 'added')",
        "sys.path.remove(sys.path[0])",
        "sys.path = [*sys.path, 'added']",
        "sys.path.clear()",
        "sys.path.append('added'); raise RuntimeError('no')",
        "sys.path.append('added'); raise SystemExit(3)",
    ],
)
def test_the_path_is_as_before(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    (folder / "extends.py").write_text(f"import sys\n{code}\n")
    monkeypatch.delitem(sys.modules, "extends", raising=False)
    path, before = sys.path, list(sys.path)
    with pytest.raises((UsageError, SystemExit)):
        make_policy("extends:Missing")
    assert sys.path is path and sys.path == before


@pytest.mark.parametrize(
    ("code", "why"),
    [("1 +", "SyntaxError: "), ("unknown", "NameError: name 'unknown'"), ("1 / 0", "ZeroDivisionError: ")],
)
def test_code_that_fails_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, why: str) -> None:
    (folder / "fails.py").write_text(code + "\n")
    monkeypatch.delitem(sys.modules, "fails", raising=False)
    with pytest.raises(UsageError, match=why):
        make_policy("fails:Policy")
