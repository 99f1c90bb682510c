"""The documents: links between files lead somewhere, and the page that is generated is up to date."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for folder in (".", "docs", "recipes", "tests", ".github") for path in (ROOT / folder).glob("*.md")
)
LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"")
CODE = re.compile(r"^```.*?^```$|^    [^\n]*$", flags=re.MULTILINE | re.DOTALL)


def prose(document: Path) -> str:
    """Return the text of a Markdown file without its blocks of code."""
    return CODE.sub("", document.read_text(encoding="utf-8"))


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    """Return the links of a Markdown file to files or headings that are not there."""
    broken = []
    for link in (a or b for a, b in LINK.findall(prose(document))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](none.md) [b](#a-heading) [c](#none) [d](https://a.b) [e](page.md#no)", "utf-8")
    assert broken_links(page) == ["none.md", "#none", "page.md#no"]


def test_the_configuration_page_is_up_to_date() -> None:
    """`make docs` writes it again."""
    script = runpy.run_path(str(ROOT / "scripts" / "configuration_page.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"]()


def test_the_table_of_memory_is_up_to_date() -> None:
    """`python scripts/memory_table.py` prints it."""
    script = runpy.run_path(str(ROOT / "scripts" / "memory_table.py"))
    assert script["table"]() in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_readme_fits_on_a_few_screens() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    assert len(text.encode()) <= 9_000
