"""The command line: verbs call recipes. No logic lives here, and torch is imported only inside verbs that need it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from types import FrameType
from typing import Annotated

import typer

from ..errors import Interrupted, LabError, UserError
from . import chat, data, runs, serve, training, use
from .shared import examples

app = typer.Typer(
    name="peftlab",
    help="Shape the behaviour of language models with adapters on one frozen base.",
    epilog=examples("peftlab demo", "peftlab sft sft-tiny", "peftlab ppo ppo-tiny --dry-run"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _group in (training, data, use, chat, serve, runs):  # the order of `peftlab --help`
    app.add_typer(_group.app)


def _version(asked: bool) -> None:
    if asked:
        print(f"peftlab {metadata.version('peftlab')}")
        raise typer.Exit


@app.callback()
def _several(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """A verb that trains may be launched in several processes; of any other each would do the same."""
    from ..recipes import RECIPES
    from ..runs.launched import world_size

    verb = context.invoked_subcommand
    if world_size() > 1 and verb not in RECIPES:
        raise UserError(f"{verb}: runs in one process; launch several of {', '.join(RECIPES)} only")


def main() -> None:
    """Entry point: errors of the user's become one message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Its warnings are about what the lab does on purpose: packed rows without a mask, GPT-2's default loss.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with _interruptible():
            app()
    except UserError as error:
        _fail(error, 2)
    except Interrupted as error:
        _fail(error, 128 + error.signum)
    except LabError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        _fail(f"{error.filename}: is too long for the name of a file; give a shorter one", 2)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A block in which Ctrl+C is `_interrupt`, where it was Python's own; a run or a server takes it over in time."""
    here = threading.current_thread() is threading.main_thread()
    if not (here and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Ends an import at once, and anything else by KeyboardInterrupt.

    Libraries that try an import take a KeyboardInterrupt in it for a module that is not there, and go on half loaded.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"\npeftlab: interrupted while loading\n")
            os._exit(128 + signum)
        frame = frame.f_back
    raise KeyboardInterrupt


def _fail(message: object, code: int) -> None:
    from ..runs.launched import PeersLost, rank
    from ..runs.progress import complain

    if not (rank() and isinstance(message, Interrupted)):  # all stop together, and the first one says how to go on
        complain(f"peftlab: {message}", lost=isinstance(message, PeersLost))
    sys.exit(code)
