"""Every node of the running ComfyUI that can meet FaithDiff in a graph, tried on the tiny model.

`schema` finds the nodes and reads what they take, `values` makes their inputs from that, `trial` samples with them in
all the ways that are compared, `judge` gives each node its verdict, and `report` writes the table of
docs/compatibility.md. Nothing in it knows a node by name, but for the few that `judge` excuses with a reason.
"""

from __future__ import annotations

from .judge import Survey, Verdict
from .report import counts, listed_verdicts, listed_version, replace_counts, replace_list
from .schema import KINDS, NodeSchema, find_nodes
from .values import survey_setup

__all__ = [
    "KINDS",
    "NodeSchema",
    "Survey",
    "Verdict",
    "counts",
    "find_nodes",
    "listed_verdicts",
    "listed_version",
    "replace_counts",
    "replace_list",
    "survey_setup",
]
