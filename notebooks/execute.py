"""Runs notebooks from top to bottom and keeps what they print: `python notebooks/execute.py [FILE ...]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def executed(path: Path) -> Any:
    """The notebook in `path` with the outputs of a fresh kernel; CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    # No times, and one output for lines that were printed one by one: what is kept changes only where the figures do.
    options = {"record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(HERE)}}, **options).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # not the version of whoever ran it
    return notebook


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(HERE.glob("*.ipynb"))):
        nbformat.write(executed(path), path)
