"""The three ways a run ends early, and the exit code of each.

A message is one sentence for a person: what is wrong; where (file:line or key); what to do about it. The
command line prints it without a traceback. Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


def brief(error: BaseException) -> str:
    """What a library's error says, for a message of ours: its class and its first line, cut."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known name nearest to this one, as a question that ends a message; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else ""


def with_article(word: str) -> str:
    """A kind of model or of run with its article: an encoder, a demo, and an sft, which is spelled letter by letter."""
    return f"{'an' if word[:1] in 'aeiou' or word in ('rloo', 'sft') else 'a'} {word}"


class PeftlabError(Exception):
    """Base of the errors that the command line turns into one line and `exit_code`."""

    exit_code = 1


class UserError(PeftlabError):
    """The input or the configuration is wrong, and the user can mend it."""

    exit_code = 2


class LabError(PeftlabError):
    """The work failed: an invariant is violated, a number is not finite, the disk is full."""

    exit_code = 1


class Interrupted(PeftlabError):
    """A signal asked the run to stop; raised where nothing learned is lost: outside the steps, or once one is saved."""

    def __init__(self, signum: int, message: str | None = None) -> None:
        self.signum = signum
        self.exit_code = 128 + signum
        super().__init__(message or f"stopped by {signal.Signals(signum).name}; --resume continues")
