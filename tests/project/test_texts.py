"""Texts that need no host: help pages, translations and documents."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
HELP = ROOT / "web" / "docs"
PAGES = sorted(HELP.glob("*.md"))
DOCUMENTS = [ROOT / "docs" / f"{name}.md" for name in ("api", "comparison", "troubleshooting")]
LANGUAGES = ("zh", "ja", "de")

IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)]+)\)")


def anchors(page: str) -> set[str]:
    """Anchors of a page's headings as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_help_pages_are_found() -> None:
    assert len(PAGES) >= 9


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_help_page_is_complete(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert "Inputs" in headings
    assert headings[-1] == "Good to know"
    assert "**When to use it:**" in page
    images = IMAGE.findall(page)
    assert len(images) == 1
    assert all(text for text, _ in images), "an image without a text in its place"
    # ComfyUI completes the addresses of images but not of links.
    assert all(link.startswith("https://") for link in LINK.findall(page))


def test_images_are_there_used_and_small() -> None:
    used = {name for path in PAGES for _, name in IMAGE.findall(path.read_text(encoding="utf-8"))}
    there = {path.relative_to(HELP).as_posix() for path in (HELP / "images").iterdir()}
    assert used == there
    assert sum(path.stat().st_size for path in (HELP / "images").iterdir()) < 1_000_000
    for name in there:
        with Image.open(HELP / name) as image:
            # Twice the width of ComfyUI's help panel.
            assert image.width == 640, name


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_can_be_shown(language: str) -> None:
    nodes = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(nodes) == {path.stem for path in PAGES}
    names = [entry["display_name"] for entry in nodes.values()]
    assert len(set(names)) == len(names)
    for node, entry in nodes.items():
        assert set(entry) <= {"display_name", "description", "inputs", "outputs"}, node
        for text in (entry["display_name"], entry["description"]):
            # vue-i18n, with which ComfyUI shows these two, gives meanings of its own to these characters.
            assert text, node
            assert not set(text) & set("{}@|"), f"{node}: {text}"
        for slot in [*entry["inputs"].values(), *entry.get("outputs", {}).values()]:
            assert slot["tooltip"].strip(), node


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_translations_name_other_nodes_by_their_translated_names(language: str) -> None:
    nodes = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    opening, closing = {"zh": ("“", "”"), "ja": ("「", "」")}[language]
    names = {entry["display_name"] for entry in nodes.values()}
    quoted = set(
        re.findall(f"{opening}([^{closing}]*FaithDiff[^{closing}]*){closing}", json.dumps(nodes, ensure_ascii=False))
    )
    assert quoted
    assert quoted <= names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_within_documents_lead_somewhere(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    for link in LINK.findall(page):
        if link.startswith("#"):
            assert link[1:] in anchors(page), link
        elif not link.startswith("https://"):
            assert (path.parent / link.partition("#")[0]).exists(), link
