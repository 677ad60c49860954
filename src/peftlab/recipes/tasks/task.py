"""What a task is: its own values of a config's keys, those that do nothing for it, and what answers are measured by.

The keys, and what becomes of a task's words: `config.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...evaluation.policy import Measure
from ...models.backbone import scoring_dtype
from ...models.classifier import TextClassifier
from ...rewards.sentiment import class_of
from ...runs.rundir import RunDir
from ..common import note_model

if TYPE_CHECKING:
    from .config import TaskConfig

WHOLE = (0, 0)  # prompt_tokens of prompts that are taken whole


@dataclass(frozen=True)
class Task:
    """A job for a policy, whichever recipe does it.

    `measure` makes, before the training, what answers to held-out prompts are measured by.
    `keys` are the task's own values of keys, where a config gives none. Any other value of those in `idle` is refused,
    and an empty one of those in `needs`: each tells why. "train" and "test" are the data of its prompts, which recipes
    call by different names.
    """

    name: str
    measure: Callable[[RunDir, TaskConfig], Measure]
    keys: Mapping[str, Any] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)


def judged(run: RunDir, config: TaskConfig) -> Measure:
    """The probability of `want` by the independent classifier `judge`, which is noted in the run; without one nothing.

    UserError where there is no such classifier, or it does not know `want`.
    """
    if not config.judge:
        return lambda prompts, completions, records: {}
    judge = TextClassifier.load(config.judge, device=config.device, dtype=scoring_dtype(config.device))
    label = class_of(judge, config.want)
    note_model(run, "judge", config.judge)

    def measure(prompts: Any, completions: Any, records: Any) -> dict[str, Any]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return {"eval/judge": judge.probabilities(texts)[:, label].double().numpy()}

    return measure
