"""Every node of the running ComfyUI that can stand in a graph with FaithDiff, tried on the tiny model.

The nodes are found and their inputs made from what they say about themselves, so nodes of a later ComfyUI are tried
without a change here. Each has to give what tiles sampled by hand give (or what its definition gives on predictions
merged by hand), whatever `tile_batch` is, or an error of ours. docs/compatibility.md has the verdicts; write them with

    python scripts/write_compatibility.py
"""

from __future__ import annotations

import pytest
from comfy_host import REPO, Host
from support.host_sampling import Setup
from support.node_survey import KINDS, Survey, Verdict, find_nodes, listed_verdicts, listed_version, survey_setup

DOC = REPO / "docs" / "compatibility.md"


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return survey_setup(host)


@pytest.fixture(scope="module")
def verdicts(setup: Setup) -> list[Verdict]:
    survey = Survey(setup)
    return survey.verdicts(find_nodes(setup.host))


@pytest.mark.parametrize("kind", KINDS)
def test_no_node_gives_a_wrong_image(verdicts: list[Verdict], kind: str) -> None:
    mine = [verdict for verdict in verdicts if verdict.kind == kind]
    assert [verdict for verdict in mine if verdict.status == "wrong"] == []
    assert [verdict for verdict in mine if verdict.status == "right"]


def test_the_docs_have_these_verdicts(verdicts: list[Verdict], host: Host) -> None:
    """On the ComfyUI that the list was written on, node for node; a new node has to be added there."""
    text = DOC.read_text(encoding="utf-8")
    if host.version == listed_version(text):
        found = {verdict.node: verdict.status for verdict in verdicts}
        assert found == {verdict.node: verdict.status for verdict in listed_verdicts(text)}
