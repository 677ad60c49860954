"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), F-measures without stemming, equal to rouge-score's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.overlap import f_measure, ngrams, words
from .intervals import bootstrap_mean

NAMES = ("eval/rouge1", "eval/rouge2", "eval/rougeL")


@dataclass(frozen=True)
class Rouge:
    """`rows` (N, 3): each row's ROUGE-1, -2 and -L, 0 to 1. `metrics` and `intervals`: means x 100 by the registry's
    names, with their 95% bootstrap intervals over rows."""

    rows: np.ndarray
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def rouge(candidates: Sequence[str], references: Sequence[str]) -> Rouge:
    """Scores of summaries against one reference each. Raises ValueError for no rows, or unequal numbers of them."""
    if not candidates:
        raise ValueError("ROUGE of no rows is undefined")
    rows = np.array([rouge_row(*pair) for pair in zip(candidates, references, strict=True)])
    points = dict(zip(NAMES, 100 * rows.T, strict=True))
    return Rouge(
        rows,
        {name: float(values.mean()) for name, values in points.items()},
        {name: bootstrap_mean(values) for name, values in points.items()},
    )


def rouge_row(candidate: str, reference: str) -> tuple[float, float, float]:
    """ROUGE-1, ROUGE-2, ROUGE-L F-measures of one text against one reference, 0 to 1; 0 where either has no words."""
    said, wanted = words(candidate), words(reference)
    scores = []
    for n in (1, 2):
        found, given = ngrams(said, n), ngrams(wanted, n)
        scores.append(f_measure((found & given).total(), found.total(), given.total()))
    return scores[0], scores[1], f_measure(longest_common(said, wanted), len(said), len(wanted))


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bit-parallel dynamic programming (Hyyrö 2004).

    Bit i of `row` is 0 where the table's current row grows at column i, so the zeros count the length.
    """
    where: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(a):
        where[word] |= 1 << place
    full = row = (1 << len(a)) - 1
    for word in b:
        match = row & where.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()
