"""What a run ran on: versions without imports, machine, commit, command line."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

from .launched import world_size

PACKAGES = ("peftlab", "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide the numbers, read from their metadata alone."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def git_commit() -> str | None:
    """The commit of the checkout that the command runs in, `-dirty` where files differ; None outside one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def collect() -> dict[str, Any]:
    """Everything that environment.json says about the machine and the software."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "argv": list(sys.argv),
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": usable,
        "processes": world_size(),
        "packages": package_versions(),
    }
