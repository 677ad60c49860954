"""One static HTML page a run: `render` reads the run folder's files alone, and imports neither torch nor the recipes."""

from .page import render

__all__ = ["render"]
