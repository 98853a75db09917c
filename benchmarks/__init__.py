"""Speed and memory of FaithDiff beside its peers: `python -m benchmarks --quick`.

Everything runs on random weights, in the published sizes unless a row says otherwise. A comparison's two sides
alternate within one run, so that what else the machine does meets both; what counts is the ratio. See
docs/performance.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The harness of ComfyUI and the builders of models, which the tests use, too.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
