"""MkDocs hooks: publish documents that live outside docs/, and resolve the links between them and the pages.

Every document links to files by their path in the repository, so that the links work on GitHub. On the site a link to a
published document becomes a link to its page. A link to any other file leads to the repository if its address is known
(`repo_url`), and is plain text otherwise.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "recipes/README.md": "recipes.md",
    "tests/README.md": "tests.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(!?\[[^\]\[]*\])\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the published documents to the pages of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a document from repository paths to addresses on the site."""
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(link: re.Match[str]) -> str:
        label, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES:
            return f"{label}({PAGES[path]}{anchor})"
        if path.startswith("docs/"):
            return f"{label}({path.removeprefix('docs/')}{anchor})"
        if not (ROOT / path).exists():
            return link[0]  # MkDocs complains about it
        return f"{label}({config.repo_url.rstrip('/')}/tree/main/{path})" if config.repo_url else label[1:-1]

    return LINK.sub(rewrite, markdown)
