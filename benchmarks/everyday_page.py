"""docs/everyday.md from what batch_throughput.py and plan_reality.py measured.

python benchmarks/everyday_page.py
"""

from __future__ import annotations

import json

import batch_throughput
import plan_reality
from common import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    batch = json.loads((RESULTS / "batch.json").read_text("utf-8"))["results"]
    plan = json.loads((RESULTS / "plan.json").read_text("utf-8"))["results"]
    off = {
        name: max(abs(row["plan"][name] / row["real"][name] - 1) for row in plan["rows"])
        for name in plan_reality.FIGURES
    }
    page = f"""# Batches and plans

Written by `python benchmarks/everyday_page.py`; SmolLM2-135M, Q4_1 weights.

## Several documents together

```console
$ {batch["command"]}
```

{batch["articles"]} articles of CNN/DailyMail are summarized, {batch["n"]} tokens each. Answers that are written
together share the reading of the weights; prompts are read one after the other, and take what they take.

{batch_throughput.show(batch)}

## What `kvlocal plan` says, and what a run takes

```console
$ {plan["command"]}
```

The largest differences: {", ".join(f"{name} {100 * value:.2f} %" for name, value in off.items())}.

{plan_reality.show(plan)}
"""
    (ROOT / "docs" / "everyday.md").write_text(page, "utf-8")


if __name__ == "__main__":
    main()
