"""The summary page: one HTML file that needs no server, with small images before and after, failures first."""

from __future__ import annotations

import html
from collections.abc import Iterator
from itertools import islice
from typing import Any

from ..errors import printable
from .manifest import Row, RowLog
from .progress import duration
from .storage import write
from .work_list import WorkList

SUMMARY = "summary.html"

MOST_ROWS = 500
"""Most failures, and most other images, that the page shows: a browser is slow with more. The manifest has all."""

_STYLE = """
:root { color-scheme: light dark; font: 14px/1.45 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 1200px; padding: 1.5rem; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0 1.5rem; }
dt { font-size: .8rem; opacity: .7; } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; margin-bottom: 2rem; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid #8884; vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { overflow-wrap: anywhere; }
th button { all: unset; cursor: pointer; font-weight: 600; white-space: nowrap; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
tr.failed { background: #d332; } .error { font-weight: 600; }
img { max-width: 160px; max-height: 160px; display: block; }
"""

_SCRIPT = """
for (const heading of document.querySelectorAll("#images th")) {
  const button = heading.querySelector("button");
  if (!button) continue;
  button.addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = document.querySelector("#images tbody"), column = heading.cellIndex;
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const numbers = body.rows[0]?.cells[column].classList.contains("number");
    const compare = numbers
      ? (a, b) => value(a) - value(b)  // as texts, 0.5 would come before 0.12
      : (a, b) => value(a).localeCompare(value(b), undefined, {numeric: true});
    const rows = [...body.rows].sort(compare);
    body.append(...(down ? rows.reverse() : rows));
  });
}
"""


def write_summary(out: str, work: WorkList, small: RowLog) -> None:
    """Write the page.

    Args:
        out: the output folder.
        work: with the rows of all inputs.
        small: the small images.
    """
    failed = list(islice(work.rows(("failed",)), MOST_ROWS))
    images = {row["name"]: row["images"] for row in small.rows()}
    done = list(islice((row for row in work.rows(("done",)) if row["name"] in images), MOST_ROWS))
    shown = {row["name"] for row in (*failed, *done)}
    small.replace({"name": name, "images": each} for name, each in images.items() if name in shown)
    write(
        f"{out.rstrip('/')}/{SUMMARY}", "".join(_page(work, failed, done, images)).encode("utf-8", "backslashreplace")
    )


def _page(work: WorkList, failed: list[Row], done: list[Row], images: dict[str, Any]) -> Iterator[str]:
    totals = work.totals()
    yield (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>FaithDiff: {totals.get('done', 0)} restored, {totals.get('failed', 0)} failed</title>\n"
        f"<style>{_STYLE}</style>\n<h1>Restoration with FaithDiff</h1>\n<dl>"
    )
    for name, text in _facts(work, totals):
        yield f"<div><dt>{name}</dt><dd>{text}</dd></div>"
    shown = len(failed) + len(done)
    yield f"</dl>\n<p>{shown} of {sum(totals.values())} images are shown: failures first, then some of the others. "
    yield "The file manifest.jsonl beside this page lists all. Click a heading to sort.</p>\n"
    yield '<table id="images"><thead><tr>'
    for heading in ("State", "Image", "Before", "After", "Seconds", "Megapixels", "MB written", "Worker"):
        yield f"<th>{heading}</th>" if heading in ("Before", "After") else f"<th><button>{heading}</button></th>"
    yield "</tr></thead><tbody>\n"
    for row in (*failed, *done):
        yield _table_row(row, images.get(row["name"], ()))
    yield "</tbody></table>\n<h2>Workers</h2>\n<table><thead><tr><th>Worker</th>"
    yield '<th class="number">Images</th><th class="number">Seconds each</th>'
    yield "</tr></thead><tbody>\n"
    for worker, count, seconds in work.by_worker():
        yield f"<tr><td>{_text(worker)}</td>{_number(count, f'{count:,}')}{_number(seconds, f'{seconds:.2f}')}</tr>\n"
    yield f"</tbody></table>\n<script>{_SCRIPT}</script>\n"


def _facts(work: WorkList, totals: dict[str, int]) -> Iterator[tuple[str, str]]:
    sums = work.sums()
    yield "Restored", f"{totals.get('done', 0):,}"
    yield "Failed", f"{totals.get('failed', 0):,}"
    if totals.get("waiting"):
        yield "Not tried yet", f"{totals['waiting']:,}"
    yield "Megapixels", f"{sums['pixels'] / 1e6:,.1f}"
    yield "Read", f"{sums['bytes_read'] / 1e6:,.1f} MB"
    yield "Written", f"{sums['bytes_written'] / 1e6:,.1f} MB"
    yield "Work of all workers", duration(sums["seconds"])


def _table_row(row: Row, images: Any) -> str:
    failed, seconds = row["state"] == "failed", row.get("seconds", 0.0)
    pixels = row.get("width", 0) * row.get("height", 0) / 1e6
    written = row.get("bytes_written", 0) / 1e6
    what = f'<div class="error">{_text(row.get("error", ""))}</div>' if failed else ""
    what += "".join(f"<div>{_text(note)}</div>" for note in row.get("notes", ()))
    small = [f'<td><img loading="lazy" alt="" src="data:image/jpeg;base64,{image}"></td>' for image in images]
    small += ["<td></td>"] * (2 - len(small))
    return (
        f'<tr class="{row["state"]}"><td data-value="{0 if failed else 1}">{row["state"]}</td>'
        f'<td class="name" data-value="{_text(row["name"])}">{_text(row["name"])}{what}</td>{"".join(small)}'
        f"{_number(seconds, f'{seconds:.2f}')}"
        f"{_number(pixels, f'{pixels:.2f}' if pixels else '')}{_number(written, f'{written:.2f}' if written else '')}"
        f"<td>{_text(row.get('worker', ''))}</td></tr>\n"
    )


def _number(value: float, text: str) -> str:
    return f'<td class="number" data-value="{value}">{text}</td>'


def _text(text: str) -> str:
    return html.escape(printable(text))
