"""What two texts share, words and n-grams as ROUGE counts them (Lin 2004), and two sets of rows. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from .records import (
    Conversation,
    LabelledText,
    PreferencePair,
    Prompt,
    PromptCompletion,
    Record,
    SummaryPair,
    Text,
)

_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Lower-cased runs of a-z and 0-9, unstemmed; what else there is (accents too) separates them."""
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of `n` tokens occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def f_measure(shared: int, found: int, wanted: int) -> float:
    """2PR / (P + R) with P = shared / found and R = shared / wanted: 2 shared / (found + wanted), 0 where none is."""
    return 2 * shared / (found + wanted) if shared else 0.0


def leaked(train: Sequence[Record], held_out: Sequence[Record]) -> list[Record]:
    """The held-out records of which training has the text, the document or the prompt; of answers, all texts."""
    known = set(map(_content, train))
    return [record for record in held_out if _content(record) in known]


def _content(record: Record) -> object:
    match record:
        case Text() | LabelledText():
            return record.text
        case SummaryPair():
            return record.document
        case Prompt():
            return record.prompt
        case PromptCompletion():
            return record.prompt, record.completion
        case PreferencePair():
            return record.prompt, record.chosen, record.rejected
        case Conversation():
            return record.messages
