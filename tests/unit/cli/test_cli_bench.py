"""`kvlocal bench` with a measurement that is made up: tables, files, errors and exit codes."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import call, fail, press_ctrl_c, sentence
from kvlocal_cli.backend import bench as backend
from kvlocal_cli.backend import machine as backend_machine
from kvlocal_cli.commands.bench import RANDOM_MODELS
from kvlocal_cli.render.bench import step_text

from kvlocal.errors import KVError
from kvlocal.measure.bench_config import BenchConfig, Result, Step
from kvlocal.measure.bench_plot import lines
from kvlocal.models.random import SHAPES
from kvlocal.storage.storage import STORAGES

MIB = 2**20
MACHINE = {"cpu": "Fast Chip 9", "cores": 4, "threads": 1, "read_bytes_per_s": 12.34e9}
FULL = Result(
    model="fake",
    policy="full",
    storage="f16",
    budget="100%",
    prefill="exact",
    reads="",
    depth=4096,
    n_prompt=512,
    n_gen=32,
    prefill_tps=200.0,
    prefill_tps_min=190.0,
    prefill_tps_max=210.0,
    decode_tps=20.0,
    decode_tps_min=19.5,
    decode_tps_max=20.25,
    prompt_s=16.0,
    prompt_tps=256.0,
    ttft_s=16.05,
    evict_s=None,
    held_mean=4096.0,
    used_bytes=84 * MIB,
    peak_bytes=84 * MIB,
    full_bytes=84 * MIB,
    attention_bytes_per_token=85.5 * MIB,
)
ADA = replace(FULL, policy="ada-snapkv", budget="25%", prefill_tps=250.0, decode_tps=31.0, evict_s=0.375)
ADA = replace(ADA, decode_tps_min=30.0, decode_tps_max=130.4, used_bytes=21 * MIB, ttft_s=17.25)


@dataclass
class Fake:
    """What was asked for, and what comes of it: `fault` runs after that many results."""

    results: list[Result] = field(default_factory=lambda: [FULL, ADA])
    fault: Callable[[], None] | None = None
    fault_at: int = 1
    config: BenchConfig | None = None
    path: Path | None = None
    model: str | None = None
    random: str | None = None
    n_gpu_layers: int | None = None
    loaded: bool = False

    def find_model(self, settings: Any, random: str | None, _screen: Any) -> Path:
        self.model, self.random, self.loaded = settings.model, random, True
        return Path("found.gguf")

    def run_bench(self, path: Path, config: BenchConfig, n_gpu_layers: int, on_step: Any) -> Iterator[dict[str, Any]]:
        self.path, self.config, self.n_gpu_layers = path, config, n_gpu_layers
        for i, result in enumerate(self.results):
            if self.fault is not None and i == self.fault_at:
                self.fault()
            on_step(Step(result.depth, result.policy, "measure", 0, 1))
            yield asdict(result)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(backend_machine, "find_model", fake.find_model)
    monkeypatch.setattr(backend, "run_bench", fake.run_bench)
    monkeypatch.setattr(backend_machine, "describe_machine", lambda _n_threads: MACHINE)
    return fake


# --- what is printed --------------------------------------------------------------------------------------------


def test_the_table_has_medians_ranges_and_ratios(fake: Fake) -> None:
    result = call("bench")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "fake · Fast Chip 9 · 1 thread of 4 cores · memory read at 12.3 GB/s · prefill of 512 tokens"
        " · decode of 32: median (least–most)\n"
        "\n"
        "| depth | policy     | budget | prefill t/s | x full |       decode t/s | x full |     used |     peak"
        " | evict s | ttft s |\n"
        "| ----: | ---------- | ------ | ----------: | -----: | ---------------: | -----: | -------: | -------:"
        " | ------: | -----: |\n"
        "| 4,096 | full       | 100%   |         200 |   1.00 | 20.0 (19.5–20.2) |   1.00 | 84.0 MiB | 84.0 MiB"
        " |       – |  16.05 |\n"
        "| 4,096 | ada-snapkv | 25%    |         250 |   1.25 |  31.0 (30.0–130) |   1.55 | 21.0 MiB | 84.0 MiB"
        " |    0.38 |  17.25 |\n"
    )


def header(fake: Fake, *results: Result) -> list[str]:
    fake.results = list(results)
    return [cell.strip() for cell in call("bench").stdout.splitlines()[2].strip("|").split("|")]


def test_columns_that_say_nothing_are_left_out(fake: Fake) -> None:
    assert "x full" not in header(fake, ADA)
    assert {"mode", "kv"} <= set(header(fake, FULL, replace(ADA, prefill="chunked", storage="q8")))
    assert "decode t/s" not in header(fake, replace(FULL, decode_tps=None, n_gen=0))
    assert "prefill t/s" not in header(fake, replace(FULL, prefill_tps=None, n_prompt=0))
    assert "evict s" not in header(fake, FULL)
    last = header(fake, replace(FULL, ttft_s=None, decode_tps=None))[-1]
    assert last == "prompt s" and header(fake, FULL)[-1] == "ttft s"


def test_ratios_are_to_full_at_the_same_depth(fake: Fake) -> None:
    deep = {"depth": 8192, "prefill_tps": 100.0}
    fake.results = [replace(ADA, depth=0), FULL, ADA, replace(FULL, **deep), replace(ADA, **deep)]
    rows = [line.split("|") for line in call("bench").stdout.splitlines()[4:]]
    assert [row[5].strip() for row in rows] == ["–", "1.00", "1.25", "1.00", "1.00"]


def test_every_storage_has_its_row(fake: Fake) -> None:
    q8 = replace(FULL, policy="paged", storage="q8", decode_tps=25.0, used_bytes=46 * MIB, evict_s=0.25, ttft_s=16.5)
    stock = replace(FULL, storage="q4", decode_tps=15.0, used_bytes=24 * MIB, peak_bytes=24 * MIB)
    fake.results = [FULL, stock, q8, replace(q8, policy="ada-snapkv", budget="25%", storage="kv2", used_bytes=5 * MIB)]
    assert call("bench").stdout.split("\n", 2)[2] == (
        "| depth | policy     | budget | kv  | prefill t/s | x full |       decode t/s | x full |     used |     peak"
        " | evict s | ttft s |\n"
        "| ----: | ---------- | ------ | --- | ----------: | -----: | ---------------: | -----: | -------: | -------:"
        " | ------: | -----: |\n"
        "| 4,096 | full       | 100%   | f16 |         200 |   1.00 | 20.0 (19.5–20.2) |   1.00 | 84.0 MiB | 84.0 MiB"
        " |       – |  16.05 |\n"
        "| 4,096 | full       | 100%   | q4  |         200 |   1.00 | 15.0 (19.5–20.2) |   0.75 | 24.0 MiB | 24.0 MiB"
        " |       – |  16.05 |\n"
        "| 4,096 | paged      | 100%   | q8  |         200 |   1.00 | 25.0 (19.5–20.2) |   1.25 | 46.0 MiB | 84.0 MiB"
        " |    0.25 |  16.50 |\n"
        "| 4,096 | ada-snapkv | 25%    | kv2 |         200 |   1.00 | 25.0 (19.5–20.2) |   1.25 |  5.0 MiB | 84.0 MiB"
        " |    0.25 |  16.50 |\n"
    )


def test_ratios_are_to_full_in_f16_or_the_first_storage_there_is(fake: Fake) -> None:
    q8, q4 = replace(FULL, storage="q8"), replace(FULL, storage="q4", decode_tps=15.0)
    for results, title, expected in (
        ([q4, FULL], "x full", ["0.75", "1.00"]),
        ([q8, q4], "x full q8", ["1.00", "0.75"]),
    ):
        assert header(fake, *results).count(title) == 2
        rows = [line.split("|") for line in call("bench").stdout.splitlines()[4:]]
        assert [row[8].strip() for row in rows] == expected


def test_json_is_the_machine_and_every_field(fake: Fake) -> None:
    printed = json.loads(call("bench", "-o", "json").stdout)
    assert printed == {"machine": MACHINE, "results": [asdict(FULL), asdict(ADA)]}
    assert list(printed["results"][0]) == [each.name for each in fields(Result)]
    assert printed["results"][0]["evict_s"] is None


def test_csv_is_the_same_columns(fake: Fake) -> None:
    text = call("bench", "--format", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == [each.name for each in fields(Result)] and len(rows) == 2
    assert (rows[1]["policy"], rows[1]["evict_s"], rows[0]["evict_s"]) == ("ada-snapkv", "0.375", "")
    assert "\r" not in text


def test_output_goes_into_a_file_when_one_is_named(fake: Fake, tmp_path: Path) -> None:
    expected = call("bench", "-o", "json").stdout
    result = call("bench", "-o", "json", "--output-file", str(tmp_path / "speed.json"))
    assert (result.stdout, result.stderr) == ("", "")
    assert (tmp_path / "speed.json").read_text("utf-8") == expected


def test_steps_are_told_in_words() -> None:
    assert step_text(Step(4096, "ada-snapkv 25%", "prefill", 2048, 4096)) == (
        "depth 4,096 · ada-snapkv 25% · prefill 2,048/4,096"
    )


# --- what is measured -------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_help(fake: Fake) -> None:
    assert call("bench").exit_code == 0
    config = fake.config
    assert config is not None and fake.path == Path("found.gguf") and fake.n_gpu_layers == 0
    assert (fake.model, fake.random, config.depths) == (None, None, (0, 4096))
    assert [variant.label for variant in config.variants] == ["full", "ada-snapkv 25%"]
    assert (config.n_prompt, config.n_gen, config.repetitions) == (512, 32, 3)
    assert (config.chunk, config.n_batch, config.n_ubatch, config.n_threads) == (512, 2048, 512, 0)


def test_every_option_arrives(fake: Fake) -> None:
    line = (
        "bench my.gguf -d 0,64 -p 16 -n 8 -r 2 --policy paged,snapkv --policy-arg window=8 --budget 10,25% --kv f16"
        " --prefill exact,chunked --chunk 32 -t 3 -ngl 99 --kernels portable -ub 64 -b 128"
    )
    assert call(*line.split()).exit_code == 0
    config = fake.config
    assert config is not None and (fake.model, fake.n_gpu_layers, config.kernels) == ("my.gguf", 99, "portable")
    labels = ["paged", "snapkv 10", "snapkv 10 chunked", "snapkv 25%", "snapkv 25% chunked"]
    assert [variant.label for variant in config.variants] == labels
    assert {variant.policy.n_window for variant in config.variants[1:]} == {8}
    assert config == BenchConfig(config.variants, (0, 64), 16, 8, 2, 32, 128, 64, 3, "portable")


def test_every_storage_arrives(fake: Fake) -> None:
    kv = ",".join(STORAGES)
    assert call("bench", "--policy", "full,paged,snapkv", "--kv", kv, "--budget", "25%").exit_code == 0
    assert fake.config is not None and fake.config.evict_every == 32
    labels = [variant.label for variant in fake.config.variants]
    rest = STORAGES[1:]
    assert labels == [
        *("full", "full q8", "full q4"),
        *("paged", *(f"paged {storage}" for storage in rest)),
        *("snapkv 25%", *(f"snapkv 25% {storage}" for storage in rest)),
    ]


def test_the_model_is_a_path_a_repository_or_random(fake: Fake) -> None:
    assert call("bench", "-hf", "someone/model").exit_code == 0 and fake.model == "hf:someone/model"
    assert call("bench", "--random-model", "llama-1b").exit_code == 0
    assert (fake.model, fake.random) == (None, "llama-1b")
    assert tuple(SHAPES) == RANDOM_MODELS
    fake.loaded = False
    assert sentence("bench", "m.gguf", "--random-model", "llama-1b") == (
        "two models are named, 'm.gguf' and --random-model llama-1b; give one of them."
    )
    assert "is not one of" in sentence("bench", "--random-model", "llama-9b") and not fake.loaded


# --- errors and exit codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("-d -5", "Invalid value for '-d' / '--depth': '-5' is not a whole number of at least 0;"),
        ("-d 0,,4", "Invalid value for '-d' / '--depth': '0,,4' is not a list: an item is empty;"),
        ("--depth=", "Invalid value for '-d' / '--depth': '' is not a list: an item is empty;"),
        ("-d 1e3", "Invalid value for '-d' / '--depth': '1e3' is not a whole number of at least 0;"),
        ("--policy full,", "Invalid value for '--policy': 'full,' is not a list: an item is empty;"),
        ("--prefill exact,fast", "Invalid value for '--prefill': 'fast' is not one of exact, chunked;"),
        ("-p -1", "Invalid value for '-p' / '--n-prompt': -1 is not in the range x>=0;"),
        ("-r 0", "Invalid value for '-r' / '--repetitions': 0 is not in the range x>=1;"),
        ("-o xml", "Invalid value for '-o' / '--format': 'xml' is not one of 'md', 'json', 'csv';"),
        ("--kv q5", "There is no storage 'q5' for the KV cache; give f16, q8, q4, "),
        ("--kv q8,", "Invalid value for '--kv': 'q8,' is not a list: an item is empty;"),
        ("--policy full --kv kv2", "'full' is llama.cpp's own cache, which is never stored in kv2; give f16, q8, q4, "),
        ("--policy snapky", "There is no policy 'snapky' (did you mean 'snapkv'?); known policies: "),
        ("--budget 10x", "'x' in '10x' is not a unit: use %, "),
        ("--budget 25%,8", "A budget of 8 tokens per head is too small: the policy needs at least "),
        ("--policy-arg nothing=1", "None of the policies full, ada-snapkv has a parameter 'nothing'."),
        ("--chunk 64", "--chunk has no effect without --prefill chunked; give both or neither."),
        ("--plot speed.pdf", "A plot is written as .svg or .png, not as 'speed.pdf'."),
        ("--output-file no/such/speed.json", "there is no folder 'no/such' to write 'speed.json' to."),
        ("--output-file .", "'.' is a folder; name a file."),
    ],
)
def test_usage_errors_come_before_anything_is_loaded(fake: Fake, args: str, expected: str) -> None:
    assert sentence("bench", *args.split()).startswith(expected)
    assert not fake.loaded


@pytest.mark.parametrize("fault", [press_ctrl_c, fail(KeyboardInterrupt())])
def test_ctrl_c_prints_what_was_measured(fake: Fake, fault: Callable[[], None], tmp_path: Path) -> None:
    fake.fault = fault
    result = call("bench", "-o", "json", "--plot", str(tmp_path / "speed.svg"))
    assert (result.exit_code, result.stderr) == (130, "")
    assert json.loads(result.stdout)["results"] == [asdict(FULL)]
    assert (tmp_path / "speed.svg").exists()


def test_ctrl_c_before_the_first_result_prints_nothing(fake: Fake) -> None:
    fake.fault, fake.fault_at = press_ctrl_c, 0
    result = call("bench")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


def test_a_failure_keeps_what_was_measured(fake: Fake) -> None:
    fake.fault = fail(KVError("no memory for depth 8192."))
    result = call("bench", "-o", "csv")
    assert (result.exit_code, result.stderr) == (1, "Error: no memory for depth 8192.\n")
    assert result.stdout.count("\n") == 2


# --- the plot ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_the_plot_is_a_picture_of_its_kind(fake: Fake, tmp_path: Path, suffix: str, magic: bytes) -> None:
    fake.results = [FULL, ADA, replace(ADA, depth=8192, decode_tps=None, decode_tps_min=None)]
    file = tmp_path / f"speed{suffix}"
    assert call("bench", "--plot", str(file)).exit_code == 0
    assert file.read_bytes().startswith(magic)


def test_a_line_is_a_variant_over_depth_without_what_was_not_measured() -> None:
    deep, chunked = replace(ADA, depth=8192), replace(ADA, prefill="chunked", decode_tps=None)
    rows = [asdict(result) for result in (deep, FULL, ADA, chunked)]
    points = {label: [row["depth"] for row in each] for label, each in lines(rows, "decode_tps").items()}
    assert points == {"full": [4096], "ada-snapkv 25%": [4096, 8192]}
    assert list(lines(rows, "used_bytes")) == ["full", "ada-snapkv 25%", "ada-snapkv 25% chunked"]


def test_without_matplotlib_the_error_says_how_to_get_it(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert sentence("bench", "--plot", "speed.svg", code=1) == (
        'A plot needs matplotlib; install it with pip install "kvlocal[plot]".'
    )
    assert not fake.loaded
