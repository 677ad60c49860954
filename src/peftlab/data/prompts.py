"""Prompts as tokens: the openings of texts, or whole texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from .tokenize import encode


def openings(texts: Sequence[str], tokenizer: Any, low: int, high: int, seed: int) -> list[list[int]]:
    """The first `low` to `high` tokens (inclusive, uniform, seeded) of each text, as token ids; 0, 0 = all of it.

    A text shorter than its draw gives all of it.
    """
    if high == 0:
        return encode(texts, tokenizer)
    draw = random.Random(seed)
    encoded = tokenizer([t[: 40 * high] for t in texts], add_special_tokens=False)["input_ids"]
    return [ids[: draw.randint(low, high)] for ids in encoded]
