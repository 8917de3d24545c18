"""How close the paged cache with nothing evicted is to stock llama.cpp, on real text.

Reads the beginning of a text and compares the logits of its last positions with the stock cache in f32 without flash
attention, beside what the stock f16 cache with flash attention shows against the same reference.

    python benchmarks/agreement.py --text Doyle_Hound_1902.txt --context 3000 --positions 1000
"""

from __future__ import annotations

import numpy as np
from common import kl_divergence, model_path, parser, table, write_json

from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model

VARIANTS = {
    "reference": {"paged": False, "type_kv": "f32", "flash_attn": False},
    "stock f16, flash attention": {"paged": False},
    "paged, nothing evicted": {"paged": True},
}


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--text", default="Doyle_Hound_1902.txt", help="file below <data>/text")
    p.add_argument("--context", type=int, default=3000, help="tokens read")
    p.add_argument("--positions", type=int, default=1000, help="how many of the last are compared")
    p.add_argument("-ub", "--ubatch", type=int, default=512)
    args = p.parse_args()
    model = Model(model_path(args))
    text = (args.data / "text" / args.text).read_text()
    tokens = model.tokenize(text[: args.context * 12])[: args.context]
    first = args.context - args.positions
    logits: dict[str, np.ndarray] = {}
    for name, config in VARIANTS.items():
        with Context(
            model,
            ContextConfig(
                n_ctx=args.context + 64,
                n_threads=args.threads,
                n_ubatch=args.ubatch,
                n_outputs=args.ubatch,
                **config,  # type: ignore[arg-type]
            ),
        ) as context:
            rows = []
            for i in range(0, args.context, args.ubatch):
                part = tokens[i : i + args.ubatch]
                context.decode(part, i, 0, outputs="all" if i + len(part) > first else "last")
                if i + len(part) > first:
                    rows.append(context.logits(len(part)))
            logits[name] = np.concatenate(rows)[-args.positions :]
    reference = logits["reference"]
    results = []
    for name in list(VARIANTS)[1:]:
        kl = kl_divergence(reference, logits[name])
        agree = float((reference.argmax(-1) == logits[name].argmax(-1)).mean())
        results.append({"variant": name, "kl": float(kl.mean()), "kl_max": float(kl.max()), "top1": agree})
    print(f"{model.name}, {args.text}, positions {first}..{args.context}, -ub {args.ubatch}\n")
    rows_md = [[r["variant"], f"{r['kl']:.5f}", f"{r['kl_max']:.4f}", f"{r['top1']:.1%}"] for r in results]
    print(table(["against stock f32 without flash attention", "KL mean", "KL max", "arg-max equal"], rows_md))
    print(f"\nratio of the means: {results[1]['kl'] / results[0]['kl']:.2f}")
    write_json(args, results)


if __name__ == "__main__":
    main()
