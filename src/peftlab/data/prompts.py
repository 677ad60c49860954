"""Prompts for continuation: the openings of texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any


def openings(texts: Sequence[str], tokenizer: Any, low: int, high: int, seed: int) -> list[list[int]]:
    """The first `low` to `high` tokens (inclusive, uniform, seeded) of each text, as token ids.

    A text shorter than its draw gives all of it.
    """
    draw = random.Random(seed)
    encoded = tokenizer([t[: 40 * high] for t in texts], add_special_tokens=False)["input_ids"]
    return [ids[: draw.randint(low, high)] for ids in encoded]
