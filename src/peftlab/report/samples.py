"""Model text: samples before and after, and rollouts token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import text
from .read import Row, as_number

MOST_TOKENS = 256
OPENING = 240  # characters of a long prompt that show before it is unfolded
TOKEN_COLUMNS = ("logprob", "ref_logprob", "kl", "value", "reward", "advantage")
_SIGNED = frozenset({"kl", "reward", "advantage"})


@dataclass(frozen=True)
class Side:
    """What one side wrote, and its measures; side is before, after or reference."""

    side: str
    completion: str
    measures: list[tuple[str, str]]


@dataclass(frozen=True)
class Pair:
    """One prompt with what was written before and after, and the reference where there is one."""

    prompt: str
    sides: list[Side]

    @property
    def apart(self) -> bool:
        """Whether the prompt stands above its answers, once: they do not continue its line, as a story's would."""
        return "\n" in self.prompt

    @property
    def opening(self) -> str:
        """The beginning of a prompt too long to stand unfolded; empty for others."""
        return f"{self.prompt[:OPENING]} …" if len(self.prompt) > 2 * OPENING else ""


@dataclass(frozen=True)
class Token:
    """One token. `strength` is |advantage| over the rollout's largest, 0 to 1; `sign` pos, neg or empty."""

    token: str
    sign: str
    strength: str
    advantage: str
    cells: list[str]


@dataclass(frozen=True)
class Rollout:
    """One sampled rollout; `left_out` counts the tokens past the page's bound.

    `columns` are those that its tokens hold: without a critic there is no `value`.
    """

    prompt_id: str
    prompt: str
    score: str
    parts: list[tuple[str, str]]
    columns: list[str]
    tokens: list[Token]
    left_out: int


def pairs_of(rows: list[Row]) -> tuple[list[Pair], list[list[tuple[str, str]]]]:
    """Rows with a side, paired by prompt; any other rows as lists of (key, value)."""
    paired: dict[str, dict[str, Row]] = {}
    others = []
    for row in rows:
        if row.get("side") in ("before", "after") and "completion" in row:
            paired.setdefault(str(row.get("prompt_id")), {})[row["side"]] = row
        else:
            others.append([(str(key), _cell(value)) for key, value in row.items()])
    return [_pair(sides) for sides in paired.values()], others


def rollout_of(row: Row) -> Rollout:
    """A row of rollouts.jsonl as the page shows it."""
    listed = row.get("tokens")
    tokens = [token for token in listed if isinstance(token, dict)] if isinstance(listed, list) else []
    shown = tokens[:MOST_TOKENS]
    largest = max((abs(as_number(token.get("advantage")) or 0.0) for token in shown), default=0.0)
    parts = row.get("score_parts")
    columns = [name for name in TOKEN_COLUMNS if name != "value" or any(name in token for token in shown)]
    return Rollout(
        prompt_id=str(row.get("prompt_id", "")),
        prompt=str(row.get("prompt", "")),
        score=text.signed(as_number(row.get("score"))),
        parts=[(str(n), text.signed(as_number(v))) for n, v in parts.items()]
        if isinstance(parts, dict)
        else [],
        columns=columns,
        tokens=[_token(token, columns, largest) for token in shown],
        left_out=len(tokens) - len(shown),
    )


def _pair(sides: dict[str, Row]) -> Pair:
    shown = [
        Side(side, str(sides[side]["completion"]), _measures(sides[side]))
        for side in ("before", "after")
        if side in sides
    ]
    reference = next((row["reference"] for row in sides.values() if row.get("reference")), None)
    if reference is not None:
        shown.append(Side("reference", str(reference), []))
    return Pair(str(next(iter(sides.values())).get("prompt", "")), shown)


def _measures(row: Row) -> list[tuple[str, str]]:
    numbers = ((key, as_number(value)) for key, value in row.items() if key not in ("prompt_id", "id"))
    return [(key, text.number(value)) for key, value in numbers if value is not None]


def _cell(value: Any) -> str:
    return text.number(value) if isinstance(value, float) else str(value)


def _token(token: Row, columns: list[str], largest: float) -> Token:
    values = {key: as_number(token.get(key)) for key in columns}
    advantage = values["advantage"]
    return Token(
        token=str(token.get("token", "")),
        sign="" if not advantage else "pos" if advantage > 0 else "neg",
        strength=f"{abs(advantage) / largest:.2f}" if advantage and largest else "0",
        advantage=text.fixed(advantage, 2, plus=True),
        cells=[text.fixed(value, 3, plus=key in _SIGNED) for key, value in values.items()],
    )
