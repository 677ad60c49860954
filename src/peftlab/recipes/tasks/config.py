"""The keys that every recipe of a policy has, and what a task makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from ...config import Config
from ...errors import did_you_mean
from ...models.adapters import PolicyLora
from . import TASKS
from .task import WHOLE


class TaskConfig(Config):
    """A key that a config leaves out has its task's value, if the task has one."""

    # What the recipe calls the keys of a task's prompts; a key that it has not is left out.
    CALLED: ClassVar[Mapping[str, str]] = {}

    recipe: str
    task: str = Field("continuation", description=f"what the policy is for: {', '.join(TASKS)}")
    model: str = Field("tiny-gpt2", description="a base model, or an adapter (an SFT run's) that becomes the reference")
    want: Literal["", "positive", "negative"] = Field("positive", description="the sentiment to steer to, or to judge")
    judge: str = Field("imdb-judge", description="classifier of the evaluation; never what the policy learns from")
    prompt_tokens: tuple[int, int] = Field((2, 8), description="openings of so many tokens; 0, 0 = whole prompts")
    max_new_tokens: int = Field(24, ge=1)
    eval_prompts: int = Field(256, ge=1, description="prompts of the evaluation before and after")
    lora: PolicyLora = PolicyLora()
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = "auto"

    @classmethod
    def of_task(cls, said: Mapping[str, Any]) -> dict[str, Any]:
        """What a task says of keys, by the names of this config's, as far as it has them."""
        named = {cls.CALLED.get(key, key): value for key, value in said.items()}
        return {key: value for key, value in named.items() if key in cls.model_fields}

    @model_validator(mode="before")
    @classmethod
    def _keys_of_the_task(cls, given: dict[str, Any]) -> dict[str, Any]:
        task = given.get("task", cls.model_fields["task"].default)
        return {**cls.of_task(TASKS[task].keys), **given} if task in list(TASKS) else given

    @field_validator("task")
    @classmethod
    def _task_exists(cls, task: str) -> str:
        if task not in TASKS:
            hint = f" ({near})" if (near := did_you_mean(task, TASKS)) else ""
            raise ValueError(f"there are {', '.join(TASKS)}{hint}")
        return task

    @field_validator("prompt_tokens")
    @classmethod
    def _a_range_or_whole(cls, tokens: tuple[int, int]) -> tuple[int, int]:
        low, high = tokens
        if not 1 <= low <= high and tokens != WHOLE:
            raise ValueError("expected 1 <= shortest <= longest, or 0, 0 for whole prompts")
        return tokens

    @model_validator(mode="after")
    def _keys_act(self) -> Self:
        task = TASKS[self.task]
        for key, why in self.of_task(task.idle).items():
            if getattr(self, key) != self.of_task(task.keys)[key]:
                raise ValueError(f"{key}: {why}")
        for key, why in self.of_task(task.needs).items():
            if not getattr(self, key):
                raise ValueError(f"{key}: {why}")
        if self.judge and not self.want:
            raise ValueError("want: give positive or negative, which the judge looks for")
        return self
