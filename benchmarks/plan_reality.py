"""What `kvlocal plan` says that a run takes, and what the run then takes.

Every setting is planned, from the model's file without its weights, and then run: a text is read and some tokens are
generated. Weights and compute buffers of the run are those of its context, bytes of the cache those of its pools.

    python benchmarks/plan_reality.py                     # a minute on two cores
    python benchmarks/plan_reality.py --tokens 4000 -c 8192
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from common import ROOT, command, model_path, parser, table, write_json

from kvlocal.engine.config import EngineConfig
from kvlocal.engine.engine import Engine
from kvlocal.measure.plan import Planner
from kvlocal.native.sampling import Sampling
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import Storage

MIB = 1 << 20
CHUNK = 256
DOCUMENT = ROOT / "demo" / "expedition-log.txt"


@dataclass(frozen=True)
class Setting:
    policy: str
    budget: str = "100%"
    storage: str = "f16"
    prefill: Any = "exact"

    @property
    def label(self) -> str:
        words = [self.policy if self.policy == "full" else f"{self.policy} --budget {self.budget}"]
        words += [f"--kv {self.storage}"] if self.storage != "f16" else []
        words += ["--prefill chunked"] if self.prefill != "exact" else []
        return f"`{' '.join(words)}`"


SETTINGS = [
    Setting("full"),
    Setting("ladder", "256"),
    Setting("ada-snapkv", "25%"),
    Setting("ada-snapkv", "256", "q4"),
    Setting("streaming", "256", prefill="chunked"),
    Setting("full", storage="kv3"),
    Setting("full", storage="kv3", prefill="chunked"),
]
FIGURES = ("weights", "KV used", "KV peak", "compute")


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("-c", "--ctx-size", dest="n_ctx", type=int, default=2048)
    p.add_argument("--tokens", dest="n_tokens", type=int, default=1000, help="tokens of the prompt")
    p.add_argument("--generate", dest="n_generate", type=int, default=40)
    args = p.parse_args()
    results = []
    for setting in SETTINGS:
        config = EngineConfig(
            model_path(args),
            make_policy(setting.policy),
            Budget.parse(setting.budget),
            n_ctx=args.n_ctx,
            n_threads=args.threads,
            prefill=setting.prefill,
            chunk=CHUNK,
            storage=Storage.parse(setting.storage),
        )
        planned, real = plan(config, args.n_tokens, args.n_generate), run(config, args.n_tokens, args.n_generate)
        results.append({**asdict(setting), "label": setting.label, "plan": planned, "real": real})
    found = {
        "command": command(p, args, "plan_reality"),
        "what": f"A prompt of {args.n_tokens} tokens, {args.n_generate} generated, a context of {args.n_ctx}; MiB.",
        "rows": results,
    }
    print(show(found))
    write_json(args, found)


def show(found: dict[str, Any]) -> str:
    rows = []
    for result in found["rows"]:
        for name in FIGURES:
            planned, real = result["plan"][name], result["real"][name]
            cells = [f"{planned / MIB:.2f}", f"{real / MIB:.2f}", f"{planned / real - 1:+.2%}"]
            rows.append([result["label"] if name == FIGURES[0] else "", name, *cells])
    return found["what"] + "\n\n" + table(["setting", "", "plan", "real", "difference"], rows)


def plan(config: EngineConfig, n_tokens: int, n_generate: int) -> dict[str, int]:
    with Planner(config.model) as planner:
        need = planner.need(config, n_tokens, n_generate)
    return dict(
        zip(FIGURES, (need.weights_bytes, need.kv.used_bytes, need.kv.peak_bytes, need.compute_bytes), strict=True)
    )


def run(config: EngineConfig, n_tokens: int, n_generate: int) -> dict[str, int]:
    with Engine(config) as engine:
        engine.prefill(engine.tokenize(DOCUMENT.read_text("utf-8"))[:n_tokens])
        "".join(engine.generate(n_generate, Sampling(temp=0, ignore_eos=True)))
        kv, buffers = engine.report().kv, engine.context.breakdown()
    figures = (int(buffers.model_bytes), kv.used_bytes, kv.peak_bytes, int(buffers.compute_bytes))
    return dict(zip(FIGURES, figures, strict=True))


if __name__ == "__main__":
    main()
