"""An engine that needs no model: it counts words as tokens and always gives the same answer."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.main import main
from kvlocal_cli.options.settings import Settings
from kvlocal_cli.render.screen import Screen

from kvlocal.errors import UsageError
from kvlocal.native.formats import FORMATS

MIB = 2**20
WORDS = ("Two ", "rivers ", "meet ", "at ", "Koblenz.")
ANSWER = "".join(WORDS)
FIGURES = (
    "KV 6.0 MiB in use / 24.0 MiB a full cache would take / 25.0 MiB peak"
    " · 256 tokens held per head (40 to 1,024) · prefill 512 t/s, decode 31.2 t/s"
)

Progress = Callable[[int, int], None] | None


@dataclass
class FakeReport:
    values: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return self.values


@dataclass(frozen=True)
class FakeCache:
    """Two layers of two heads: a quarter of the tokens in f16, half of them in f16 and q4, all in f16, all in q8."""

    n_seen: int

    @property
    def layers(self) -> Sequence[Any]:
        return (None, None)

    def slot_formats(self, seq: int, layer: int) -> list[np.ndarray]:
        n, f16, q8, q4 = self.n_seen, *map(FORMATS.index, ("f16", "q8", "q4"))
        if layer == 0:
            return [np.full(n // 4, f16), np.repeat([f16, q4], n // 4)]
        return [np.full(n, f16), np.full(n, q8)]


@dataclass
class FakeEngine:
    """Remembers what it was asked. `fault` runs before the piece with number `fault_at`."""

    settings: Settings
    words: tuple[str, ...] = WORDS
    fault: Callable[[], None] | None = None
    fault_at: int = 2
    prefill_fault: Callable[[], None] | None = None

    model_name: str = "fake"
    n_ctx: int = 4096
    finish_reason: str | None = None
    text: str = ""
    sequences: list[Any] = field(default_factory=lambda: [SimpleNamespace(tokens=[], evicted_at=0)])
    changes: list[str] = field(default_factory=list)
    raw: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    sampling: Any = None
    n_predict: int | None = None
    closed: bool = False
    generated: int = 0
    note: str | None = None

    @property
    def policy(self) -> Any:
        return SimpleNamespace(name=self.settings.policy)

    @property
    def config(self) -> Any:
        return SimpleNamespace(budget=self.settings.budget)

    def alter(self, what: str) -> bool:
        """`h2o` needs another cache."""
        if what == "nonsense":
            raise UsageError("There is no policy 'nonsense'")
        self.changes.append(what)
        return what.startswith("h2o")

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        self.raw = text
        return list(range(len(text.split())))

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        self.messages = [dict(message) for message in messages]
        return list(range(sum(len(message["content"].split()) for message in messages)))

    def template_note(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        return self.note if any(message["role"] == "system" for message in messages) else None

    def prefill(self, tokens: Sequence[int], *, on_progress: Progress = None) -> None:
        self.sequences[0].tokens += tokens
        if self.prefill_fault is not None:
            self.prefill_fault()
        if on_progress is not None:
            on_progress(len(tokens), len(tokens))

    def generate(self, n_predict: int, sampling: Any) -> Iterator[str]:
        self.n_predict, self.sampling, self.text, self.generated = n_predict, sampling, "", 0
        self.finish_reason = "interrupted"
        words = self.words if n_predict < 0 else self.words[:n_predict]
        for index, word in enumerate(words):
            if self.fault is not None and index == self.fault_at:
                self.fault()
            self.text += word
            self.generated += 1
            yield word
        self.finish_reason = "stop" if len(words) == len(self.words) else "length"

    def report(self) -> FakeReport:
        prompt, evicts = len(self.sequences[0].tokens), self.settings.policy != "full"
        return FakeReport(
            {
                "text": self.text,
                "model": self.model_name,
                "policy": self.settings.policy,
                "policy_args": dict(self.settings.policy_args),
                "budget": {"tokens": 256, "fraction": 0.25, "bytes": 6 * MIB},
                "tokens": {
                    "prompt": prompt,
                    "generated": self.generated,
                    "held_mean": 256.0,
                    "held_min": 40,
                    "held_max": 1024,
                },
                "kv": {
                    "full_bytes": 24 * MIB,
                    "used_bytes": 6 * MIB,
                    "allocated_bytes": 7 * MIB,
                    "peak_bytes": 25 * MIB,
                    "fixed_bytes": 0,
                },
                "reads": None,
                "archive": None,
                "rss": {
                    "before_evict_bytes": 300 * MIB if evicts else None,
                    "after_evict_bytes": 281 * MIB if evicts else None,
                    "peak_bytes": 310 * MIB,
                },
                "timing": {
                    "load_s": 0.5,
                    "prefill_s": 2.0,
                    "prefill_tps": 512.0,
                    "ttft_s": 2.25,
                    "evict_s": 0.125,
                    "decode_s": 1.5,
                    "decode_tps": 31.25,
                },
                "finish_reason": self.finish_reason,
            }
        )

    @property
    def cache(self) -> FakeCache | None:
        """As over a real engine, None without eviction."""
        return None if self.settings.policy == "full" else FakeCache(len(self.sequences[0].tokens))

    @property
    def context(self) -> Any:
        return SimpleNamespace(stats=lambda: SimpleNamespace(peak_bytes=25 * MIB))

    def kv(self, sequence: Any = None) -> dict[str, float]:
        n = len((sequence or self.sequences[0]).tokens)
        return {"held_mean": n / 2, "used_bytes": n * 512, "full_bytes": n * 1024, "archive_bytes": 0}

    def reset(self) -> None:
        self.sequences = [SimpleNamespace(tokens=[], evicted_at=0)]


@dataclass
class FakeChat:
    """Keeps what was said, also of an answer that was closed early."""

    engine: FakeEngine
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    reread: bool = False
    dropped: str = ""
    left_out: str = ""
    forgotten: bool = False

    @property
    def note(self) -> str | None:
        return self.engine.note if self.system else None

    def ask(self, text: str, n_predict: int, sampling: Any, *, on_progress: Progress = None) -> Iterator[str]:
        self.messages.append({"role": "user", "content": text})
        said = ""
        try:
            self.engine.prefill(self.engine.chat_tokens(self.messages[-1:]), on_progress=on_progress)
            for piece in self.engine.generate(n_predict, sampling):
                said += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": said})

    def again(self, n_predict: int, sampling: Any, *, on_progress: Progress = None) -> Iterator[str]:
        question = self.undo()
        yield from self.ask(question, n_predict, sampling, on_progress=on_progress)

    def undo(self) -> str:
        if not self.messages:
            raise UsageError("Nothing was asked yet, so there is nothing to take back.")
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        return question

    def set_system(self, text: str) -> None:
        self.system = text or None
        self.forget_cache()

    def forget_cache(self) -> None:
        self.forgotten, self.reread = True, True

    def save(self, path: Path) -> int:
        return path.write_text(json.dumps(self.messages), "utf-8")

    def load(self, path: Path) -> None:
        if not path.exists():
            raise UsageError(f"There is no session {path}; /save or --session writes one.")
        self.messages = json.loads(path.read_text("utf-8"))
        self.engine.sequences[0].tokens = list(range(3 * len(self.messages)))

    def clear(self) -> None:
        self.messages = []
        self.engine.reset()


@dataclass
class Fake:
    """What the commands were given, and what the next engines are made with."""

    options: dict[str, Any] = field(default_factory=dict)
    engines: list[FakeEngine] = field(default_factory=list)
    chats: list[FakeChat] = field(default_factory=list)

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    @property
    def settings(self) -> Settings:
        return self.engine.settings

    def open_engine(self, settings: Settings, _screen: Screen) -> FakeEngine:
        if settings.policy == "nonsense":
            raise UsageError("There is no policy 'nonsense'")
        if self.engines:
            assert self.engines[-1].closed, "two engines at once"
        self.engines.append(FakeEngine(settings, **self.options))
        return self.engines[-1]

    def new_chat(self, engine: FakeEngine, system: str | None) -> FakeChat:
        self.chats.append(FakeChat(engine, system))
        return self.chats[-1]


def policy_rows() -> list[Any]:
    window = SimpleNamespace(name="window", default=32, allowed="a whole number", help="most recent tokens")
    compat = SimpleNamespace(name="compat", default=None, allowed="one of none, adakv", help="follow to the letter")
    return [
        SimpleNamespace(name="full", summary="Keeps every token.", parameters=(), paper=""),
        SimpleNamespace(name="snapkv", summary="Keeps what is read.", parameters=(window, compat), paper="arXiv:1"),
        SimpleNamespace(name="ada", summary="Heads compete.", parameters=(window,), paper="arXiv:2"),
    ]


def install(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put the fakes where the commands look for kvlocal."""
    fake = Fake()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(backend, "open_engine", fake.open_engine)
    monkeypatch.setattr(backend, "new_chat", fake.new_chat)
    monkeypatch.setattr(backend, "new_sampling", lambda sampling: sampling)
    monkeypatch.setattr(backend, "change_policy", lambda engine, name, pairs: engine.alter(" ".join([name, *pairs])))
    monkeypatch.setattr(backend, "change_budget", lambda engine, text: engine.alter(text))
    monkeypatch.setattr(backend, "describe_policies", policy_rows)
    monkeypatch.setattr(backend, "versions", lambda: ("1.2.3", {"llama_cpp_commit": "0c1e57098", "abi_version": 7}))
    return fake


def call(*args: str, stdin: str | bytes = "") -> Result:
    """Run `kvlocal ARGS`; only an exit may end it."""
    result = CliRunner().invoke(main, args, input=stdin, prog_name="kvlocal")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def sentence(*args: str, stdin: str | bytes = "", code: int = 2) -> str:
    """The one sentence of a call that fails."""
    result = call(*args, stdin=stdin)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.index("\n") == len(result.stderr) - 1
    return result.stderr.removeprefix("Error: ").rstrip("\n")


def fail(exception: BaseException) -> Callable[[], None]:
    """A fault that raises."""

    def fault() -> None:
        raise exception

    return fault


def press_ctrl_c() -> None:
    """A fault that comes from the keyboard."""
    signal.raise_signal(signal.SIGINT)
