"""The page: one HTML file without scripts, which needs nothing beside it.

Every value that the template prints is escaped, and what would not show or would reorder the text is made
visible, since prompts, completions, tokens and names come from models and strangers. The content security
policy forbids scripts and connections besides.
"""

from __future__ import annotations

from pathlib import Path

import jinja2
from markupsafe import Markup

from ..runs.atomic import write_text
from . import text
from .svg import swatch
from .view import view_run

SHOWN_SAMPLES = 6


def _finalize(value: object) -> object:
    return value if isinstance(value, Markup) else text.clean(value)


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_finalize,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals.update(
    visible=text.visible,
    sentence=text.sentence,
    swatch=swatch,
    shown_samples=SHOWN_SAMPLES,
)


def render(run_path: Path) -> Path:
    """Writes report.html into the run folder `run_path`, from its files alone, and returns its path.

    A demo's page holds its stages. A run that has only begun, was killed or failed has a page too. UserError
    where `run_path` is no run folder.
    """
    page = run_path / "report.html"
    write_text(page, _TEMPLATES.get_template("page.html").render(run=view_run(run_path)))
    return page
