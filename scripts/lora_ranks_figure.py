"""The figure of docs/performance.md: a LoRA's error and size by rank.

`python scripts/lora_ranks_figure.py` reads benchmarks/results/lora.json and writes docs/performance/lora_ranks.png.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.document import read_report  # noqa: E402

_CASE = re.compile(r"relative error at rank (\d+)")


def main() -> int:
    """Make the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [
        (int(case[1]), result.ours.median, result.note)
        for result in read_report("lora").results
        if (case := _CASE.match(result.case)) and result.ours
    ]
    ranks, errors, sizes = zip(*points, strict=True)
    figure, axis = pyplot.subplots(figsize=(7, 4))
    axis.plot(ranks, errors, "o-", color="#d1762b")
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [f"{rank}\n{size}" for rank, size in zip(ranks, sizes, strict=True)])
    axis.set_xlabel("rank, and size of the file in fp16")
    axis.set_ylabel("relative error of the difference")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "performance" / "lora_ranks.png", dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
