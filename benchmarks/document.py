"""`python -m benchmarks.document`: write the tables of the documents from the reports in benchmarks/results.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a report's name without `.json`, and
after a colon rows of it, separated by commas: `<!-- table: cpu_quick: floor,alignment -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from .results import Report, table

REPO = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
DOCUMENTS = tuple(REPO / "docs" / f"{name}.md" for name in ("performance", "quantized", "scaling"))

_TABLE = re.compile(r"(<!-- table: (?P<name>\w+)(?:: (?P<rows>[\w, -]+))? -->\n).*?(<!-- end of table -->)", re.DOTALL)


def read_report(name: str) -> Report:
    """A report by its name.

    Raises:
        FileNotFoundError: benchmarks/results has none by that name.
    """
    return Report.from_dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def filled(document: str) -> str:
    """The document with every table rewritten.

    Raises:
        ValueError: a table asks for a row that its report does not have.
    """

    def block(found: re.Match[str]) -> str:
        report = read_report(found["name"])
        results = report.results
        if found["rows"]:
            wanted = [name.strip() for name in found["rows"].split(",")]
            unknown = set(wanted) - {result.row for result in results}
            if unknown:
                raise ValueError(f"The report {found['name']} has no row {', '.join(sorted(unknown))}.")
            results = [result for name in wanted for result in results if result.row == name]
        facts = "; ".join(f"{name} {value}" for name, value in report.machine.items())
        return f"{found[1]}`{report.command}`: {facts}.\n\n{table(results)}\n{found[4]}"

    return _TABLE.sub(block, document)


def main() -> None:
    """Rewrite the documents."""
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
