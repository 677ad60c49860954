"""What a policy is trained for: one file a task, and its line in TASKS. What a task may say: `task.py`."""

from __future__ import annotations

from . import continuation, custom, explanation

TASKS = {task.name: task for task in (continuation.TASK, explanation.TASK, custom.TASK)}
