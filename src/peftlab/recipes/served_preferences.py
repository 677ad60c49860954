"""What people prefer on the page of `peftlab serve`: pairs and a journal, as `peftlab label` has them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.labels import Journal, left_of, read_pairs
from ..data.records import parse_row
from ..errors import UserError
from ..runs.atomic import append_line, write_rows
from ..runs.lock import locked_file
from .label import outputs

SEED = 0  # of `peftlab label`'s default: it goes on from these files


class Preferences:
    """PREFS.jsonl gains the pair, PREFS.labels.jsonl the choice, and PREFS.labelled.jsonl the pairs that have a winner.

    Nothing is made before the first choice; pairs that are there already wait for `peftlab label`. Raises UserError
    where the file could not be one of pairs.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() != ".jsonl" or not path.parent.is_dir():
            raise UserError(f"--prefs {path}: expected a file that ends in .jsonl, in a folder that is there")
        self.path = path
        self.labels, self.labelled = outputs(path)
        self._lock = threading.Lock()

    def add(self, prompt: str, answers: Mapping[str, str], choice: str, seconds: float, **more: Any) -> int:
        """Keep a choice between the answers {"left", "right"}: left, right or tie. Returns how many pairs there are.

        On disk when it returns. Raises UserError for a pair that is none, such as equal answers, UserError or
        LabError where the files cannot be written or are in use.
        """
        identity = secrets.token_hex(8)
        chosen, rejected = ("left", "right") if left_of(SEED, identity) == "chosen" else ("right", "left")
        row = {"id": identity, "prompt": prompt, "chosen": answers[chosen], "rejected": answers[rejected], **more}
        try:
            parse_row("preferences", row, 0)
        except ValueError as error:  # a file with such a row could not be read again
            raise UserError(f"this pair cannot be kept: {error}") from None
        with self._lock, locked_file(self.labels) as handle:
            append_line(self.path, row)
            journal = Journal(self.labels, handle, read_pairs(self.path), SEED)
            journal.choose(choice, seconds, journal.pairs[-1])
            write_rows(self.labelled, journal.labelled())
            return len(journal.pairs)
