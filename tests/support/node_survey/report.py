"""The tables of docs/compatibility.md that are written by a command."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from .judge import Verdict
from .schema import KINDS

STATUSES = ("right", "refused", "host", "listed", "wrong")
TITLES = {
    "MODEL": "Nodes that take a MODEL and give one",
    "GUIDER": "Nodes that give a GUIDER",
    "CONDITIONING": "Nodes that take a CONDITIONING and give one",
    "LATENT": "Nodes that take a LATENT and give one, between two samplers",
}
_LIST = ("<!-- nodes of ComfyUI {version} -->", "<!-- end of nodes -->")
_LIST_PATTERN = re.compile(r"<!-- nodes of ComfyUI (\S*) -->.*?<!-- end of nodes -->", re.DOTALL)
_LONGEST = 200


def counts(verdicts: Iterable[Verdict]) -> dict[str, dict[str, int]]:
    """How many nodes of each kind got each verdict."""
    found = Counter((verdict.kind, verdict.status) for verdict in verdicts)
    return {kind: {status: found[kind, status] for status in STATUSES if found[kind, status]} for kind in KINDS}


def replace_counts(text: str, version: str, verdicts: list[Verdict]) -> str:
    """The text with the row of a ComfyUI version in the table of counts; newer versions stand first.

    The table is the one whose first column is called ComfyUI.
    """
    found = Counter(verdict.status for verdict in verdicts)
    row = f"| {version} | {len(verdicts)} | " + " | ".join(str(found[status]) for status in STATUSES) + " |"
    head = re.search(r"^\| ComfyUI \|.*\n\|[-|]+\|\n", text, re.MULTILINE)
    if head is None:
        raise ValueError("the text has no table whose first column is ComfyUI")
    end = re.compile(r"(?:\|.*\n)*").match(text, head.end())
    rows = {line.split("|")[1].strip(): line for line in (end.group() if end else "").splitlines()}
    rows[version] = row
    newest_first = sorted(rows, key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    table = "".join(rows[name] + "\n" for name in newest_first)
    return text[: head.end()] + table + text[end.end() if end else head.end() :]


def replace_list(text: str, version: str, verdicts: list[Verdict]) -> str:
    """The text with the list of nodes between the two comments that mark it."""
    parts = [_LIST[0].format(version=version)]
    for kind in KINDS:
        parts.append(f"\n### {TITLES[kind]}\n\n| Node | Verdict | Compared with, or why not |\n|---|---|---|")
        parts += [f"| {v.node} | {v.status} | {_cell(v.how)} |" for v in verdicts if v.kind == kind]
    parts += ["", _LIST[1]]
    if not _LIST_PATTERN.search(text):
        raise ValueError(f"the text has no {_LIST[0]!r}")
    return _LIST_PATTERN.sub(lambda _: "\n".join(parts), text)


def listed_version(text: str) -> str:
    """The version of ComfyUI that the list of nodes is of."""
    found = _LIST_PATTERN.search(text)
    if found is None:
        raise ValueError(f"the text has no {_LIST[0]!r}")
    return found.group(1)


def listed_verdicts(text: str) -> list[Verdict]:
    """All rows of the list of nodes."""
    found = _LIST_PATTERN.search(text)
    row = re.compile(rf"^\| (.+?) \| ({'|'.join(STATUSES)}) \| (.*) \|$")
    kinds = {f"### {title}": kind for kind, title in TITLES.items()}
    kind, verdicts = "", []
    for line in found.group().splitlines() if found else ():
        kind = kinds.get(line, kind)
        cells = row.match(line)
        if cells is not None:
            node, status, how = cells.groups()
            verdicts.append(Verdict(node, kind, status, how.replace("\\|", "|")))
    return verdicts


def _cell(text: str) -> str:
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
