"""What decoding several documents together gains, and how long an answer waits while a long prompt is read.

python benchmarks/batch_throughput.py                       # 40 articles, four runs: ten minutes
python benchmarks/batch_throughput.py --articles 4 -n 16    # to see that it runs
"""

from __future__ import annotations

import json
import time
from typing import Any

from common import command, model_path, parser, table, write_json

from kvlocal.batch.batch import Batch, Step, batch_config
from kvlocal.batch.documents import Document
from kvlocal.batch.prompt import Prompt
from kvlocal.engine.config import EngineConfig
from kvlocal.engine.engine import Engine
from kvlocal.engine.scheduler import Job, Scheduler
from kvlocal.engine.stepper import Plain
from kvlocal.native.model import Model
from kvlocal.native.sampling import Sampling
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget

INSTRUCTION = "Summarize the following text in a few sentences."


def measure(args: Any, documents: list[Document], policy: str, parallel: int) -> dict[str, Any]:
    config = EngineConfig(
        model=model_path(args),
        policy=make_policy(policy),
        budget=Budget.parse("100%" if policy == "full" else args.budget),
        n_threads=args.threads,
    )
    prompt = Prompt(None, INSTRUCTION)
    model = Model(config.model)
    config = batch_config(config, model, prompt, documents, args.n, parallel)
    last: Step | None = None

    def on_step(step: Step) -> None:
        nonlocal last
        last = step

    with Engine(config, model) as engine:
        start = time.perf_counter()
        # every answer has the same length, so that the runs do the same work
        results = list(Batch(engine, prompt, args.n, Sampling(temp=0, ignore_eos=True)).run(documents, on_step))
        seconds = time.perf_counter() - start
    assert last is not None and all(result.error is None for result in results)
    return {
        "policy": policy,
        "parallel": parallel,
        "seconds": seconds,
        "documents_per_hour": 3600 * len(results) / seconds,
        "prompt_tokens": last.prompt,
        "generated": last.generated,
        "peak_bytes": last.peak_bytes,
        "used_bytes_per_document": sum(result.kv["used_bytes"] for result in results) / len(results),
        "prefill_s": sum(result.timing["prefill_s"] + result.timing["evict_s"] for result in results),
    }


def wait(args: Any, articles: list[str], policy: str) -> dict[str, Any]:
    """The longest time between two tokens of an answer while a prompt of ``args.long`` tokens is read beside it, and
    what reading that prompt and one piece of it takes."""
    config = EngineConfig(
        model=model_path(args),
        policy=make_policy(policy),
        budget=Budget.parse("100%" if policy == "full" else args.budget),
        n_ctx=args.long + 512,
        n_threads=args.threads,
        n_seq_max=2,
        n_pool=2 * (args.long + 512),
    )
    with Engine(config) as engine:
        model = engine.model
        scheduler = Scheduler(model, engine.reader, engine.evictor, engine.sequences[::-1])
        options = Sampling(temp=0, ignore_eos=True)
        long = model.tokenize(" ".join(articles))[: args.long]
        short = model.tokenize(articles[0])[:200]
        one, two = (Job(tokens, Plain(options, model.n_vocab, model.end_tokens)) for tokens in (short, long))
        scheduler.add(one)
        while one.n_generated < 8:
            scheduler.step()
        scheduler.add(two)
        waits, pieces = [], []
        while not two.first:
            start, said, read = time.perf_counter(), one.n_generated, two.read_s + two.evict_s
            while one.n_generated == said and not two.first:
                scheduler.step()
            waits.append(time.perf_counter() - start)
            pieces.append(two.read_s + two.evict_s - read)
        found = {
            "policy": policy,
            "prompt": len(long),
            "prompt_s": two.read_s + two.evict_s,
            "wait_s": max(waits),
            "piece_s": max(pieces),
        }
        for job in (one, two):
            scheduler.retire(job)
    return found


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--long", type=int, default=4096, help="tokens of the prompt that is read beside an answer")
    p.add_argument("--articles", type=int, default=40)
    p.add_argument("-n", type=int, default=96, help="tokens per answer")
    p.add_argument("--budget", default="256")
    p.add_argument("--parallel", default="1,4", help="how many at a time, comma-separated")
    args = p.parse_args()
    lines = (args.data / "summarization" / "cnn_dailymail.jsonl").read_text("utf-8").splitlines()[: args.articles]
    rows = [json.loads(line) for line in lines]
    documents = [Document(row["id"], f"cnn_dailymail.jsonl:{i}", row["article"]) for i, row in enumerate(rows, 1)]
    found = []
    for policy in ("full", "ada-snapkv"):
        for parallel in map(int, args.parallel.split(",")):
            found.append(measure(args, documents, policy, parallel))
            print(time.strftime("%H:%M:%S"), policy, parallel, f"{found[-1]['seconds']:.0f} s", flush=True)
    waits = [wait(args, [row["article"] for row in rows], policy) for policy in ("full", "ada-snapkv")]
    result = {
        "command": command(p, args, "batch_throughput"),
        "articles": args.articles,
        "n": args.n,
        "rows": found,
        "waits": waits,
    }
    print(f"\n{show(result)}\n\n{show_waits(result)}")
    write_json(args, result)


def show(found: dict[str, Any]) -> str:
    first = found["rows"][0]
    return table(
        [
            "policy",
            "at a time",
            "s",
            "documents/h",
            "x",
            "answers, s",
            "x",
            "KV peak, MiB",
            "a document's at its end, MiB",
        ],
        [
            [
                row["policy"],
                row["parallel"],
                f"{row['seconds']:.0f}",
                f"{row['documents_per_hour']:.0f}",
                f"{row['documents_per_hour'] / first['documents_per_hour']:.2f}",
                f"{row['seconds'] - row['prefill_s']:.0f}",
                f"{(first['seconds'] - first['prefill_s']) / (row['seconds'] - row['prefill_s']):.2f}",
                f"{row['peak_bytes'] / 2**20:.1f}",
                f"{row['used_bytes_per_document'] / 2**20:.1f}",
            ]
            for row in found["rows"]
        ],
    )


def show_waits(found: dict[str, Any]) -> str:
    return table(
        ["policy", "prompt", "read in all, s", "longest wait of the answer, s", "longest piece, s"],
        [
            [row["policy"], row["prompt"], f"{row['prompt_s']:.2f}", f"{row['wait_s']:.2f}", f"{row['piece_s']:.2f}"]
            for row in found["waits"]
        ],
    )


if __name__ == "__main__":
    main()
