"""Options that several commands share, as decorators, and the settings they are gathered into."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import click
from click.core import ParameterSource

from kvlocal import settings
from kvlocal.errors import UsageError
from kvlocal.setting import MAX_SEQUENCES
from kvlocal_cli.options import completers, twins
from kvlocal_cli.options.click_types import Whole
from kvlocal_cli.options.option import Callback, Decorator, declared, declared_list, option, stack


@dataclass(frozen=True)
class Settings:
    """What an engine is opened with, as it was typed.

    Attributes:
        policy_typed: the policy stands on the command line; only then may its module lie in the working directory. A
            variable or a file may be somebody else's.
    """

    model: str | None = None
    policy: str = settings.POLICY.default
    policy_args: Mapping[str, str] = field(default_factory=dict)
    budget: str = settings.BUDGET.default
    n_ctx: int = settings.N_CTX.default
    n_batch: int = settings.N_BATCH.default
    n_ubatch: int = settings.N_UBATCH.default
    n_threads: int = settings.N_THREADS.default
    n_gpu_layers: int = settings.N_GPU_LAYERS.default
    kernels: Literal["auto", "portable"] = settings.KERNELS.default
    prefill: Literal["exact", "chunked"] = settings.PREFILL.default
    chunk: int = settings.CHUNK.default
    guide: int = settings.GUIDE.default
    storage: str = settings.KV.default
    storage_tail: int = settings.KV_TAIL.default
    kv_swa: Literal["f16", "q8"] = settings.KV_SWA.default
    retrieve: str | None = settings.RETRIEVE.default
    retrieve_args: Mapping[str, str] = field(default_factory=dict)
    retrieve_budget: int = settings.RETRIEVE_BUDGET.default
    archive: str = settings.ARCHIVE.default
    archive_format: Literal["f16", "q8"] = settings.ARCHIVE_FORMAT.default
    recall: Literal["turn", "step", "off"] | None = settings.RECALL.default
    recall_budget: int = settings.RECALL_BUDGET.default
    evict_every: int = settings.EVICT_EVERY.default
    policy_typed: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn, as it was typed."""

    temp: float = settings.TEMP.default
    top_k: int = settings.TOP_K.default
    top_p: float = settings.TOP_P.default
    min_p: float = settings.MIN_P.default
    repeat_penalty: float = settings.REPEAT_PENALTY.default
    seed: int = settings.SEED.default
    ignore_eos: bool = settings.IGNORE_EOS.default


_HF = declared(settings.HF)
_MODEL = stack(click.argument("model", required=False, metavar="[MODEL]", shell_complete=completers.models), _HF)
_THREADS = stack(declared(settings.N_THREADS), declared(settings.N_GPU_LAYERS))
_COMPUTE = stack(_THREADS, declared(settings.KERNELS))
_BATCH = stack(declared(settings.N_BATCH), declared(settings.N_UBATCH))
_POLICY_ARG = declared(settings.POLICY_ARGS)
_CACHE = stack(
    declared(settings.POLICY, shell_complete=completers.policies),
    _POLICY_ARG,
    declared(settings.BUDGET, shell_complete=completers.budgets),
    declared(settings.KV, shell_complete=completers.storages),
    *map(declared, (settings.KV_TAIL, settings.KV_SWA, settings.KV_SINK, settings.KV_WINDOW)),
    declared(settings.RETRIEVE, shell_complete=completers.retrievers),
    *map(declared, (settings.RETRIEVE_ARGS, settings.RETRIEVE_BUDGET)),
    *map(declared, (settings.ARCHIVE, settings.ARCHIVE_FORMAT, settings.RECALL, settings.RECALL_BUDGET)),
    *map(declared, (settings.PREFILL, settings.CHUNK, settings.GUIDE, settings.EVICT_EVERY)),
)
_ENGINE = stack(declared(settings.N_CTX), _BATCH, _COMPUTE, _CACHE)
_SAMPLING = stack(*(declared(setting) for setting in settings.SETTINGS if setting.taker == "sampling"))


def model_options(command: Callback) -> Callback:
    """MODEL, -hf, threads, GPU layers and kernels, gathered into `settings`."""
    return stack(_MODEL, _COMPUTE)(_gather(command))


def demo_options(command: Callback) -> Callback:
    """As :func:`model_options` without kernels: the demo's policy needs them."""
    return stack(_MODEL, _THREADS)(_gather(command))


def engine_options(command: Callback) -> Callback:
    """Everything an engine is opened with, gathered into `settings`."""
    return stack(_MODEL, _ENGINE)(_gather(command))


def inputs_options(command: Callback) -> Callback:
    """As :func:`engine_options`; MODEL is the first of INPUTS if it looks like one, the others are `inputs`."""
    gathered = _gather(command)

    @functools.wraps(command)
    def split(**options: Any) -> Any:
        inputs, first = options.pop("inputs"), ""
        if inputs and (inputs[0].startswith("hf:") or inputs[0].lower().endswith(".gguf")):
            first, *inputs = inputs
            for other in ("model", "hf"):
                if click.get_current_context().get_parameter_source(other) is ParameterSource.COMMANDLINE:
                    raise UsageError(
                        f"two models are named, MODEL '{first}' and --{other} '{options[other]}'; give one."
                    )
            options |= {"model": first, "hf": None}
        return gathered(inputs=tuple(inputs), **options)

    arguments = click.argument("inputs", nargs=-1, metavar="[MODEL] INPUTS...")
    model = declared(settings.MODEL, help="Model; else MODEL, if it looks like one.")
    return stack(arguments, model, _HF, _ENGINE)(split)


def sweep_options(command: Callback) -> Callback:
    """MODEL, -hf, threads, GPU layers, kernels, batches and --policy-arg, gathered into `settings`."""
    return stack(_POLICY_ARG, _MODEL, _BATCH, _COMPUTE)(_gather(command))


def retrieve_lists(command: Callback) -> Callback:
    """--retrieve and --retrieve-budget as lists, `retrieves` and `retrieve_budgets`, and --retrieve-arg."""
    names = declared_list(
        settings.RETRIEVE,
        "retrieves",
        "none",
        shell_complete=completers.retrievers,
        help="Which part of what is kept a token reads: none (all of it), attention, sentencekv, quest or recent.",
    )
    budgets = declared_list(settings.RETRIEVE_BUDGET, "retrieve_budgets", "1024")
    return stack(names, budgets, declared(settings.RETRIEVE_ARGS))(command)


def sampling_options(command: Callback) -> Callback:
    """Everything about drawing tokens, gathered into `sampling`."""
    names = SamplingSettings.__dataclass_fields__

    @functools.wraps(command)
    def gather(**options: Any) -> Any:
        sampling = SamplingSettings(**{name: options.pop(name) for name in names})
        return command(sampling=sampling, **options)

    return _SAMPLING(gather)


def predict_option(default: int) -> Decorator:
    """-n / --n-predict."""
    return declared(settings.N_PREDICT, default=default)


def parallel_option(default: int, help: str, section: str = "Run") -> Decorator:
    """--parallel: sequences in one cache, beside the one that holds what they share."""
    most = Whole(min=1, max=MAX_SEQUENCES - 1)
    return option(section, "--parallel", type=most, default=default, metavar="N", help=help)


def n_prompt_option(section: str, help: str, **attrs: Any) -> Decorator:
    """-p / --n-prompt, in tokens."""
    return option(section, "-p", "--n-prompt", "n_prompt", type=Whole(min=0), metavar="N", help=help, **attrs)


def system_option(command: Callback) -> Callback:
    """-sys / --system-prompt."""
    return declared(settings.SYSTEM)(command)


def stats_option(command: Callback) -> Callback:
    """--stats / --no-stats."""
    return option(
        "Output",
        "--stats/--no-stats",
        default=True,
        help="Show what is measured: live below the answer, on a terminal, and in one line after it.",
    )(command)


def _gather(command: Callback) -> Callback:
    names = set(Settings.__dataclass_fields__) - {"model", "policy_args", "retrieve_args", "policy_typed"}

    @functools.wraps(command)
    def gather(**options: Any) -> Any:
        values = {name: options.pop(name) for name in names & options.keys()}
        model = pick_model(options.pop("model"), options.pop("hf"))
        source = click.get_current_context().get_parameter_source
        if values.get("storage", "f16") != "f16" and source("policy") is ParameterSource.DEFAULT:
            values["policy"] = settings.STORED_POLICY
        typed = ParameterSource.COMMANDLINE in (source("policy"), source("policies"))
        sink, window = options.pop("kv_sink", None), options.pop("kv_window", None)
        args = parse_policy_args(options.pop("policy_args", ()), sink=sink, window=window)
        read = parse_pairs("--retrieve-arg", options.pop("retrieve_args", ()), "sink=32")
        # a policy may have a retriever of its own, which is not known here
        if "retrieve" in values and not values["retrieve"] and source("policy") is ParameterSource.DEFAULT:
            check_retrieved()
        if "archive" in values:
            check_archived(values["archive"])
        for name in ("chunk", "guide"):
            if values.get(name) and values["prefill"] != "chunked":
                check_chunked(name, f"--{name}")
                if name == "guide":
                    values[name] = 0
        return command(
            settings=Settings(model=model, policy_args=args, retrieve_args=read, policy_typed=typed, **values),
            **options,
        )

    return gather


def check_chunked(name: str, flag: str) -> None:
    """Refuse what only a chunked prefill heeds; in a file it says what is to be if there is one."""
    if twins.asked_for(name):
        raise UsageError(f"{flag} has no effect without --prefill chunked; give both or neither.")


def check_archived(where: str) -> None:
    """Refuse what only an archive heeds; in a file it says what is to be if there is one."""
    if where == "off" and any(map(twins.asked_for, ("recall_budget", "recall_budgets", "archive_format"))):
        raise UsageError("--recall-budget and --archive-format have no effect without --archive; give it as well.")


def check_retrieved() -> None:
    """Refuse what only a retriever heeds; in a file it says what is to be if there is one."""
    if any(map(twins.asked_for, ("retrieve_args", "retrieve_budget", "retrieve_budgets"))):
        raise UsageError(
            "--retrieve-arg and --retrieve-budget have no effect without --retrieve NAME; give it as well."
        )


def pick_model(model: str | None, hf: str | None) -> str | None:
    """The model to resolve: MODEL, or `hf:` and the value of -hf; None is the default model.

    Of two, the one nearer to the command line.
    """
    if hf is None or (model is not None and twins.overruled("hf", by="model")):
        return model
    if model is not None and not twins.overruled("model", by="hf"):
        raise UsageError(f"two models are named, MODEL '{model}' and -hf '{hf}'; give one of them.")
    return hf if hf.startswith("hf:") else f"hf:{hf}"


def parse_policy_args(pairs: tuple[str, ...], *, sink: int | None, window: int | None) -> dict[str, str]:
    """`name=value` pairs as a dict; --kv-sink and --kv-window are other spellings of two of them.

    Of two spellings, the one nearer to the command line.
    """
    args = parse_pairs("--policy-arg", pairs, "window=32")
    for name, number in (("sink", sink), ("window", window)):
        if number is None:
            continue
        if name in args and twins.overruled(f"kv_{name}", by="policy_args"):
            continue
        if name in args and not twins.overruled("policy_args", by=f"kv_{name}"):
            raise UsageError(f"--kv-{name} and --policy-arg {name}=… set the same parameter; give one of them.")
        args[name] = str(number)
    return args


def parse_pairs(flag: str, pairs: tuple[str, ...], example: str) -> dict[str, str]:
    """`name=value` pairs of an option as a dict."""
    args: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise UsageError(f"{flag} '{pair}' is not name=value, for example {flag} {example}.")
        if name in args:
            raise UsageError(f"{flag} sets '{name}' twice; give it once.")
        args[name] = value
    return args
