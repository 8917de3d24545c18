"""What the ladder costs at the end of a prompt: its decision, and carrying it out, beside reading the prompt.

python benchmarks/ladder_cost.py --prompt 8192 --budget 25%
"""

from __future__ import annotations

import statistics
import time

from common import command, model_path, parser, write_json
from performance import fill

from kvlocal.engine.evictor import evict
from kvlocal.engine.sequence import Sequence
from kvlocal.engine.view import cache_view
from kvlocal.measure.bench import random_tokens
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--prompt", type=int, default=8192)
    p.add_argument("--budget", default="25%")
    p.add_argument("-r", "--rounds", type=int, default=5)
    args = p.parse_args()
    model = Model(model_path(args))
    policy = make_policy("ladder")
    config = ContextConfig(
        args.prompt + 64,
        n_threads=args.threads,
        n_seq_max=2,
        n_window=policy.n_window,
        formats=policy.formats,
        rotate=True,
    )
    decide_s, whole_s = [], []
    with Context(model, config) as context:
        cache = context.cache
        assert cache is not None
        prompt_s = fill(context, random_tokens(model, args.prompt), 0, args.prompt)
        budget = Budget.parse(args.budget).tokens(args.prompt, cache.bytes_per_token, policy.min_budget)
        for i in range(args.rounds + 1):
            context.branch(0, 1)
            sequence = Sequence.adopt(context, 1)
            start = time.perf_counter()
            list(policy.decide(cache_view(sequence, policy, budget)))
            decided = time.perf_counter()
            evict(sequence, policy, budget)
            if i > 0:  # the first warms up
                decide_s.append(decided - start)
                whole_s.append(time.perf_counter() - decided)
            context.truncate(1, 0)
    results = {
        "command": command(p, args, "ladder_cost"),
        "prompt": args.prompt,
        "budget": args.budget,
        "prompt_s": prompt_s,
        "decide_s": statistics.median(decide_s),
        "evict_s": statistics.median(whole_s),
    }
    print(
        f"{model.name}, {args.threads} threads: {args.prompt} tokens read in {prompt_s:.1f} s; the decision takes "
        f"{results['decide_s']:.3f} s, {results['decide_s'] / prompt_s:.1%}; the eviction with it "
        f"{results['evict_s']:.3f} s, {results['evict_s'] / prompt_s:.1%}"
    )
    write_json(args, results)
    model.close()


if __name__ == "__main__":
    main()
