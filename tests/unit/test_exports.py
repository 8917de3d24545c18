"""What `import kvlocal` offers, and that it loads nothing until it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kvlocal
from kvlocal import api, errors, policies

HOMES = {
    api: ("LLM", "Conversation", "load"),
    errors: ("KVError", "UsageError"),
    policies: ("Policy", "CacheView", "LayerView", "Decision"),
}


def test_every_export_is_the_thing_itself() -> None:
    for home, names in HOMES.items():
        for name in names:
            assert getattr(kvlocal, name) is getattr(home, name)
    assert set(kvlocal.__all__) == {name for names in HOMES.values() for name in names} | {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = kvlocal.Nonsense  # type: ignore[attr-defined]


def test_the_import_alone_loads_neither_numpy_nor_the_library() -> None:
    code = "import sys, kvlocal; print([m for m in ('numpy', 'ctypes', 'kvlocal.native') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
    code = "import sys\nfrom kvlocal import Policy\nprint('kvlocal.native.library' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
