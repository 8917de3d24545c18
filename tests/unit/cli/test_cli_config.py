"""The configuration file: what it sets, what is nearer, what it is refused for; `kvlocal config`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_engine import Fake, call, install, sentence
from kvlocal_cli.main import main
from kvlocal_cli.options import config_file


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("KVLOCAL_CONFIG", str(path))
    return path


# --- what is nearer ------------------------------------------------------------------------------------------------


def test_command_line_environment_own_table_defaults(fake: Fake, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[defaults]\nbudget = "10%"\nctx-size = 64\n[run]\nbudget = "20%"\n')
    call("chat", stdin="hi\n")
    assert (fake.settings.budget, fake.settings.n_ctx) == ("10%", 64)
    call("run", "-p", "x")
    assert (fake.settings.budget, fake.settings.n_ctx) == ("20%", 64)
    monkeypatch.setenv("KVLOCAL_BUDGET", "30%")
    call("run", "-p", "x")
    assert fake.settings.budget == "30%"
    call("run", "-p", "x", "--budget", "40%")
    assert fake.settings.budget == "40%"


def test_the_file_that_is_named_first_counts(fake: Fake, file: Path, tmp_path: Path) -> None:
    file.write_text("[run]\nbudget = 111\n")
    other = tmp_path / "other.toml"
    other.write_text("[run]\nbudget = 222\n")
    call("run", "-p", "x")
    assert fake.settings.budget == "111"
    call("--config", str(other), "run", "-p", "x")
    assert fake.settings.budget == "222"


def test_without_a_name_the_users_own_file_is_read(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVLOCAL_CONFIG")
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: tmp_path / name)
    call("run", "-p", "x")
    assert fake.settings.budget == "2048"
    (tmp_path / "kvlocal").mkdir()
    (tmp_path / "kvlocal" / "config.toml").write_text("[run]\nbudget = 333\n")
    call("run", "-p", "x")
    assert fake.settings.budget == "333"


def test_values_of_every_kind(fake: Fake, file: Path) -> None:
    file.write_text(
        'defaults.policy-arg = ["kernel=5", "pool=avg"]\n[run]\npolicy = "snapkv"\ntemp = 0\nctx-size = 64\n'
        'stream = false\nignore-eos = true\nmodel = "my.gguf"\nkv-window = 8\n'
    )
    call("run", "-p", "x")
    assert fake.settings.policy_args == {"kernel": "5", "pool": "avg", "window": "8"}
    assert (fake.settings.policy, fake.settings.model, fake.settings.n_ctx) == ("snapkv", "my.gguf", 64)
    assert fake.engine.sampling.temp == 0 and fake.engine.sampling.ignore_eos
    call("run", "-p", "x", "--policy-arg", "window=16", "-hf", "someone/model")
    assert (fake.settings.policy_args, fake.settings.model) == ({"window": "16"}, "hf:someone/model")


def test_a_group_has_a_table_and_each_of_its_commands_another(file: Path) -> None:
    file.write_text('[defaults]\nbudget = 1\nkv = "q4"\n[eval]\nbudget = [2, "25%"]\n[eval.kld]\nbudget = 3\n')
    values = config_file.read(file, main).default_map()
    assert values["eval"]["kld"] == {"storages": "q4", "budgets": "3"}
    assert values["eval"]["needle"] == {"storages": "q4", "budgets": "2,25%"}
    assert values["run"] == {"storage": "q4", "budget": 1}


def test_what_only_chunked_prefill_heeds_may_stand_in_a_file(fake: Fake, file: Path) -> None:
    file.write_text("[defaults]\nchunk = 64\nguide = 8\n")
    call("run", "-p", "x")
    assert (fake.settings.prefill, fake.settings.guide) == ("exact", 0)
    call("run", "-p", "x", "--prefill", "chunked")
    assert (fake.settings.chunk, fake.settings.guide) == (64, 8)
    assert sentence("run", "-p", "x", "--chunk", "32").startswith("--chunk has no effect")
    assert sentence("run", "-p", "x", "--guide", "32").startswith("--guide has no effect")


def test_a_policy_of_the_file_is_a_choice(fake: Fake, file: Path) -> None:
    file.write_text('[defaults]\nkv = "q4"\n')
    call("run", "-p", "x")
    assert fake.settings.policy == "ada-snapkv"
    file.write_text('[defaults]\nkv = "q4"\npolicy = "streaming"\n')
    call("run", "-p", "x")
    assert fake.settings.policy == "streaming"


def test_help_shows_the_default_that_holds(file: Path) -> None:
    file.write_text("[run]\nctx-size = 1234\n")
    assert "[default: 1234; x>=0]" in " ".join(call("run", "--help").stdout.split())


# --- what it is refused for ----------------------------------------------------------------------------------------

REFUSALS = {
    "[rum]": "there is no table [rum] (did you mean [run]?); give [defaults], [run],",
    "budget = 1": "'budget' stands in no table; put it into [defaults], [run],",
    "[run]\nctx_size = 1": "[run] has no key 'ctx_size' (did you mean 'ctx-size'?); give archive, archive-format,",
    "[defaults]\nnonsense = 1": "[defaults] has no key 'nonsense'; give archive, archive-format, ask,",
    "[run.kld]\nbudget = 1": "[run] has no key 'kld'; give archive, archive-format, batch-size,",
    "[eval.kdl]\nbudget = 1": "[eval] has no key 'kdl'; give archive, ask, batch-size,",
    "[eval.kld]\nrows = 1": "[eval.kld] has no key 'rows'; give archive, batch-size,",
    '[run]\nctx-size = "big"': "'ctx-size' in [run] is \"big\"; give a whole number.",
    "[run]\nctx-size = true": "'ctx-size' in [run] is true; give a whole number.",
    "[run]\nctx-size = 1.5": "'ctx-size' in [run] is 1.5; give a whole number.",
    '[run]\ntemp = "hot"': "'temp' in [run] is \"hot\"; give a number.",
    "[run]\nstream = 1": "'stream' in [run] is 1; give true or false.",
    "[run]\npolicy = 3": "'policy' in [run] is 3; give a text.",
    "[run]\nprefill = 3": '\'prefill\' in [run] is 3; give "exact" or "chunked".',
    "[run]\nbudget = 0.5": "'budget' in [run] is 0.5; give a text or a whole number.",
    '[run]\npolicy-arg = "window=3"': '\'policy-arg\' in [run] is "window=3"; give a list of texts, as ["…"].',
    "[run]\npolicy-arg = [3]": "'policy-arg' in [run] is [3]; give a list of texts, as [\"…\"].",
    "[bench]\npolicy = [3]": "'policy' in [bench] is [3]; give a text, or a list of them.",
    "[bench]\nbudget = true": "'budget' in [bench] is true; give a text or a number, or a list of them.",
    '[defaults]\npolicy = ["a"]': "'policy' in [defaults] is [\"a\"]; give a text to `kvlocal run`.",
    "[run]\npolicy = 1979-05-27": "'policy' in [run] is \"1979-05-27\"; give a text.",
}


@pytest.mark.parametrize("text", REFUSALS)
def test_what_is_wrong_in_a_file_is_one_sentence(fake: Fake, file: Path, text: str) -> None:
    file.write_text(text + "\n")
    for command in (["run", "-p", "x"], ["config"]):
        assert sentence(*command).startswith(f"{file}: {REFUSALS[text]}")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[run]\nctx-size = -3", "'ctx-size' in [run] of {}: -3 is not in the range x>=0"),
        ('[defaults]\nprefill = "maybe"', "'prefill' in [defaults] of {}: 'maybe' is not one of 'exact', 'chunked'"),
    ],
)
def test_what_an_option_refuses_is_blamed_on_the_file(fake: Fake, file: Path, text: str, why: str) -> None:
    file.write_text(text + "\n")
    assert sentence("run", "-p", "x") == f"Invalid value for {why.format(file)}; see `kvlocal run --help`."
    assert sentence("config").startswith(why.format(file))


def test_a_file_that_is_no_toml_cannot_be_read_or_is_not_there(fake: Fake, file: Path, tmp_path: Path) -> None:
    assert sentence("policies") == f"there is no configuration file '{file}'; `kvlocal config init` writes one."
    file.write_text("[run\n")
    assert sentence("run", "-p", "x").startswith(f"{file} is not TOML: Expected ']'")
    file.write_bytes(b"\xff")
    assert sentence("run", "-p", "x") == f"{file} is not UTF-8 at offset 0; a configuration file is TOML in UTF-8."
    assert sentence("--config", str(tmp_path), "policies").startswith(f"the configuration file '{tmp_path}' cannot be")


# --- kvlocal config ------------------------------------------------------------------------------------------------


def rows(text: str) -> list[str]:
    return [re.sub("─+", "─", " ".join(line.split())) for line in text.splitlines() if line.strip()]


def test_config_shows_what_holds_and_why(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("KVLOCAL_TEMP", "0.5")
    file.write_text(
        '[defaults]\nn-predict = 9\ntemp = 1.0\n[run]\nn-predict = 3\nstream = false\npolicy-arg = ["a=1", "b=2"]\n'
        "[eval]\nrows = 2\n"
    )
    result = call("config")
    assert (result.exit_code, result.stderr) == (0, "")
    first, *table = rows(result.stdout)
    assert first == str(file)
    commands = call("config").stdout
    assert "n-predict" in commands
    assert [row for row in table if not row.startswith("n-predict 9") and not row.startswith("temp")] == [
        "option value from commands",
        "─",
        "n-predict 3 [run] run",
        "policy-arg a=1 b=2 [run] run",
        "rows 2 [eval] eval ruler summarize kv-retrieval",
        "stream false [run] run",
    ]
    assert any(row.startswith("n-predict 9 [defaults] chat, ") for row in table)
    assert any(row.startswith("temp 0.5 KVLOCAL_TEMP run, chat") for row in table)


def test_config_says_that_there_is_none(file: Path) -> None:
    assert call("config").stdout == (f"{file} (not there; `kvlocal config init` writes an example)\nNothing is set.\n")


def test_init_writes_an_example_once(file: Path, tmp_path: Path) -> None:
    assert call("config", "init").stdout == f"{file}\n"
    text = file.read_text("utf-8")
    assert call("config").stdout == f"{file}\nNothing is set.\n"
    assert sentence("config", "init") == f"'{file}' is there already; edit it, or remove it first."
    assert file.read_text("utf-8") == text
    nested = tmp_path / "new" / "folder" / "x.toml"
    assert call("--config", str(nested), "config", "init").stdout == f"{nested}\n"


def test_every_line_of_the_example_is_allowed(file: Path) -> None:
    call("config", "init")
    text = re.sub(r"^# ([a-z-]+ = )", r"\1", file.read_text("utf-8"), flags=re.MULTILINE)
    file.write_text(text, "utf-8")
    assert call("config").exit_code == 0
    keys = set(re.findall(r"^([a-z-]+) = ", text, flags=re.MULTILINE))
    assert len(keys) > 5 and all(key in call("config").stdout for key in keys)


def test_an_example_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in sentence("--config", str(tmp_path / "file" / "config.toml"), "config", "init")
