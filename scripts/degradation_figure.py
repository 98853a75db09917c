"""The figure of docs/training.md: low-quality images of the published process and of ours, by five statistics.

`python scripts/degradation_figure.py` writes docs/training/degradation.png and prints the means.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.published_degradation import STATISTICS, compare  # noqa: E402

COUNT = 200

LABELS = {"published": "published", "ours": "ours (default)", "encoder": "ours, jpeg: encoder"}


def main() -> int:
    """Make the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from scipy.stats import ks_2samp

    columns = compare(COUNT)
    figure, axes = pyplot.subplots(1, len(STATISTICS), figsize=(15, 3.2))
    for index, (name, axis) in enumerate(zip(STATISTICS, axes, strict=True)):
        truth = columns["published"][:, index]
        for kind, label in LABELS.items():
            values = columns[kind][:, index]
            likeness = "" if kind == "published" else f", p = {ks_2samp(truth, values).pvalue:.2g}"
            sys.stdout.write(f"{name}: {label}: mean {values.mean():.3f}{likeness}\n")
            ordered = sorted(values)
            axis.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], label=label)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of images below")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    target = ROOT / "docs" / "training" / "degradation.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=80)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
