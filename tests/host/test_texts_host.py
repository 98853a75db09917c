"""Help pages and translations against the schemas of the nodes, as the host shows them."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import requests
from comfy_host import REPO, Host, Page, Server

DOCS = REPO / "web" / "docs"
LANGUAGES = ("zh", "ja", "de")
ROW = re.compile(r"^\| `(\w+)`<br>([^|]*) \|", re.MULTILINE)
"""A row of a table of inputs or outputs: name, and type or values."""


def pack_nodes(host: Host) -> dict[str, Any]:
    """The pack's schemas by node id."""
    classes = {name: host.node_class(name) for name in host.node_ids if name.startswith("FaithDiff")}
    assert classes, "the pack has no nodes"
    return {name: node.GET_SCHEMA() for name, node in sorted(classes.items())}


def section(page: str, title: str) -> str:
    """The part of a help page below a heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {title}"
    return found.group(1)


def test_every_node_has_a_help_page_and_every_page_a_node(host: Host) -> None:
    assert {path.stem for path in DOCS.glob("*.md")} == set(pack_nodes(host))


def test_help_pages_explain_every_input_and_output_and_no_other(host: Host) -> None:
    for node, schema in pack_nodes(host).items():
        page = (DOCS / f"{node}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema.display_name}\n"), node
        assert [name for name, _ in ROW.findall(section(page, "Inputs"))] == [entry.id for entry in schema.inputs], node
        outputs = [name for name, _ in ROW.findall(section(page, "Outputs"))]
        assert outputs == [entry.display_name for entry in schema.outputs or []], node


def test_help_pages_tell_the_defaults_of_the_schema(host: Host) -> None:
    for node, schema in pack_nodes(host).items():
        page = section((DOCS / f"{node}.md").read_text(encoding="utf-8"), "Inputs")
        rows = dict(ROW.findall(page))
        for entry in schema.inputs:
            told = re.search(r"default (-?[\d.]+|\w+)", rows[entry.id])
            default = getattr(entry, "default", None)
            if isinstance(default, (int, float)) and not isinstance(default, bool):
                assert told is not None, f"{node}.{entry.id}: no default told"
                assert float(told.group(1)) == float(default), f"{node}.{entry.id}"
            options = getattr(entry, "options", None)
            if told is not None and options and isinstance(default, str):
                assert told.group(1) == default, f"{node}.{entry.id}"


def test_every_input_has_a_tooltip_and_every_node_a_description(host: Host) -> None:
    for node, schema in pack_nodes(host).items():
        assert schema.description, node
        assert schema.search_aliases, node
        # The slider of FaithDiffCompare is an image rather than an input, and has nothing to say.
        assert [entry.id for entry in schema.inputs if not entry.tooltip and entry.io_type != "IMAGECOMPARE"] == [], (
            node
        )


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_cover_the_schema_and_nothing_else(host: Host, language: str) -> None:
    translated = json.loads((REPO / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    schemas = pack_nodes(host)
    assert set(translated) == set(schemas)
    for node, schema in schemas.items():
        entry = translated[node]
        assert set(entry["inputs"]) == {item.id for item in schema.inputs if item.tooltip}, node
        assert all(set(texts) == {"name", "tooltip"} for texts in entry["inputs"].values()), node
        # Notes, help pages and errors say the input's id, so its name has it, too.
        assert all(item in texts["name"].lower() for item, texts in entry["inputs"].items()), node
        with_tooltip = {str(slot) for slot, item in enumerate(schema.outputs or []) if item.tooltip}
        assert set(entry.get("outputs", {})) == with_tooltip, node


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_keep_the_quoted_words_of_the_tooltips(host: Host, language: str) -> None:
    translated = json.loads((REPO / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    for node, schema in pack_nodes(host).items():
        for item in filter(lambda item: item.tooltip, schema.inputs):
            words = set(re.findall(r"`([^`]+)`", item.tooltip))
            tooltip = translated[node]["inputs"][item.id]["tooltip"]
            assert words == set(re.findall(r"`([^`]+)`", tooltip)), f"{language}: {node}.{item.id}"


def test_the_server_gives_pages_images_and_translations(server: Server) -> None:
    folder = server.object_info("FaithDiffSampler")["python_module"].split(".")[1]
    for path in sorted(DOCS.rglob("*.*")):
        # The page asks for these addresses; an answer of text/html would count as "no help".
        answer = requests.get(f"{server.url}/extensions/{folder}/docs/{path.relative_to(DOCS).as_posix()}", timeout=60)
        assert answer.status_code == 200, path.name
        assert answer.content == path.read_bytes(), path.name
        assert "text/html" not in answer.headers["Content-Type"], path.name
    served = server.get("/i18n")
    for language in LANGUAGES:
        path = REPO / "locales" / language / "nodeDefs.json"
        ours = json.loads(path.read_text(encoding="utf-8"))
        assert ours.items() <= served[language]["nodeDefs"].items()


def test_the_page_shows_help_with_its_image(browser: Page) -> None:
    opened = browser.script("""
        app.graph.clear();
        const node = LiteGraph.createNode("FaithDiffTiledDiffusion");
        app.graph.add(node);
        app.canvas.selectNode(node);
        const root = [...document.querySelectorAll("*")].find(element => element.__vue_app__);
        const stores = root.__vue_app__.config.globalProperties.$pinia._s;
        stores.get("canvas").updateSelectedItems();
        stores.get("rightSidePanel").openPanel("info");
        return node.title;
    """)
    assert opened == "FaithDiff Tiled Diffusion"
    image = 'return document.querySelector(".node-help-content img")?.naturalWidth || 0'
    deadline = time.monotonic() + 20
    while not browser.script(image) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert browser.script(image) == 640
    text = browser.script('return document.querySelector(".node-help-content").innerText')
    assert "How many tiles" in text
    assert browser.script('return document.querySelectorAll(".node-help-content table").length') == 3
