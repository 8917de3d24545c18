"""What eviction gives back: bytes in the pools and resident memory of the process, one run per process.

python benchmarks/memory.py                                   # one RULER-4k prompt, 25 %
python benchmarks/memory.py --text Doyle_Hound_1902.txt --tokens 7000 --prefill chunked --chunk 512 --budget 512
"""

from __future__ import annotations

import json

from common import model_path, parser, write_json

from kvlocal.engine.engine import Engine, EngineConfig
from kvlocal.native.sampling import Sampling
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget

MIB = 1 << 20


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--text", help="file below <data>/text; without it the first row of RULER niah_single_2")
    p.add_argument("--tokens", type=int, default=0, help="tokens of the text (0: all of a RULER row)")
    p.add_argument("--policy", default="ada-snapkv")
    p.add_argument("--budget", default="25%")
    p.add_argument("--prefill", default="exact", choices=["exact", "chunked"])
    p.add_argument("--chunk", type=int, default=512)
    args = p.parse_args()
    config = EngineConfig(
        model_path(args),
        make_policy(args.policy),
        Budget.parse(args.budget),
        n_threads=args.threads,
        prefill=args.prefill,
        chunk=args.chunk,
    )
    with Engine(config) as engine:
        if args.text:
            text = (args.data / "text" / args.text).read_text()
            tokens = engine.tokenize(text[: args.tokens * 12])[: args.tokens]
        else:
            row = json.loads((args.data / "ruler-4096" / "niah_single_2.jsonl").read_text().splitlines()[0])
            tokens = engine.chat_tokens([{"role": "user", "content": row["input"]}])
        engine.prefill(tokens)
        at_evict = engine.report().kv
        "".join(engine.generate(8, Sampling(temp=0)))
        assert engine.cache is not None
        per_token = engine.cache.bytes_per_token
        report = engine.report()
    kv, rss = report.kv, report.rss
    print(
        f"{report.model}, {len(tokens)} tokens, --policy {args.policy} --budget {args.budget} --prefill {args.prefill}"
    )
    print(f"used {kv.used_bytes / MIB:.1f} MiB of {kv.full_bytes / MIB:.1f} MiB: {kv.used_bytes / kv.full_bytes:.3f}")
    print(f"peak {kv.peak_bytes / MIB:.1f} MiB: what {kv.peak_bytes / per_token:.0f} tokens per head take")
    evicted = at_evict.full_bytes - at_evict.used_bytes
    if rss.before_evict_bytes is not None and rss.after_evict_bytes is not None and args.prefill == "exact":
        fell = rss.before_evict_bytes - rss.after_evict_bytes
        print(f"evicted {evicted / MIB:.1f} MiB, resident memory fell by {fell / MIB:.1f} MiB: {fell / evicted:.2f}")
    print(f"prefill {report.timing.prefill_s:.1f} s, eviction {report.timing.evict_s:.3f} s")
    write_json(args, [report.as_dict()])


if __name__ == "__main__":
    main()
