"""Options that several commands share, as decorators, and the settings they are gathered into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import click
from click.core import ParameterSource

from kvlocal.errors import UsageError
from kvlocal_cli.options import completers, config_file, twins

DEFAULT_POLICY = "ladder"
STORED_POLICY = "ada-snapkv"
"""The default with --kv: the ladder says itself how tokens are stored."""
DEFAULT_BUDGET = "2048"

Callback = Callable[..., Any]
Decorator = Callable[[Callback], Callback]


@dataclass(frozen=True)
class Settings:
    """What an engine is opened with, as it was typed."""

    model: str | None = None
    policy: str = DEFAULT_POLICY
    policy_args: Mapping[str, str] = field(default_factory=dict)
    budget: str = DEFAULT_BUDGET
    n_ctx: int = 0
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int = 0
    n_gpu_layers: int = 0
    prefill: Literal["exact", "chunked"] = "exact"
    chunk: int = 512
    guide: int = 0
    storage: str = "f16"
    storage_tail: int = 128
    evict_every: int = 32


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn, as it was typed."""

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = -1
    ignore_eos: bool = False


class Whole(click.IntRange):
    name = "whole number"


class Real(click.FloatRange):
    name = "number"


class Size(click.types.StringParamType):
    """A budget; in a configuration file it may be a number."""

    name = "size"
    numbers = True


class GroupedOption(click.Option):
    """An option that names the section of the help page it is listed in."""

    def __init__(self, *args: Any, section: str = "Options", **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.section = section

    def consume_value(self, ctx: click.Context, opts: Any) -> tuple[Any, ParameterSource]:
        value, source = super().consume_value(ctx, opts)
        if self.name is not None:
            # some versions of click do so only once the value has been taken, which is too late to blame its source
            ctx.set_parameter_source(self.name, source)
        return value, source


class GroupedCommand(click.Command):
    """A command whose help page lists its options by section.

    A value that cannot be taken is blamed on the variable or on the file that it comes from.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            name = error.param.name if error.param is not None else None
            source = ctx.get_parameter_source(name) if name is not None else None
            if error.param is not None and source is ParameterSource.ENVIRONMENT:
                error.param_hint = str(error.param.envvar)
            elif name is not None and source is ParameterSource.DEFAULT_MAP:
                file: config_file.ConfigFile = ctx.meta[config_file.META]
                error.param_hint = file.hint(twins.path_of(ctx), name)
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            # Arguments are explained in the text above the options.
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def option(section: str, *names: str, **attrs: Any) -> Decorator:
    """`click.option` with a section; defaults are shown."""
    return click.option(*names, cls=GroupedOption, section=section, **{"show_default": True, **attrs})


def count(section: str, *names: str, default: int, minimum: int, help: str) -> Decorator:
    """An option that takes a whole number not below `minimum`."""
    return option(section, *names, type=Whole(min=minimum), default=default, metavar="N", help=help)


def stack(*decorators: Decorator) -> Decorator:
    def decorate(function: Callback) -> Callback:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_HF = option("Model", "-hf", "--hf", "hf", metavar="USER/REPO[:FILE]", help="Model on Hugging Face; as MODEL hf:…")
_MODEL = stack(click.argument("model", required=False, metavar="[MODEL]", shell_complete=completers.models), _HF)
_THREADS = stack(
    count("Model", "-t", "--threads", "n_threads", default=0, minimum=0, help="CPU threads; 0: physical cores."),
    count("Model", "-ngl", "--n-gpu-layers", "n_gpu_layers", default=0, minimum=0, help="Layers on the GPU."),
)
_CONTEXT = count(
    "Model", "-c", "--ctx-size", "n_ctx", default=0, minimum=0, help="Context; 0: the model's, if memory allows."
)
_BATCH = stack(
    count("Model", "-b", "--batch-size", "n_batch", default=2048, minimum=1, help="Tokens per logical batch."),
    count("Model", "-ub", "--ubatch-size", "n_ubatch", default=512, minimum=1, help="Tokens per physical batch."),
)
_POLICY_ARG = option(
    "KV cache",
    "--policy-arg",
    "policy_args",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a parameter of the policy; may be repeated.",
)
_CACHE = stack(
    option(
        "KV cache",
        "--policy",
        default=DEFAULT_POLICY,
        shell_complete=completers.policies,
        metavar="NAME",
        help=f"Which tokens are kept; `kvlocal policies` lists them. With --kv the default is {STORED_POLICY}: ladder "
        "stores each token as precisely as it is worth, and takes no --kv.",
    ),
    _POLICY_ARG,
    option(
        "KV cache",
        "--budget",
        type=Size(),
        default=DEFAULT_BUDGET,
        shell_complete=completers.budgets,
        metavar="SIZE",
        help="How much is kept: 1024 (tokens per KV head and layer, on average), 25% (of the prompt) or 512MiB.",
    ),
    option(
        "KV cache",
        "--kv",
        "storage",
        default="f16",
        shell_complete=completers.storages,
        metavar="TYPE",
        help="How what is kept is stored: f16, q8, q4, kv3, kv2 (16, 8.5, 4.5, 2.75 or 2.25 bits a value, but for "
        "sinks and the tail), kivi or logquant (3 bits; kivi:bits=4:group=64, logquant:quantizer=token).",
    ),
    count("KV cache", "--kv-tail", "storage_tail", default=128, minimum=0, help="Latest tokens --kv leaves in f16."),
    option(
        "KV cache",
        "--kv-sink",
        type=Whole(min=0),
        metavar="N",
        help="First tokens that always stay: the policy's `sink`.",
    ),
    option(
        "KV cache",
        "--kv-window",
        type=Whole(min=0),
        metavar="N",
        help="Latest tokens that always stay: the policy's `window`.",
    ),
    option(
        "KV cache",
        "--prefill",
        type=click.Choice(["exact", "chunked"]),
        default="exact",
        help="exact: evict once, after the whole prompt; chunked: after every chunk, so that the peak is bounded.",
    ),
    count("KV cache", "--chunk", default=512, minimum=1, help="Tokens per chunk of --prefill chunked."),
    count(
        "KV cache",
        "--guide",
        default=0,
        minimum=0,
        help="With --prefill chunked: the prompt's last N tokens (the question) decide what every chunk leaves.",
    ),
    count(
        "KV cache",
        "--evict-every",
        default=32,
        minimum=1,
        help="Tokens that a growing sequence may exceed the budget by until it is evicted again; 1: at every token.",
    ),
)
_SAMPLING = stack(
    option("Sampling", "--temp", type=Real(min=0), default=0.8, metavar="T", help="0: always the likeliest."),
    count("Sampling", "--top-k", default=40, minimum=0, help="Draw from the K likeliest; 0: from all."),
    option("Sampling", "--top-p", type=Real(0, 1, min_open=True), default=0.95, metavar="P", help="Nucleus; 1: off."),
    option("Sampling", "--min-p", type=Real(0, 1), default=0.05, metavar="P", help="0: off."),
    option(
        "Sampling",
        "--repeat-penalty",
        type=Real(min=0, min_open=True),
        default=1.0,
        metavar="X",
        help="1: off.",
    ),
    count(
        "Sampling",
        "-s",
        "--seed",
        default=-1,
        minimum=-1,
        help="The same seed gives the same text; -1: another one every time.",
    ),
    option("Sampling", "--ignore-eos", is_flag=True, help="Do not let the model end its answer before -n tokens."),
)


def model_options(command: Callback) -> Callback:
    """MODEL, -hf, threads and GPU layers, gathered into `settings`."""
    return stack(_MODEL, _THREADS)(_gather(command))


def engine_options(command: Callback) -> Callback:
    """Everything an engine is opened with, gathered into `settings`."""
    return stack(_MODEL, _CONTEXT, _BATCH, _THREADS, _CACHE)(_gather(command))


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
    model = option("Model", "-m", "--model", metavar="MODEL", help="Model; else MODEL, if it looks like one.")
    return stack(arguments, model, _HF, _CONTEXT, _BATCH, _THREADS, _CACHE)(split)


def sweep_options(command: Callback) -> Callback:
    """MODEL, -hf, threads, batches and --policy-arg, gathered into `settings`."""
    return stack(_POLICY_ARG, _MODEL, _BATCH, _THREADS)(_gather(command))


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
    return count(
        "Sampling",
        "-n",
        "--n-predict",
        "n_predict",
        default=default,
        minimum=-1,
        help="Tokens to generate at most; -1: until the end of the context.",
    )


def system_option(command: Callback) -> Callback:
    """-sys / --system-prompt."""
    return option("Prompt", "-sys", "--system-prompt", "system", metavar="TEXT", help="System prompt.")(command)


def _gather(command: Callback) -> Callback:
    names = set(Settings.__dataclass_fields__) - {"model", "policy_args"}

    @functools.wraps(command)
    def gather(**options: Any) -> Any:
        values = {name: options.pop(name) for name in names & options.keys()}
        model = pick_model(options.pop("model"), options.pop("hf"))
        chosen = click.get_current_context().get_parameter_source("policy") is not ParameterSource.DEFAULT
        if values.get("storage", "f16") != "f16" and not chosen:
            values["policy"] = STORED_POLICY
        sink, window = options.pop("kv_sink", None), options.pop("kv_window", None)
        args = parse_policy_args(options.pop("policy_args", ()), sink=sink, window=window)
        for name in ("chunk", "guide"):
            if values.get(name) and values["prefill"] != "chunked":
                check_chunked(name, f"--{name}")
                if name == "guide":
                    values[name] = 0
        return command(settings=Settings(model=model, policy_args=args, **values), **options)

    return gather


def check_chunked(name: str, flag: str) -> None:
    """Refuse what only a chunked prefill heeds; in a file it says what is to be if there is one."""
    if twins.asked_for(name):
        raise UsageError(f"{flag} has no effect without --prefill chunked; give both or neither.")


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
    args: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise UsageError(f"--policy-arg '{pair}' is not name=value, for example --policy-arg window=32.")
        if name in args:
            raise UsageError(f"--policy-arg sets '{name}' twice; give it once.")
        args[name] = value
    for name, number in (("sink", sink), ("window", window)):
        if number is None:
            continue
        if name in args and twins.overruled(f"kv_{name}", by="policy_args"):
            continue
        if name in args and not twins.overruled("policy_args", by=f"kv_{name}"):
            raise UsageError(f"--kv-{name} and --policy-arg {name}=… set the same parameter; give one of them.")
        args[name] = str(number)
    return args
