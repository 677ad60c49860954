"""The site of these pages: `make docs`. They are plain Markdown first, to be read in a repository as they are.

Nothing is fetched, neither while it builds nor while it is read: no inventory of another project, no web font, no
script for equations. These are lines of text, as in the docstrings: they read the same in a terminal, a diff and a
browser.

Links out of docs/, as in [gae](../src/peftlab/ops/advantages.py#gae), lead to the file itself, with its functions and
classes as anchors: it becomes a page of the site. tests/test_docs.py checks that file and name exist.
"""

from __future__ import annotations

import ast
import html
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
NAMED = re.compile(r"\[([\w-]+\.md)\](?=\(\1[#)])")  # [ppo.md](ppo.md#tasks): the site puts the heading in its place
OUTWARD = re.compile(r"\]\(\.\./([\w./-]+)")  # docs/ is flat, so `../` is the repository's root
SOURCES = "file"  # the folder of the site that holds the files linked to

STYLED = {
    "<table>": '<div class="table-wrapper"><table class="docutils">',
    "</table>": "</table></div>",
    "<code>": '<code class="docutils literal">',
    '<pre><code class="docutils literal">': '<div class="highlight"><pre><code>',
    '<pre><code class="language': '<div class="highlight"><pre><code class="language',
    "</pre>": "</pre></div>",
}

project = "PEFT Lab"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
extensions = ["myst_parser"]
myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, "ours": f"{SOURCES}/{{{{path}}}}.html#{{{{fragment}}}}"}
highlight_language = "text"
smartquotes = False

html_theme = "furo"
html_title = f"PEFT Lab {release}"
html_static_path = ["_static", "pictures"]
html_css_files = ["lab.css"]
html_theme_options = {"top_of_page_buttons": []}
html_copy_source = html_show_copyright = html_show_sphinx = html_use_index = False


def for_the_site(app: Any, page: str, source: list[str]) -> None:
    """Links as a site has them; `](../PATH` leads to a page that `pages_of_ours` makes."""
    source[0] = NAMED.sub("[]", OUTWARD.sub(r"](ours:\1", source[0]))


def pages_of_ours(app: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each file that is linked to: (its name, what the template needs, the template)."""
    pages = [page.read_text(encoding="utf-8") for page in Path(app.srcdir).glob("*.md")]
    for name in sorted({name for page in pages for name in OUTWARD.findall(page)}):
        text = (ROOT / name).read_text(encoding="utf-8")
        if name.endswith(".md"):
            body = rendered(text)
        else:
            python = name.endswith(".py")
            block = app.builder.highlighter.highlight_block(text, "python" if python else "cuda")
            body = f"<h1>{html.escape(name)}</h1>\n{anchored(block, text) if python else block}"
        yield f"{SOURCES}/{name}", {"title": name, "body": body, "parents": []}, "page.html"


def rendered(text: str) -> str:
    """A page of the repository's root; it links to docs/PAGE.md and to its neighbours."""
    body = MarkdownIt("commonmark").enable("table").render(text)
    body = re.sub(r'href="docs/([\w-]+)\.md', r'href="../\1.html', body)
    body = re.sub(r'href="(\w+\.md)', r'href="\1.html', body)
    body = body.replace('src="docs/pictures/', 'src="../_static/')
    body = re.sub(r'<a href="notebooks/[^"]*">(.*?)</a>', r"\1", body)  # the repository has them, the site has not
    for plain, styled in STYLED.items():  # as Sphinx would have written it
        body = body.replace(plain, styled)
    return body


def anchored(block: str, text: str) -> str:
    """The highlighted lines, with an anchor before each function and class: `gae`, `PPOTrainer.step`."""
    lines = block.splitlines()
    for name, line in definitions(ast.parse(text)):
        lines[line - 1] = f'<span id="{name}"></span>{lines[line - 1]}'
    return "\n".join(lines)


def definitions(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, int]]:
    """(dotted name, line) of what a module or a class defines."""
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield outer + node.name, node.lineno
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{node.name}.")


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", for_the_site)
    app.connect("html-collect-pages", pages_of_ours)
    return {"parallel_read_safe": False}
