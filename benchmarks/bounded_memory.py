"""What the cache takes of models with recurrent layers and with sliding windows, in the shapes of known ones.

The models are random, with some of the layers of known ones and their heads and states; the run is rehearsed, as for
`kvlocal plan`: pages are taken and given back, nothing is computed (test_bounded_engine.py compares both).

    python benchmarks/bounded_memory.py --context 32768
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, command, parser, write_json

from kvlocal.engine.config import EngineConfig
from kvlocal.measure.code import commit
from kvlocal.measure.plan import Planner
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget

sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from anymodel import make, save_file
from arch_table import Arch

SMALL = {"context_length": 1 << 17, "embedding_length": 64, "feed_forward_length": 64, "attention.head_count": 16}
HEADS = {"attention.key_length": 256, "attention.value_length": 256}
MODELS = {
    "Qwen3.5-9B, 4 of 32 layers": Arch("qwen35", "hybrid", metadata=SMALL | HEADS | {
        "block_count": 4, "full_attention_interval": 4, "attention.head_count_kv": 4, "rope.dimension_count": 64,
        "rope.dimension_sections": [11, 11, 10, 0], "ssm.state_size": 128, "ssm.group_count": 16,
        "ssm.time_step_rank": 32, "ssm.inner_size": 4096,
    }),
    "Gemma 3 12B, 6 of 48 layers": Arch("gemma3", "window", metadata=SMALL | HEADS | {
        "block_count": 6, "attention.head_count_kv": 8, "attention.sliding_window": 1024,
    }),
}  # fmt: skip
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("full", "100%", {}),
    ("ladder", "25%", {}),
    ("ladder", "25%", {"kv_swa": "q8"}),
    ("ada-snapkv", "25%", {}),
]


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--context", type=int, default=32768)
    args = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, arch in MODELS.items():
            model = make(arch, Path(folder) / "metadata.gguf")
            path = save_file(model, Path(folder) / f"{arch.name}.gguf")
            model.close()
            for policy, budget, settings in RUNS:
                config = EngineConfig(path, make_policy(policy), Budget.parse(budget), n_ctx=args.context, **settings)
                with Planner(path, free_bytes=1 << 40) as planner:
                    kv = planner.need(config, args.context - 64, 32).kv
                row = {"model": name, "policy": f"{policy} {budget}", "windows": settings.get("kv_swa", "f16")}
                sizes = {"in use": kv.used_bytes, "llama.cpp's own": kv.full_bytes, "peak": kv.peak_bytes}
                rows.append(row | {f"{size}, MiB": round(n / 2**20, 1) for size, n in sizes.items()})
    print(f"{command(p, args, 'bounded_memory')} at {commit()}")
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for line in rows:
        print(f"| {' | '.join(map(str, line.values()))} |")
    write_json(args, rows)


if __name__ == "__main__":
    main()
