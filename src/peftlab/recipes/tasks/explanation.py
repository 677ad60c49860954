"""Say whether a review is positive or negative, and why, in words that cite it; the rubric knows the true label."""

from __future__ import annotations

from ...evaluation.explanations import rubric_columns
from ...rewards.rubric import RUBRIC
from .task import WHOLE, Task

TASK = Task(
    "explanation",
    lambda run, config: rubric_columns,
    keys={
        "train": "imdb-explanations:train",
        "test": "imdb-explanations:test",
        "reward": " + ".join(f"rubric:{part}" for part in RUBRIC),
        "want": "",
        "judge": "",
        "prompt_tokens": WHOLE,
        "max_new_tokens": 64,
        "eos_penalty": 1.0,
    },
    idle={
        "want": "does nothing in task explanation, where each review has a true label of its own; leave it out",
        "judge": "does nothing in task explanation, which is measured by the rubric; leave it out",
        "prompt_tokens": "does nothing in task explanation, whose question stands behind the review; leave it out",
    },
)
