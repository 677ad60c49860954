"""What a training tells as it goes: its figures by the registry's names, its progress, and that it is to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from ..ops import ranks
from ..runs.progress import Progress

Log = Callable[[Mapping[str, float], int], None]


class LabCallback(TrainerCallback):
    """Logs by the registry's names, stops on signals, shows how far it is; `made` raises where a step went wrong.

    `weight`: the share at which a step's loss is in what Trainer sums. The short last batch of an epoch may be a single
    row, whose loss and gradient are mostly chance: told beside those of whole batches, they look like a divergence. So
    the logged loss is a mean over rows, of a whole batch's at least, and no gradient norm is told of a short batch.
    """

    def __init__(
        self,
        log: Log,
        stop_requested: Callable[[], int | None],
        total: int,
        made: Callable[[], None],
        weight: Callable[[int], float],
    ) -> None:
        self.write, self.stop_requested, self.progress = log, stop_requested, Progress(total)
        self.made, self.weight = made, weight
        self.since = 0  # the step behind which the sum of the next log begins
        self.signum: int | None = None
        self.logged = ""  # what a line between two logged steps says: the loss of the first, and which that is

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.since = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.signum = ranks.agreed(self.stop_requested())
        if self.signum:
            control.should_save = control.should_training_stop = True
        if not control.should_log:  # else its own figures come in a moment
            self.progress.show(state.global_step, self.logged)
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        self.made()
        names = {"loss": "train/loss", "learning_rate": "train/lr", "grad_norm": "train/grad_norm"}
        found = {ours: float((logs or {})[theirs]) for theirs, ours in names.items() if theirs in (logs or {})}
        if "train/loss" in found:
            found["train/loss"] = self._mean_loss(state)
        if self.weight(state.global_step) < 1:
            found.pop("train/grad_norm", None)
        if found:
            self.write(found, state.global_step)
            told = f"loss {found.get('train/loss', math.nan):.4f}"
            self.logged = f"{told} at step {state.global_step}"
            self.progress.show(state.global_step, told)

    def _mean_loss(self, state: Any) -> float:
        """The mean over the rows since the last log, with those before it where these are fewer than a batch.

        Trainer divides the sum by its steps, and keeps it in a history that checkpoints hold. What it has summed up
        since is in none: of a run that was stopped between two logs, the next tells the rows after the stop.
        """
        row = state.log_history[-1]
        weights = [self.weight(step) for step in range(self.since + 1, state.global_step + 1)]
        row["weight"], row["sum"] = sum(weights), row["loss"] * len(weights)
        self.since = state.global_step
        total = weight = 0.0
        for earlier in reversed([row for row in state.log_history if "weight" in row]):
            total, weight = total + earlier["sum"], weight + earlier["weight"]
            if weight >= 1:
                break
        return total / weight
