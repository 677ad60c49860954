"""A reward as one line of a config: parts joined by +, each a name with a weight before it where that is not 1.

    imdb-sentiment + 0.5*rubric:length + runs/mine/adapter + my_rewards:politeness

A part is a sentiment classifier (its log-odds, or as p(NAME) its probability, normalised), a reward model (scaled as
when it was trained; a whole one of a folder or the Hub normalised), a part of the rubric, or a Python function,
module:function. A folder whose name has a + or a * in
it stands between quotes.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from ..models.backbone import Backbone
from ..models.catalog import named
from ..models.classifier import TextClassifier
from ..models.stacks import Stack, kind_of
from ..models.whole import WholeReward, load_reward
from .learned import learned
from .parts import Reward, RewardPart, dotted, user_function
from .rubric import RUBRIC, Part, style
from .sentiment import log_odds, probability

STYLE = "style"  # the part of the rubric that takes its patterns from the config
SUM = "reward"  # what their weighted sum is called, and so no part
_WEIGHT = r"(?:(?P<weight>[-\d.eE]+)\s*\*)?"
_NAME = r"""(?:(?P<quote>['"])(?P<quoted>.+)(?P=quote)|(?P<plain>[^\s*'"](?:[^*'"]*[^\s*'"])?))"""
_TERM = re.compile(rf"\s*{_WEIGHT}\s*(?P<p>p\(\s*)?{_NAME}(?(p)\s*\))\s*")
_QUOTED = re.compile(r"[+*'\"]|^\s|\s$|^p\(")  # of a name alone that would be read as something else
_PIECE = re.compile(r"""((?:"[^"]*"|'[^']*'|[^+])*)(?:\+|$)""")


@dataclass(frozen=True)
class Term:
    """One part as it was written. `bounded`: as p(NAME)."""

    weight: float
    name: str
    bounded: bool = False

    def __str__(self) -> str:
        """As a line spells it."""
        quote = "'" if '"' in self.name else '"'
        name = f"{quote}{self.name}{quote}" if _QUOTED.search(self.name) else self.name
        name = f"p({name})" if self.bounded else name
        weight = repr(self.weight).replace("e+", "e")  # a + separates terms
        return name if self.weight == 1 else f"{weight}*{name}"

    @property
    def is_function(self) -> bool:
        """Whether it names a Python function."""
        return ":" in self.name and not self.is_rubric and not Path(self.name).exists()

    @property
    def is_rubric(self) -> bool:
        """Whether it names a part of the rubric."""
        return self.name.startswith("rubric:")

    @property
    def is_model(self) -> bool:
        """Whether it names a classifier or a reward model."""
        return not (self.is_function or self.is_rubric)


def terms(spec: str) -> list[Term]:
    """The parts of a reward's line, in order; none of an empty one. Raises UserError for what is no such line."""
    found: list[Term] = []
    for piece in _pieces(spec):
        match = _TERM.fullmatch(piece)
        try:
            weight = float(match["weight"] or 1) if match else math.nan
        except ValueError:
            weight = math.nan
        if match is None or not math.isfinite(weight):
            raise UserError(
                f"reward: {piece.strip()!r} is no part; write NAME or WEIGHT*NAME, joined by +, for example "
                "imdb-sentiment + 0.5*rubric:length; quotes keep a name with + or * together"
            )
        name = match["quoted"] or match["plain"]
        if match["plain"] and name.startswith("p(") and not Path(name).exists():
            raise UserError(f"reward: {name} lacks its closing bracket; write {name})")
        if function := _function_meant(name):
            raise UserError(f"reward: {name} is {function}")
        found.append(Term(weight, name, bool(match["p"])))
    return found


def _function_meant(name: str) -> str:
    """What a name is, and how to write it, where it is a module's of the working folder or a function's behind a dot.

    Nothing where it may be a model's, or has a colon.
    """
    if ":" in name or Path(name).exists() and not name.endswith(".py"):
        return ""
    spelled = dotted(name)
    if _file_of(spelled).is_file():
        return f"a module; name a function of it, {spelled}:FUNCTION"
    module, _, function = spelled.rpartition(".")
    if _file_of(module).is_file():
        return f"a function of a module; write a colon before it, {module}:{function}"
    return ""


def _file_of(module: str) -> Path:
    return Path(f"{module.replace('.', '/')}.py")


def with_runs(spec: str) -> str:
    """The line as a person typed it, with the folders of runs in the place of their names; see `catalog.named`."""
    found = terms(spec)
    taken = [replace(term, name=named(term.name)) if term.is_model else term for term in found]
    return spec if taken == found else " + ".join(map(str, taken))


def _pieces(spec: str) -> list[str]:
    """What the + outside quotes separate."""
    return [match[1] for match in _PIECE.finditer(spec + "+")][:-1] if spec.strip() else []


def reward_of(
    spec: str,
    want: str,
    patterns: Sequence[str] = (),
    device: str = "auto",
    ground: tuple[Backbone, Stack] | None = None,
) -> Reward:
    """The reward that a line names.

    `want`: the class that sentiment classifiers look for. `patterns`: regular expressions of rubric:style that are to
    be found in an answer, or, behind a !, are not.
    `ground`: what a policy stands on; a reward model of the same becomes one more adapter there, not a second base.
    Raises UserError where a part is none, or where there is no part at all.
    """
    parts = [_part(term, want, patterns, device, ground) for term in terms(spec)]
    if not parts:
        known = "a classifier, a reward model, rubric:PART or module:function"
        raise UserError(f"reward: nothing to optimise; name {known}")
    return Reward(tuple(_numbered(parts)))


def _numbered(parts: Sequence[RewardPart]) -> Iterator[RewardPart]:
    """The parts, a second one of the same name as NAME-2: each has a figure of its own."""
    taken: set[str] = set()
    for part in parts:
        names = itertools.chain([part.name], (f"{part.name}-{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        yield replace(part, name=name)


def _part(
    term: Term, want: str, patterns: Sequence[str], device: str, ground: tuple[Backbone, Stack] | None
) -> RewardPart:
    if term.bounded and (not term.is_model or kind_of(term.name) == "reward"):
        raise UserError(f"reward: p({term.name}) is a probability, which a sentiment classifier has; write {term.name}")
    if term.is_rubric:
        name = term.name.partition(":")[2]
        if name != STYLE and name not in RUBRIC:
            raise UserError(f"reward: {term.name} is no part of the rubric; known: {', '.join([*RUBRIC, STYLE])}")
        function = RUBRIC[name] if name != STYLE else _style(patterns)
        return RewardPart(name, function, term.weight)
    if term.is_function:
        called = term.name.rpartition(":")[2]
        return RewardPart("reward_function" if called == SUM else called, user_function(term.name), term.weight)
    if kind_of(term.name) == "reward":
        model = load_reward(term.name, device, ground)
        own_unit = isinstance(model, WholeReward)
        return RewardPart(_called(term.name), learned(model), term.weight, normalise=own_unit)
    classifier = TextClassifier.load(term.name, device=device)
    if term.bounded:
        return RewardPart(f"p-{_called(term.name)}", probability(classifier, want), term.weight, normalise=True)
    return RewardPart(_called(term.name), log_odds(classifier, want), term.weight, normalise=True)


def _style(patterns: Sequence[str]) -> Part:
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    return style([pattern for pattern in patterns if not pattern.startswith("!")], unwanted)


def _called(name: str) -> str:
    """The name of an adapter's part, which a metric bears: a folder's own, or its run's; not that of the sum."""
    path = Path(name).resolve()
    called = path.parent.name if path.name == "adapter" else path.name
    return "reward_model" if called == SUM else called
