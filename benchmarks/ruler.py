"""RULER answers after eviction, for every policy and budget, at equal tokens held.

Each prompt is prefilled once; every policy and budget works on a branch of it (copy-on-write), so that a row costs one
prefill and a few short answers. Results are appended as they come, and a run goes on where it stopped.

    python benchmarks/ruler.py --rows 3 --budgets 50%,25% -o benchmarks/results/ruler.jsonl
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from common import greedy, model_path, parser, table

from kvlocal.budget import Budget
from kvlocal.context import Context, ContextConfig
from kvlocal.evict import evict
from kvlocal.model import Model
from kvlocal.policies import make_policy

# what RULER itself allows an answer, tokens
ANSWER = {"niah": 128, "vt": 30, "qa": 32}


def score(answer: str, outputs: list[str]) -> float:
    """Share of the expected strings that appear in the answer, in any case."""
    return sum(o.lower() in answer.lower() for o in outputs) / len(outputs)


def run_row(context: Context, row: dict[str, Any], task: str, combos: list[tuple[str, str]]) -> list[dict[str, Any]]:
    cache = context.cache
    assert cache is not None
    tokens = context.model.chat_tokens([{"role": "user", "content": row["input"]}])
    context.truncate(0, 0)
    start = time.perf_counter()
    for i in range(0, len(tokens), 512):
        context.decode(tokens[i : i + 512], i, 0)
    prefill_s = time.perf_counter() - start
    first = int(context.logits()[0].argmax())
    n_answer = next(n for prefix, n in ANSWER.items() if task.startswith(prefix))
    results = []
    for policy_name, budget_text in combos:
        context.branch(0, 1)
        start = time.perf_counter()
        if policy_name != "full":
            policy = make_policy(policy_name)
            budget = Budget.parse(budget_text).tokens(len(tokens), cache.bytes_per_token, policy.min_budget)
            evict(cache, 1, policy, budget)
        stats = cache.seq_stats(1)
        evict_s = time.perf_counter() - start
        answer = context.model.detokenize(greedy(context, 1, first, n_answer))
        context.truncate(1, 0)
        results.append(
            {
                "policy": policy_name,
                "budget": budget_text,
                "prompt": len(tokens),
                "held": stats.n_slots / stats.n_heads / len(tokens),
                "score": score(answer, row["outputs"]),
                "answer": answer,
                "prefill_s": prefill_s,
                "evict_s": evict_s,
            }
        )
    return results


def read_results(path: Path) -> list[dict[str, Any]]:
    """Complete lines of an earlier run; a line cut short by an interruption is dropped."""
    out = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return out


def report(results: list[dict[str, Any]]) -> str:
    tasks = sorted({r["task"] for r in results})
    combos = list(dict.fromkeys((r["policy"], r["budget"]) for r in results))
    rows = []
    for policy, budget in combos:
        mine = [r for r in results if (r["policy"], r["budget"]) == (policy, budget)]
        held = sum(r["held"] for r in mine) / len(mine)
        means = []
        for task in tasks:
            scores = [r["score"] for r in mine if r["task"] == task]
            means.append(sum(scores) / len(scores) if scores else float("nan"))
        mean = sum(means) / len(means)
        rows.append([policy, budget, f"{held:.1%}", *(f"{m:.2f}" for m in means), f"**{mean:.3f}**"])
    n = len({(r["task"], r["row"]) for r in results})
    return f"{n} prompts\n\n" + table(["policy", "budget", "held", *tasks, "mean"], rows)


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--rows", type=int, default=3, help="rows per task")
    p.add_argument("--policies", default="streaming,snapkv,pyramidkv,ada-snapkv,ada-pyramid")
    p.add_argument("--budgets", default="50%,25%")
    args = p.parse_args()
    out = args.output or Path("ruler.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    combos = [("full", "100%")] + [(p, b) for b in args.budgets.split(",") for p in args.policies.split(",")]
    results = read_results(out)
    done = {(r["task"], r["row"]) for r in results}
    model = Model(model_path(args))
    config = ContextConfig(n_ctx=8192, n_threads=args.threads, n_seq_max=2)
    with Context(model, config) as context, out.open("a") as file:
        for path in sorted((args.data / "ruler-4096").glob("*.jsonl")):
            lines = path.read_text().splitlines()[: args.rows]
            for i, line in enumerate(lines):
                if (path.stem, i) in done:
                    continue
                got = run_row(context, json.loads(line), path.stem, combos)
                got = [{"task": path.stem, "row": i} | r for r in got]
                # one write per prompt: an interrupted run has all of a prompt or nothing
                file.write("".join(json.dumps(r) + "\n" for r in got))
                file.flush()
                results += got
                print(f"{path.stem} {i}: prefill {got[0]['prefill_s']:.1f} s", flush=True)
    print("\n" + report(results))


if __name__ == "__main__":
    main()
