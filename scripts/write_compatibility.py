"""Write the tables of ComfyUI's own nodes in docs/compatibility.md.

    COMFYUI_PATH=/path/to/ComfyUI python scripts/write_compatibility.py [--counts] [--only NODE ...] [--full]

All nodes of that ComfyUI are tried on the tiny model, as tests/host/test_every_node.py does. The counts of its version
are replaced or added; the list of nodes is replaced, unless `--counts` is given for an older ComfyUI.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

from comfy_host import Host, find_host  # noqa: E402

DOC = ROOT / "docs" / "compatibility.md"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/compatibility.md.")
    parser.add_argument("--counts", action="store_true", help="replace this ComfyUI's counts only, not the list")
    parser.add_argument("--only", nargs="+", metavar="NODE", help="try these nodes again, and keep the rows of others")
    parser.add_argument("--full", action="store_true", help="compare in every way (half an hour)")
    options = parser.parse_args()
    path = find_host()
    if path is None:
        parser.error("no ComfyUI found; set COMFYUI_PATH")
    with tempfile.TemporaryDirectory() as base:
        host = Host(path, Path(base))
        # Only a host makes these importable.
        from support.node_survey import (
            Survey,
            find_nodes,
            listed_verdicts,
            replace_counts,
            replace_list,
            survey_setup,
        )

        survey = Survey(survey_setup(host), full=options.full)
        text = DOC.read_text(encoding="utf-8")
        known = {verdict.node: verdict for verdict in listed_verdicts(text)} if options.only else {}
        verdicts = []
        for schema in find_nodes(host):
            again = not options.only or schema.id in options.only or schema.id not in known
            verdict = survey.verdict(schema) if again else known[schema.id]
            sys.stdout.write(f"{verdict.kind:13}{verdict.node:45}{verdict.status:9}{verdict.how}\n")
            verdicts.append(verdict)
        text = replace_counts(text, host.version, verdicts)
        if not options.counts:
            text = replace_list(text, host.version, verdicts)
        DOC.write_text(text, encoding="utf-8")
    wrong = [verdict.node for verdict in verdicts if verdict.status == "wrong"]
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
