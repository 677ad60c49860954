"""Prompts of your own, taken whole, and a reward of your own, which measures as well; a judge only if you name one."""

from __future__ import annotations

from .task import WHOLE, Task, judged

_PROMPTS = "task custom has no prompts of its own; give a file whose rows have a `prompt`"
TASK = Task(
    "custom",
    judged,
    keys={"train": "", "test": "", "reward": "", "want": "", "judge": "", "prompt_tokens": WHOLE},
    needs={
        "train": _PROMPTS,
        "test": f"{_PROMPTS}, other than those trained on",
        "reward": "task custom has none of its own; give a reward model, rubric:PART or module:function",
    },
)
