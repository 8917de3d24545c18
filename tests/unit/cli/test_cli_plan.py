"""`kvlocal plan` with a fake planner: transcripts to the letter, the JSON object, exit codes, what is suggested."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from fake_engine import MIB, call, sentence
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.commands.plan import suggested
from kvlocal_cli.options.settings import Settings

from kvlocal.measure.plan import KVPlan, Need, Plan
from kvlocal.native.devices import Placement

GIB = 2**30

FITS = """\
fake · ladder 2048 · kv f16 · exact prefill
a context of 8,192: a prompt of 7,679 tokens, 512 generated
4 threads: 4 physical cores of 8 usable processors
pages of 30 layers on CPU: tested on hardware

 weights            92.1 MiB
 KV peak           168.8 MiB   23.4 MiB in use at the end; full f16: 180.0 MiB
 window queries      8.4 MiB   remembered for the policy, f32
 page tables         2.8 MiB   positions, attention mass and units included
 compute buffers    14.0 MiB

 total             286.1 MiB
 free               2.00 GiB

It fits.
Largest context, exact prefill: ladder 8,192.
"""

FITS_NOT = """\
fake · full · kv f16 · exact prefill
8 sequences, each a context of 8,192: a prompt of 7,679 tokens, 512 generated
1 thread: as asked for

 weights           92.1 MiB
 KV peak           1.41 GiB   1.40 GiB in use at the end; full f16: 1.40 GiB
 compute buffers   14.0 MiB

 total             1.51 GiB
 free              1.00 GiB

It does not fit: 526.1 MiB of main memory too little.
Largest context, exact prefill: f16 5,120, q8 none, kv3 n/a.
"""


@dataclass
class FakePlanner:
    """Remembers what it was asked, and answers what it was told to."""

    plan: Plan
    asked: dict[str, Any] = field(default_factory=dict)

    def plan_run(self, settings: Settings, **asked: Any) -> dict[str, Any]:
        asked.pop("screen")
        self.asked = {"settings": settings, **asked}
        return self.plan.as_dict()


def make_plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "model": "fake",
        "policy": "ladder",
        "budget": "2048",
        "storage": "f16",
        "prefill": "exact",
        "n_ctx": 8192,
        "n_prompt": 7679,
        "n_generate": 512,
        "parallel": 1,
        "threads": 4,
        "threads_reason": "4 physical cores of 8 usable processors",
        "need": Need(
            weights_bytes=int(92.1 * MIB),
            kv=KVPlan(180 * MIB, int(23.4 * MIB), int(168.8 * MIB), int(8.4 * MIB), int(2.8 * MIB)),
            compute_bytes=14 * MIB,
            total_bytes=int(286.1 * MIB),
            pages=[Placement("CPU", 30, "tested on hardware")],
        ),
        "free_bytes": 2 * GIB,
        "device_free_bytes": 0,
        "fits": True,
        "max_context": {"ladder": 8192},
    }
    return Plan(**(values | changes))


def too_large(**changes: Any) -> Plan:
    need = Need(
        weights_bytes=int(92.1 * MIB),
        kv=KVPlan(int(1.4 * GIB), int(1.4 * GIB), int(1.41 * GIB), 0, 0),
        compute_bytes=14 * MIB,
        total_bytes=int(1550.1 * MIB),
    )
    values = {
        "policy": "full",
        "need": need,
        "free_bytes": GIB,
        "fits": False,
        "parallel": 8,
        "threads": 1,
        "threads_reason": "as asked for",
        "max_context": {"f16": 5120, "q8": 0, "kv3": None},
    }
    return make_plan(**(values | changes))


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> FakePlanner:
    fake = FakePlanner(make_plan())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(backend, "plan_run", fake.plan_run)
    return fake


def plain(text: str) -> str:
    """Without the blanks that a table's cells are filled up with."""
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def test_a_plan_that_fits_is_shown_and_the_exit_code_is_0(planner: FakePlanner) -> None:
    result = call("plan", "-c", "8192")
    assert (result.exit_code, result.stderr) == (0, "")
    assert plain(result.stdout) == FITS


def test_a_plan_that_does_not_fit_says_what_would_and_the_exit_code_is_1(planner: FakePlanner) -> None:
    planner.plan = too_large(suggestion={"budget": "1024", "prefill": "chunked", "policy": "ladder", "storage": "f16"})
    result = call("plan", "m.gguf", "-c", "8192", "--policy", "full", "--parallel", "8")
    line = "kvlocal plan m.gguf -c 8192 --budget 1024 --prefill chunked --n-prompt 7679 --generate 512 --parallel 8"
    assert (result.exit_code, result.stderr) == (1, "")
    assert plain(result.stdout) == f"{FITS_NOT}This would:\n{line}\n"


def test_where_nothing_helps_the_model_is_too_large(planner: FakePlanner) -> None:
    planner.plan = too_large()
    result = call("plan")
    assert result.exit_code == 1
    assert plain(result.stdout) == f"{FITS_NOT}Nothing that the cache could do helps; use a smaller model.\n"


def test_an_accelerator_has_its_own_total(planner: FakePlanner) -> None:
    pages = [Placement("CPU", 1, "emulated only"), Placement("CUDA0", 29, "portable path")]
    need = Need(GIB, KVPlan(GIB, GIB, GIB, 0, 0), 64 * MIB, 128 * MIB, device_bytes=2 * GIB, pages=pages)
    planner.plan = too_large(need=need, device_free_bytes=GIB)
    lines = plain(call("plan").stdout).splitlines()
    assert "pages of 1 layer on CPU: emulated only" in lines and "pages of 29 layers on CUDA0: portable path" in lines
    assert " total             128.0 MiB   and 2.00 GiB on accelerators" in lines
    assert " free               1.00 GiB   and 1.00 GiB on accelerators" in lines
    assert "It does not fit: 1.00 GiB on accelerators too little." in lines


def test_json_is_one_object_with_a_command_line_that_would_fit(planner: FakePlanner) -> None:
    planner.plan = too_large(parallel=1, suggestion={"n_ctx": 5120})
    result = call("plan", "--policy", "full", "-c", "8192", "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    assert json.loads(result.stdout) == {
        "weights_bytes": int(92.1 * MIB),
        "kv": {
            "full_bytes": int(1.4 * GIB),
            "used_bytes": int(1.4 * GIB),
            "peak_bytes": int(1.41 * GIB),
            "query_bytes": 0,
            "table_bytes": 0,
            "recall_bytes": 0,
            "archive_bytes": 0,
        },
        "compute_bytes": 14 * MIB,
        "total_bytes": int(1550.1 * MIB),
        "device_bytes": 0,
        "pages": [],
        "model": "fake",
        "policy": "full",
        "budget": "2048",
        "storage": "f16",
        "prefill": "exact",
        "n_ctx": 8192,
        "n_prompt": 7679,
        "n_generate": 512,
        "parallel": 1,
        "threads": 1,
        "threads_reason": "as asked for",
        "free_bytes": GIB,
        "device_free_bytes": 0,
        "fits": False,
        "max_context": {"f16": 5120, "q8": 0, "kv3": None},
        "suggestion": "kvlocal run --policy full -c 5120",
    }


def test_json_of_a_plan_that_fits_suggests_nothing(planner: FakePlanner) -> None:
    result = call("plan", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["suggestion"] is None


def test_plan_passes_its_options_on(planner: FakePlanner) -> None:
    call(
        "plan",
        "m.gguf",
        *["--n-prompt", "1000", "--generate", "0", "--parallel", "3", "--memory", "16GiB", "--kv", "q4", "-c", "4096"],
    )
    assert planner.asked == {
        "settings": Settings(model="m.gguf", policy="ada-snapkv", storage="q4", n_ctx=4096),
        "n_prompt": 1000,
        "n_generate": 0,
        "parallel": 3,
        "memory": 16 * GIB,
    }


def test_plan_has_the_documented_defaults(planner: FakePlanner) -> None:
    call("plan")
    assert planner.asked == {"settings": Settings(), "n_prompt": 0, "n_generate": None, "parallel": 1, "memory": None}


@pytest.mark.parametrize("text", ["16", "25%"])
def test_memory_is_in_bytes(planner: FakePlanner, text: str) -> None:
    said = sentence("plan", "--memory", text)
    assert said == f"--memory '{text}' is not a size: give bytes, such as 16GiB or 800MB."


def test_a_suggestion_keeps_what_was_typed_and_quotes_it() -> None:
    settings = Settings(model="my model.gguf", policy="snapkv", policy_args={"window": "64"}, n_ctx=4096, n_threads=2)
    line = suggested(settings, {"prefill": "chunked"}, {}, 1)
    assert line == ("kvlocal run 'my model.gguf' --policy snapkv --policy-arg window=64 -c 4096 --prefill chunked -t 2")


def test_a_suggestion_keeps_the_kernels() -> None:
    settings = Settings(policy="ada-snapkv", kernels="portable")
    assert suggested(settings, {"n_ctx": 512}, {}, 1) == "kvlocal run --policy ada-snapkv -c 512 --kernels portable"


def test_another_policy_does_not_get_the_arguments_of_the_first() -> None:
    settings = Settings(policy="full", policy_args={"window": "64"}, storage="q4")
    changes = {"policy": "ladder", "storage": "f16", "budget": "512", "prefill": "chunked"}
    assert suggested(settings, changes, {}, 1) == "kvlocal run --budget 512 --prefill chunked"


def test_with_a_storage_the_default_policy_need_not_be_named() -> None:
    settings = Settings(policy="ada-snapkv", storage="q4")
    assert suggested(settings, {"n_ctx": 512}, {}, 1) == "kvlocal run -c 512 --kv q4"
    assert suggested(Settings(policy="full"), {"storage": "q4"}, {}, 1) == "kvlocal run --policy full --kv q4"
