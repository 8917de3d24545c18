"""The settings that the command line, the configuration file and Python share, each declared once.

Plain data: the command line makes its options from it, :func:`kvlocal.load` and the configurations their defaults and
checks, and ``tools/reference.py`` the table of docs/configuration.md.
"""

from __future__ import annotations

import math
import numbers
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvlocal.errors import UsageError

MAX_INT = 2**31 - 1
"""The most that llama.cpp's whole numbers (int32) hold."""

MAX_TOKENS = 2**30
"""The most tokens of a context or a batch that the paged cache can index."""

MAX_SEED = 2**32 - 2
"""llama.cpp's own -1 is the one number above it."""

MAX_THREADS = 512
"""llama.cpp's GGML_MAX_N_THREADS; more end the process."""

MAX_SEQUENCES = 256
"""llama.cpp's LLAMA_MAX_SEQ: sequences that a cache can hold."""

Taker = Literal["load", "sampling", "answer", "command"]


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: what the configurations call it, such as ``n_ctx``.
        flags: the options of the command line; the first long one names its variable and its key.
        section: where a help page lists it.
        default: None: nothing.
        help: the sentence of help pages and of the table.
        metavar: what a help page shows for the value.
        keyword: what Python calls it; by default its name.
        noun: what an error calls it; by default its keyword.
        taker: what takes the keyword: :func:`kvlocal.load`; ``sampling`` and what else an ``answer`` takes
            (``generate``, ``stream``, ``ask``, ``again``); or only a ``command``.
    """

    name: str
    flags: tuple[str, ...]
    section: str
    default: Any
    help: str
    metavar: str | None = None
    keyword: str = ""
    noun: str = ""
    taker: Taker = "load"

    def __post_init__(self) -> None:
        if not self.keyword and self.taker != "command":
            object.__setattr__(self, "keyword", self.name)

    @property
    def key(self) -> str:
        """Its key in the configuration file, such as ``ctx-size``."""
        return next(flag for flag in self.flags if flag.startswith("--")).removeprefix("--")

    @property
    def variable(self) -> str:
        """Its environment variable, such as ``KVLOCAL_CTX_SIZE``."""
        return f"KVLOCAL_{self.key.upper().replace('-', '_')}"

    @property
    def allowed(self) -> str:
        """The allowed values, to be read after "give"."""
        return "a text"

    def accepts(self, value: object) -> bool:
        """Whether a value has the right type and lies in the range."""
        return isinstance(value, str)

    def check(self, value: Any) -> Any:
        """The value as a plain Python one (numpy's numbers are taken).

        Raises:
            UsageError: another type, or out of range.
        """
        if value is None and self.default is None:
            return None
        if not self.accepts(value):
            raise refusal(self.noun or self.keyword or self.name, value, self.allowed)
        return value


@dataclass(frozen=True)
class Whole(Setting):
    """A whole number from ``low`` to ``high``."""

    metavar: str | None = "N"
    low: int = 0
    high: int = MAX_INT

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def accepts(self, value: object) -> bool:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return whole and self.low <= int(value) <= self.high  # type: ignore[call-overload]

    def check(self, value: Any) -> Any:
        value = super().check(value)
        return None if value is None else int(value)


@dataclass(frozen=True)
class Real(Setting):
    """A finite number from ``low`` to ``high``; ``above``: not ``low`` itself."""

    low: float = 0
    high: float = 1
    above: bool = False

    @property
    def allowed(self) -> str:
        return f"a number {f'above {self.low:g} and at most' if self.above else f'from {self.low:g} to'} {self.high:g}"

    def accepts(self, value: object) -> bool:
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return self.low <= float(value) <= self.high and not (self.above and float(value) == self.low)

    def check(self, value: Any) -> Any:
        return float(super().check(value))


@dataclass(frozen=True)
class Choice(Setting):
    """One of some texts."""

    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        return " or ".join(self.choices)

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and value in self.choices


@dataclass(frozen=True)
class Flag(Setting):
    """Yes or no."""

    @property
    def allowed(self) -> str:
        return "True or False"

    def accepts(self, value: object) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Size(Setting):
    """A budget: a text, or a number of tokens."""

    metavar: str | None = "SIZE"

    @property
    def allowed(self) -> str:
        return 'tokens per head (1024), a share ("25%") or bytes ("512MiB")'

    def accepts(self, value: object) -> bool:
        return isinstance(value, str | numbers.Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Pairs(Setting):
    """Names and values; on the command line an option that may be repeated."""

    metavar: str | None = "NAME=VALUE"

    @property
    def allowed(self) -> str:
        return "names and values, as a dict"

    def accepts(self, value: object) -> bool:
        return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


@dataclass(frozen=True)
class File(Setting):
    """The path of a file."""

    @property
    def allowed(self) -> str:
        return "a path, as a text or a Path"

    def accepts(self, value: object) -> bool:
        return isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str) and bool(os.fspath(value))


def refusal(name: str, value: object, allowed: str) -> UsageError:
    """The error for a value of a setting that is not allowed."""
    return UsageError(f"{name} is {reprlib.repr(value)}; give {allowed}.")


MODEL = File(
    "model",
    ("-m", "--model"),
    "Model",
    None,
    "A GGUF file or hf:USER/REPO[:FILE]; without it, a small default model is used.",
    "MODEL",
)
HF = Setting(
    "hf", ("-hf", "--hf"), "Model", None, "Model on Hugging Face; as MODEL hf:…", "USER/REPO[:FILE]", taker="command"
)
N_CTX = Whole("n_ctx", ("-c", "--ctx-size"), "Model", 0, "Context; 0: the model's, if memory allows.", high=MAX_TOKENS)
N_BATCH = Whole("n_batch", ("-b", "--batch-size"), "Model", 2048, "Tokens per logical batch.", low=1, high=MAX_TOKENS)
N_UBATCH = Whole(
    "n_ubatch", ("-ub", "--ubatch-size"), "Model", 512, "Tokens per physical batch.", low=1, high=MAX_TOKENS
)
N_THREADS = Whole("n_threads", ("-t", "--threads"), "Model", 0, "CPU threads; 0: physical cores.", high=MAX_THREADS)
N_GPU_LAYERS = Whole("n_gpu_layers", ("-ngl", "--n-gpu-layers"), "Model", 0, "Layers on the GPU.")
KERNELS = Choice(
    "kernels",
    ("--kernels",),
    "Model",
    "auto",
    "auto: page kernels, where the device that a layer's pages lie on has them, else stock operators; portable: stock "
    "operators everywhere, as a reference.",
    choices=("auto", "portable"),
)

POLICY = Setting(
    "policy",
    ("--policy",),
    "KV cache",
    "ladder",
    "Which tokens are kept; `kvlocal policies` lists them. With --kv the default is ada-snapkv: ladder stores each "
    "token as precisely as it is worth, and takes no --kv.",
    "NAME",
)
STORED_POLICY = "ada-snapkv"
"""The default of POLICY with --kv: the ladder says itself how tokens are stored."""
POLICY_ARGS = Pairs(
    "policy_args", ("--policy-arg",), "KV cache", None, "Set a parameter of the policy; may be repeated."
)
BUDGET = Size(
    "budget",
    ("--budget",),
    "KV cache",
    "2048",
    "How much is kept: 1024 (tokens per KV head and layer, on average), 25% (of the prompt) or 512MiB.",
)
KV = Setting(
    "storage",
    ("--kv",),
    "KV cache",
    "f16",
    "How what is kept is stored: f16, q8, q4, kv3, kv2 (16, 8.5, 4.5, 2.75 or 2.25 bits a value, but for sinks and the "
    "tail), kivi or logquant (3 bits; kivi:bits=4:group=64, logquant:quantizer=token).",
    "TYPE",
    "kv",
)
KV_TAIL = Whole("storage_tail", ("--kv-tail",), "KV cache", 128, "Latest tokens --kv leaves in f16.", keyword="kv_tail")
KV_SWA = Choice(
    "kv_swa",
    ("--kv-swa",),
    "KV cache",
    "f16",
    "How sliding windows are stored (Gemma 2 to 4, gpt-oss, others), which no budget changes.",
    choices=("f16", "q8"),
)
KV_SINK = Whole(
    "kv_sink", ("--kv-sink",), "KV cache", None, "First tokens that always stay: the policy's `sink`.", taker="command"
)
KV_WINDOW = Whole(
    "kv_window",
    ("--kv-window",),
    "KV cache",
    None,
    "Latest tokens that always stay: the policy's `window`.",
    taker="command",
)
RETRIEVE = Setting(
    "retrieve", ("--retrieve",), "KV cache", None, "Read a part of what is kept: sentencekv, quest or recent.", "NAME"
)
RETRIEVE_ARGS = Pairs(
    "retrieve_args", ("--retrieve-arg",), "KV cache", None, "Set a parameter of the retriever; may be repeated."
)
RETRIEVE_BUDGET = Whole(
    "retrieve_budget", ("--retrieve-budget",), "KV cache", 1024, "Tokens per head that a token reads.", low=1
)
PREFILL = Choice(
    "prefill",
    ("--prefill",),
    "KV cache",
    "exact",
    "exact: evict once, after the whole prompt; chunked: after every chunk, so that the peak is bounded.",
    choices=("exact", "chunked"),
)
CHUNK = Whole("chunk", ("--chunk",), "KV cache", 512, "Tokens per chunk of --prefill chunked.", low=1)
GUIDE = Whole(
    "guide",
    ("--guide",),
    "KV cache",
    0,
    "With --prefill chunked: the prompt's last N tokens (the question) decide what every chunk leaves.",
)
EVICT_EVERY = Whole(
    "evict_every",
    ("--evict-every",),
    "KV cache",
    32,
    "Tokens that a growing sequence may exceed the budget by until it is evicted again; 1: at every token.",
    low=1,
)

TEMP = Real(
    "temp",
    ("--temp",),
    "Sampling",
    0.8,
    "0: always the likeliest.",
    "T",
    noun="The temperature",
    high=100,
    taker="sampling",
)
TOP_K = Whole("top_k", ("--top-k",), "Sampling", 40, "Draw from the K likeliest; 0: from all.", taker="sampling")
TOP_P = Real("top_p", ("--top-p",), "Sampling", 0.95, "Nucleus; 1: off.", "P", above=True, taker="sampling")
MIN_P = Real("min_p", ("--min-p",), "Sampling", 0.05, "0: off.", "P", taker="sampling")
REPEAT_PENALTY = Real(
    "repeat_penalty",
    ("--repeat-penalty",),
    "Sampling",
    1.0,
    "1: off.",
    "X",
    noun="The repeat penalty",
    low=0.01,
    high=100,
    taker="sampling",
)
SEED = Whole(
    "seed",
    ("-s", "--seed"),
    "Sampling",
    -1,
    "The same seed gives the same text; -1: another one every time.",
    low=-1,
    high=MAX_SEED,
    taker="sampling",
)
IGNORE_EOS = Flag(
    "ignore_eos",
    ("--ignore-eos",),
    "Sampling",
    False,
    "Do not let the model end its answer before -n tokens.",
    taker="sampling",
)

N_PREDICT = Whole(
    "n_predict",
    ("-n", "--n-predict"),
    "Sampling",
    512,
    "Tokens to generate at most; -1: until the end of the context.",
    low=-1,
    taker="answer",
)
RAW = Flag(
    "raw",
    ("--no-chat-template",),
    "Prompt",
    False,
    "Continue the text as it is: no roles, no template.",
    taker="answer",
)
SYSTEM = Setting("system", ("-sys", "--system-prompt"), "Prompt", None, "System prompt.", "TEXT", taker="answer")

SETTINGS: tuple[Setting, ...] = (
    *(MODEL, HF, N_CTX, N_BATCH, N_UBATCH, N_THREADS, N_GPU_LAYERS, KERNELS),
    *(POLICY, POLICY_ARGS, BUDGET, KV, KV_TAIL, KV_SWA, KV_SINK, KV_WINDOW),
    *(RETRIEVE, RETRIEVE_ARGS, RETRIEVE_BUDGET, PREFILL, CHUNK, GUIDE, EVICT_EVERY),
    *(TEMP, TOP_K, TOP_P, MIN_P, REPEAT_PENALTY, SEED, IGNORE_EOS),
    *(N_PREDICT, RAW, SYSTEM),
)
"""All of them, in the order of the table."""
