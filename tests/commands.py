"""`peftlab ...` inside the test's own process: as a user calls it, without the seconds that importing torch takes."""

from __future__ import annotations

import contextlib
import io
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from unittest import mock

from peftlab import cli


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def peftlab(line: str, **names: str) -> Outcome:
    """Run `peftlab LINE`; {names} in the line are filled in. An exception that cli lets through is the test's."""
    argv = [word.format(**names) for word in shlex.split(line)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with mock.patch.object(sys, "argv", ["peftlab", *argv]), streams[0], streams[1]:
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return Outcome(code, out.getvalue(), err.getvalue())


def program(line: str, env: Mapping[str, str] | None = None, text: str = "", **names: str) -> Outcome:
    """The same as a program of its own; `text` is typed into it."""
    argv = [sys.executable, "-m", "peftlab.cli", *(word.format(**names) for word in shlex.split(line))]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, input=text, timeout=300)
    return Outcome(done.returncode, done.stdout, done.stderr)
