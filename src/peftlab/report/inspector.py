"""The inspector of a page: recorded rollouts token by token, by step and, where a prompt came again, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import text
from .read import Row, as_number
from .recorded import COLUMNS, MEASURES, Recorded, parts_of, rows_at, tokens_of

MOST_STEPS = 5
MOST_ANSWERS = 4  # of one step
MOST_PROMPTS = 3  # that came again
MOST_TOKENS = 128  # of one answer
LONGEST_TOKEN = 80  # characters
_TITLES = {"advantage": "advantage", "kl": "KL", "reward": "reward"}


@dataclass(frozen=True)
class Measure:
    """What tokens may be coloured by, what either sign means, and from which size on the colour is full."""

    name: str
    title: str
    plus: str
    minus: str
    full: str

    @property
    def key(self) -> str:
        """The letter that stands for it in the page's classes and custom properties."""
        return self.name[0]


@dataclass(frozen=True)
class Token:
    """One token. `style`: its signed strength of each measure, -1 to 1; `shown`: (key, number) of each."""

    token: str
    style: str
    shown: list[tuple[str, str]]
    cells: list[str]


@dataclass(frozen=True)
class Answer:
    """One sampled rollout; `left_out` counts the tokens past the page's bound.

    `columns` are those that its tokens hold: without a critic there is no `value`.
    """

    step: int
    score: str
    parts: list[tuple[str, str]]
    columns: list[str]
    tokens: list[Token]
    left_out: int


@dataclass(frozen=True)
class Asked:
    """A prompt and recorded answers to it; `opening` is the beginning of a long prompt."""

    prompt_id: str
    prompt: str
    opening: str
    answers: list[Answer]


@dataclass(frozen=True)
class Group:
    """A heading and prompts below it. `by_step`: the answers of a prompt are of several steps."""

    heading: str
    asked: list[Asked]
    by_step: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Inspector:
    """All of the section. `critic`: whether the rollouts hold a critic's values."""

    measures: list[Measure]
    groups: list[Group]
    rows: int
    steps: int
    critic: bool


def inspector_of(run_path: Path, recorded: Recorded) -> Inspector | None:
    """The section of the run folder `run_path`; None where it recorded no rollouts."""
    if not recorded.rows:
        return None
    again = _again(recorded)
    steps = _spread(recorded.steps, 2 if again else MOST_STEPS)
    plain = {
        step: [at for name, rows in recorded.prompts(step).items() if name not in again for at in rows][:MOST_ANSWERS]
        for step in steps
    }
    wanted = sorted({at for rows in [*again.values(), *plain.values()] for at in rows})
    found = dict(zip(wanted, rows_at(run_path, wanted), strict=False))

    def answered(rows: Iterable[int]) -> list[Asked]:
        asked: dict[str, list[Row]] = {}
        for at in rows:
            if at in found:
                asked.setdefault(recorded.rows[at][1], []).append(found[at])
        return [_asked(prompt_id, answers, recorded.scales) for prompt_id, answers in asked.items()]

    groups = [Group("The same prompt, step by step", answered(at for rows in again.values() for at in rows), True)]
    groups += [
        Group(f"Step {step}", answered(rows), folded=0 < nth < len(plain) - 1)
        for nth, (step, rows) in enumerate(plain.items())
    ]
    critic = any("value" in token for row in found.values() for token in tokens_of(row))
    return Inspector(
        measures=[measure_of(name, size, critic) for name, size in recorded.scales.items()],
        groups=[group for group in groups if group.asked],
        rows=len(recorded.rows),
        steps=len(recorded.steps),
        critic=critic,
    )


def measure_of(name: str, full: float, critic: bool) -> Measure:
    """The measure `name` of MEASURES in words."""
    than = "the critic expected" if critic else "the other answers to the prompt"
    plus, minus = {
        "advantage": (f"better than {than}", "worse"),
        "kl": ("the policy likes the token more than the frozen reference does", "less"),
        "reward": ("the token was paid", "it cost"),
    }[name]
    return Measure(name, _TITLES[name], plus, minus, text.number(full))


def strength(value: float | None, full: float) -> float:
    """How strongly a number colours, -1 to 1."""
    return 0.0 if value is None else max(-1.0, min(1.0, value / full))


def _again(recorded: Recorded) -> dict[str, list[int]]:
    """The first prompts that came in several steps, each with its first answer in some of them."""
    first: dict[str, dict[int, int]] = {}
    for at, (step, prompt_id) in enumerate(recorded.rows):
        if prompt_id:
            first.setdefault(prompt_id, {}).setdefault(step, at)
    several = [(prompt_id, rows) for prompt_id, rows in first.items() if len(rows) > 1][:MOST_PROMPTS]
    return {prompt_id: [rows[step] for step in _spread(sorted(rows), MOST_STEPS)] for prompt_id, rows in several}


def _spread(items: list[int], most: int) -> list[int]:
    """At most `most` of the items, the first and the last among them, the others evenly between."""
    if len(items) <= most:
        return items
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def _asked(prompt_id: str, rows: list[Row], scales: dict[str, float]) -> Asked:
    prompt = str(rows[0].get("prompt", ""))
    return Asked(prompt_id, prompt, text.opening(prompt), [_answer(row, scales) for row in rows])


def _answer(row: Row, scales: dict[str, float]) -> Answer:
    tokens = tokens_of(row)
    shown = tokens[:MOST_TOKENS]
    columns = [name for name in COLUMNS if any(name in token for token in shown)]
    return Answer(
        step=int(as_number(row.get("step")) or 0),
        score=text.signed(as_number(row.get("score"))),
        parts=[(name, text.signed(value)) for name, value in parts_of(row).items()],
        columns=columns,
        tokens=[_token(token, columns, scales) for token in shown],
        left_out=len(tokens) - len(shown),
    )


def _token(token: Row, columns: list[str], scales: dict[str, float]) -> Token:
    said, values = str(token.get("token", "")), {name: as_number(token.get(name)) for name in columns}
    shares = {name[0]: round(strength(values.get(name), full), 2) for name, full in scales.items()}
    return Token(
        token=said if len(said) <= LONGEST_TOKEN else f"{said[:LONGEST_TOKEN]}…",
        style=";".join(
            f"--{key}:{share:g}".replace(":0.", ":.").replace("-0.", "-.") for key, share in shares.items() if share
        ),
        shown=[(name[0], text.fixed(values.get(name), 2, plus=True)) for name in scales],
        cells=[text.fixed(value, 3, plus=name in MEASURES) for name, value in values.items()],
    )
