"""docs/everyday.md from what batch_throughput.py and plan_reality.py measured."""

from __future__ import annotations

import json
from pathlib import Path

import batch_throughput
import plan_reality
from common import at_commit


def write_page(results: Path, path: Path) -> None:
    """The page, from ``batch.json`` and ``plan.json`` in ``results``."""
    found = {name: json.loads((results / f"{name}.json").read_text("utf-8")) for name in ("batch", "plan")}
    batch, plan = (found[name]["results"] for name in ("batch", "plan"))
    off = {
        name: max(abs(row["plan"][name] / row["real"][name] - 1) for row in plan["rows"])
        for name in plan_reality.FIGURES
    }
    page = f"""# Batches and plans

Written by `python benchmarks/everyday.py`; SmolLM2-135M, Q4_1 weights.
{at_commit({name: values.get("commit", "") for name, values in found.items()})}

## Several documents together

```console
$ {batch["command"]}
```

{batch["articles"]} articles of CNN/DailyMail are summarized, {batch["n"]} tokens each. Answers that are written
together share the reading of the weights; prompts are read one after the other, and take what they take.

{batch_throughput.show(batch)}

While a prompt is read, answers go on by a token after every piece of it (512 tokens). With one answer being written and
one long prompt beside it:

{batch_throughput.show_waits(batch)}

## What `kvlocal plan` says, and what a run takes

```console
$ {plan["command"]}
```

The largest differences: {", ".join(f"{name} {100 * value:.2f} %" for name, value in off.items())}.

{plan_reality.show(plan)}
"""
    path.write_text(page, "utf-8")
