"""What `peftlab eval` is asked of policies, and what answers are compared by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..evaluation.policy import Measure
from ..rewards.parts import Reward
from ..rewards.spec import reward_of
from ..rl.rollout import PromptBatch
from ..runs.metrics import EVALUATION
from .before_after import REWARD, reward_columns
from .policy_run import PolicyRun

# What answers are compared by where nothing is said: the first of these that is measured.
HEADLINES = ("eval/judge", "rubric/all", REWARD)
# (prompts, completions, records) -> scores (N,)
Ruler = Callable[[Sequence[str], Sequence[str], Sequence[Any]], np.ndarray]


@dataclass(frozen=True)
class PolicyOptions:
    """Options of `peftlab eval` for runs of ppo, rloo and dpo. `reference_samples` and `chart` are of --frontier."""

    samples: int = 1
    checkpoint: int | None = None
    against: str | None = None
    by: str | None = None
    tie_margin: float = 0.01
    frontier: bool = False
    reference_samples: int = 64
    chart: Path = Path("frontier.svg")

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("samples", self.samples >= 1, "1 or more"),
            ("reference_samples", self.reference_samples >= 1, "1 or more"),
            ("tie_margin", 0 <= self.tie_margin < float("inf"), "0 or more"),
        ):
            if not fits:
                raise UserError(f"{_option(name)} {getattr(self, name)}: give {wanted}")
        if self.frontier and (self.against or self.checkpoint is not None):
            raise UserError("--frontier: takes every checkpoint of the runs; leave --against and --checkpoint out")
        if self.by and not (self.against or self.frontier):
            raise UserError("--by: says what --against or --frontier compares by; give one of them, or leave it out")

    def refuse(self, name: str) -> None:
        """UserError where an option was given, for what is no run of a policy."""
        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        if given:
            raise UserError(f"{_option(given[0])}: for runs of ppo, rloo or dpo, as in runs/ppo; {name} is none")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def with_reward(measure: Measure, reward: Reward | None) -> Measure:
    """A measure that tells the reward too, and of several parts each that it does not tell anyway."""
    if reward is None:
        return measure

    def both(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> dict[str, np.ndarray]:
        found = measure(prompts, completions, records)
        return found | reward_columns(reward, prompts, completions, records, found)

    return both


def ruler_of(opened: PolicyRun, by: str | None, prompts: PromptBatch) -> tuple[str, Ruler]:
    """(metric, scores) that answers are compared by: `by` is the name of a measure of the run's, or a reward's line.

    A line's parts are not normalised. None takes the first of `HEADLINES` that the run measures. UserError where there
    is none.
    """
    if by and not by.startswith(EVALUATION):
        config = opened.config
        line = reward_of(by, config.want, getattr(config, "style", ()), config.device, opened.ground)
        return REWARD, ruler_by(line)
    measure = opened.measure()
    # Asked on one row before anything is sampled, so that a name that is not measured costs seconds.
    known = list(measure(prompts.texts[:1], prompts.texts[:1], prompts.records[:1]))
    name = by or next((name for name in HEADLINES if name in known), REWARD)
    if name in known:
        return name, lambda *texts: measure(*texts)[name]
    if name == REWARD and (reward := opened.reward()) is not None:
        return name, ruler_by(reward)
    raise UserError(
        f"--by {by or '(not given)'}: run {opened.run.name} measures {', '.join(known) or 'nothing but the KL'}; "
        "give one of its measures, or a reward as in imdb-sentiment + 0.5*rubric:length"
    )


def ruler_by(reward: Reward) -> Ruler:
    """Scores by a reward."""
    return lambda *texts: reward(*texts)[0].double().numpy()
