"""A report's page as a strict parser reads it, and what every page must keep to."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from peftlab.runs.sanitize import BIDI

VOID = {"meta", "br", "hr", "img", "link", "input"}
CLOSED_EARLY = {"path", "line", "rect", "circle"}  # SVG elements that the page writes as <x/>


class Page(HTMLParser):
    """Parses strictly: tags nest, ids are unique; keeps elements, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in CLOSED_EARLY
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data

    def values(self, name):
        return [attrs[name] for _, attrs in self.elements if name in attrs]


def read(path: Path) -> tuple[str, Page]:
    """The file's text and its elements; the page is safe, or the test fails."""
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert_safe(html, page)
    return html, page


def assert_safe(html, page):
    assert not re.search(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{BIDI}\ud800-\udfff]", html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "form", "base", "foreignobject"}
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        assert (attrs.get("href") or "#").startswith("#"), "links stay on the page"
        assert "src" not in attrs
    policies = [attrs["content"] for _, attrs in page.elements if "content-security-policy" in str(attrs).lower()]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in page.values("href")} <= set(ids), "every link of the contents leads somewhere"
