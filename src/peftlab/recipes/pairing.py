"""Scored answers to pairs, and pairs to the two sides of a split."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.records import Prompt, parse_row
from ..errors import LabError
from .makers import number_of

HASHES = 2**63  # `number_of` is below it


@dataclass(frozen=True)
class Answer:
    """A sampled answer: which of its prompt's it is, its seed, score and the score's parts; whether EOS ended it."""

    number: int
    seed: int
    text: str
    score: float
    parts: dict[str, float]
    ended: bool


def pairs_of(
    records: Sequence[Prompt],
    answers: Sequence[Sequence[Answer]],
    min_margin: float,
    most: int,
    facts: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows, in the order of the prompts, of at most `most` pairs each, widest margin first; and how many possible
    pairs were dropped, by why.

    Of answers alike the first stays. A pair is dropped where it is no row of preferences (an empty answer, a control
    character), where the scores are less than `min_margin` apart or equal, and where a row says the same already.
    `facts` go into each row's source.
    """
    rows: list[dict[str, Any]] = []
    dropped = Counter({"same answer": 0, "unusable": 0, "near ties": 0, "more than wanted": 0, "duplicates": 0})
    taken: set[tuple[str, str, str]] = set()
    for record, own in zip(records, answers, strict=True):
        told = list({answer.text: answer for answer in reversed(own)}.values())[::-1]
        dropped["same answer"] += math.comb(len(own), 2) - math.comb(len(told), 2)
        usable = [answer for answer in told if _usable(record, answer)]
        dropped["unusable"] += math.comb(len(told), 2) - math.comb(len(usable), 2)
        pairs = [sorted(pair, key=lambda a: -a.score) for pair in itertools.combinations(usable, 2)]
        apart = [(a, b) for a, b in pairs if a.score - b.score >= min_margin and a.score > b.score]
        dropped["near ties"] += len(pairs) - len(apart)
        apart.sort(key=lambda pair: pair[1].score - pair[0].score)  # stable: ties keep the order of the answers
        dropped["more than wanted"] += len(apart[most:])
        for better, worse in apart[:most]:
            if (key := (record.prompt, better.text, worse.text)) in taken:
                dropped["duplicates"] += 1
                continue
            taken.add(key)
            rows.append(_row(record, better, worse, facts))
    return rows, dict(dropped)


def _usable(record: Prompt, answer: Answer) -> bool:
    try:
        parse_row("prompts", {"prompt": answer.text}, 0)
        parse_row("prompts", {"prompt": record.prompt}, 0)
    except ValueError:
        return False
    return True


def _row(record: Prompt, better: Answer, worse: Answer, facts: Mapping[str, Any]) -> dict[str, Any]:
    label = {} if record.label is None else {"label": record.label}
    return {
        "id": f"{record.id}:{better.number}-{worse.number}",
        "prompt": record.prompt,
        "chosen": better.text,
        "rejected": worse.text,
        "margin": round(better.score - worse.score, 6),
        **label,
        "source": {
            **facts,
            "scores": {"chosen": better.parts, "rejected": worse.parts},
            "chosen_seed": better.seed,
            "rejected_seed": worse.seed,
            "chosen_ended": better.ended,
            "rejected_ended": worse.ended,
        },
    }


def split(rows: Sequence[dict[str, Any]], held_out: float) -> dict[str, list[dict[str, Any]]]:
    """{"train": rows} and, where something is held out, "test": by the hash of the prompt's text. Raises LabError."""
    places = {prompt: number_of("held out", prompt) for prompt in {row["prompt"] for row in rows}}
    if held_out >= len(places):
        raise LabError(f"--held-out {held_out:g}: prompts with pairs are {len(places)}, which leaves none to train on")
    bound = sorted(places.values())[int(held_out)] if held_out >= 1 else held_out * HASHES
    sides = {"train": [row for row in rows if places[row["prompt"]] >= bound]}
    if held_out:
        sides["test"] = [row for row in rows if places[row["prompt"]] < bound]
    for name, side in sides.items():
        if not side:
            raise LabError(
                f"--held-out {held_out:g}: of {len(places)} prompts with pairs none falls to {name}; "
                "give a number of prompts, or more --limit"
            )
    return sides
