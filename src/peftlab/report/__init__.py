"""One static HTML page a run: `render` reads the run folder's files and imports neither torch nor recipes."""

from .page import render

__all__ = ["render"]
