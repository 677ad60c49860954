"""Continue the openings of reviews so that the whole is of the wanted sentiment; an independent classifier judges."""

from __future__ import annotations

from .task import Task, judged

TASK = Task(
    "continuation",
    judged,
    needs={
        "want": "give positive or negative, which a continuation is steered to",
        "judge": "give the classifier that judges the continuations, for example imdb-judge",
    },
)
