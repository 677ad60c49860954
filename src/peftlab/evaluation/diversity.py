"""How varied texts are: words are lower-cased and split at white space."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from ..data.overlap import ngrams

ORDERS = 4
_NOTHING = 0.1  # what no match at all counts as, over the n-grams there are (Chen and Cherry 2014, method 1)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams, pooled over the texts (Li et al. 2016); 0 where there are none.

    It falls as the number of texts grows: compare sets of one size and length.
    """
    pooled: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        pooled.update(ngrams(text.lower().split(), n))
    return len(pooled) / pooled.total() if pooled else 0.0


def self_bleu_4(texts: Sequence[str]) -> float:
    """Mean BLEU-4 of each text with all others as references (Zhu et al. 2018), from 0 to 1; 0 of fewer than two.

    It rises with the number of texts: compare sets of one size.
    """
    words = [text.lower().split() for text in texts]
    if len(words) < 2:
        return 0.0
    logs = [0.0] * len(words)
    for n in range(1, ORDERS + 1):
        counts = [ngrams(w, n) for w in words]
        largest = _two_largest(counts)
        for row, own in enumerate(counts):
            matches = sum(min(count, largest[gram][1 if largest[gram][2] == row else 0]) for gram, count in own.items())
            logs[row] += math.log((matches or _NOTHING) / max(1, own.total())) / ORDERS
    lengths = [len(w) for w in words]
    return sum(_brevity(i, lengths) * math.exp(log) for i, log in enumerate(logs)) / len(words)


def _two_largest(counts: Sequence[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """Of each n-gram: its largest count in one text, its next largest in another, and which text has the largest."""
    found: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for row, own in enumerate(counts):
        for gram, count in own.items():
            first, second, where = found.get(gram, (0, 0, -1))
            found[gram] = (count, first, row) if count > first else (first, max(second, count), where)
    return found


def _brevity(row: int, lengths: Sequence[int]) -> float:
    """BLEU's penalty for being shorter than the other text whose length is nearest (the shorter of two as near)."""
    own, others = lengths[row], sorted([*lengths[:row], *lengths[row + 1 :]])
    if own == 0:
        return 0.0
    at = bisect_left(others, own)
    nearest = min(others[max(0, at - 1) : at + 1], key=lambda length: (abs(length - own), length))
    return 1.0 if own >= nearest else math.exp(1 - nearest / own)
