"""How a command of this program is typed where it runs: what a message tells a person to type is to work."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from .compare import read_config

OF_FULL = "explanations"  # a stage that only a demo with --full has


def typed(*words: str) -> str:
    """`peftlab` and these words, quoted for a shell and to be typed in the current folder.

    Where PATH finds no `peftlab`, or another than runs, as after `make demo` without an activated environment, the
    program's path stands in its place.
    """
    return shlex.join([_program(), *words])


def resuming(folder: Path, recipe: str, again: bool = False) -> str:
    """The command that goes on with the run in `folder`, a stage with its demo's; `again` starts it anew instead."""
    if (folder.parent / "config.toml").is_file():
        folder, recipe = folder.parent, "demo"
    source = [str(folder / "config.toml")]
    if recipe == "demo":  # it takes no config
        source = ["--full"] if OF_FULL in read_config(folder).get("stages", []) else []
    return typed(recipe, *source, "--run", folder.name, *([] if again else ["--resume"]))


def _program() -> str:
    ours = Path(sys.argv[0])
    if ours.name != "peftlab" or not ours.is_file():  # as a module, or within another program
        return "peftlab"
    found = shutil.which("peftlab")
    if found and os.path.samefile(found, ours):
        return "peftlab"
    near = os.path.relpath(ours)
    if near.startswith(os.pardir):
        return os.path.abspath(ours)
    return near if os.sep in near else os.path.join(os.curdir, near)  # a shell looks for a bare name on PATH only
