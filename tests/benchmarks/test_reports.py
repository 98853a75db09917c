"""Reports of the benchmarks: resumed row by row, and the tables of the documents that are made from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import document, registry
from benchmarks.measure import Spread
from benchmarks.registry import Row
from benchmarks.results import Report, Result, Target, missing, table
from benchmarks.settings import Settings


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three rows that do nothing but tell that they ran; the second one fails the first time."""
    ran: list[str] = []

    def row(name: str) -> Row:
        def run(settings: Settings) -> Iterator[Result]:
            ran.append(name)
            yield Result(f"{name}-line", "case", "ms", Spread((float(len(ran)),)))
            if name == "two" and ran.count("two") == 1:
                raise RuntimeError("out of memory")

        return Row(name, "about", run, on_gpu=name != "three")

    monkeypatch.setattr(command, "ROWS", tuple(map(row, ("one", "two", "three"))))
    return ran


def test_a_stopped_run_goes_on_with_the_row_that_it_did_not_finish(rows: list[str], tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--json", str(tmp_path / "report.json")]
    with pytest.raises(RuntimeError):
        command.main(arguments)
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data["finished"] == ["one"]
    assert [result["row"] for result in data["results"]] == ["one-line"]
    assert command.main(arguments) == 0
    assert rows == ["one", "two", "two", "three"]
    report = Report.from_dict(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")))
    assert report.finished == ["one", "two", "three"]
    assert [result.row for result in report.results] == ["one-line", "two-line", "three-line"]
    assert command.main(arguments) == 0
    assert len(rows) == 4


def test_no_row_begins_after_the_minutes_are_over(rows: list[str], tmp_path: Path) -> None:
    rows.append("two")  # so that the second row does not fail
    path = tmp_path / "report.json"
    assert command.main(["--device", "cpu", "--minutes", "0", "--json", str(path)]) == 0
    assert rows == ["two"]
    assert not path.exists()


def test_results_of_another_set_up_are_not_mixed(rows: list[str], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    rows.append("two")
    assert command.main(["--device", "cpu", "--json", str(path)]) == 0
    with pytest.raises(SystemExit, match="another steps"):
        command.main(["--device", "cpu", "--steps", "7", "--json", str(path)])
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(SystemExit, match="not a report"):
        command.main(["--device", "cpu", "--json", str(path)])


def test_the_gpu_preset_asks_for_a_gpu_and_leaves_out_rows_without_one() -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        command.main(["--device", "cpu", "--preset", "gpu"])
    elsewhere = {row.name for row in registry.ROWS if not row.on_gpu}
    assert elsewhere == {"floor", "import", "files", "lora", "quantized", "tile-grid", "tile-grid-time", "supir-counts"}


def test_reports_survive_json() -> None:
    results = [
        Result("a", "case", "ms", Spread((1.0, 2.0)), Spread((2.0, 4.0)), "peer", Spread((0.5, 0.5)), "time"),
        Result("b", "case", "s", Spread((0.2,)), target=Target("<=", 0.15), kind="counted", note="why"),
        missing("c", "case", "needs a GPU", Target(">=", 2.0)),
        Result("d", "case", "ms", Spread((2.0,), quartiles=(1.5, 2.25))),
    ]
    report = Report("command", {"device": "cpu"}, results, ["a", "b"])
    assert Report.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    assert "2 ms [1.5 .. 2.25]" in table(report.results)


def test_tables_are_made_from_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "RESULTS", tmp_path)
    results = [Result(name, "case", "ms", Spread((1.0,))) for name in ("a", "b", "a")]
    Report("python -m benchmarks", {"device": "cpu"}, results).write(tmp_path / "quick.json")
    text = document.filled("# T\n<!-- table: quick: a -->\nold\n<!-- end of table -->\nafter\n")
    assert table([results[0], results[2]]) in text
    assert "old" not in text
    assert text.endswith("<!-- end of table -->\nafter\n")
    assert document.filled(text) == text
    with pytest.raises(ValueError, match="no row c"):
        document.filled("<!-- table: quick: c -->\n<!-- end of table -->")


@pytest.mark.parametrize("path", document.DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_hold_the_tables_of_their_reports(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert document.filled(text) == text


def test_the_figures_of_performance_md_are_in_no_table_written_by_hand() -> None:
    text = (document.REPO / "docs" / "performance.md").read_text(encoding="utf-8")
    by_hand = re.sub(r"<!-- table: .*?<!-- end of table -->", "", text, flags=re.DOTALL)
    assert by_hand != text
    assert [line for line in by_hand.splitlines() if line.startswith("|")] == []
