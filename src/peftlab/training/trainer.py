"""transformers' Trainer with the lab's sampler, checkpoints, log and stop.

Trainer writes its checkpoint into a staging folder that the store hashes and renames, and of the model only what
learns; it resumes from the newest verified one. A loss or gradient that is not finite stops it, without an update: a
fused optimizer leaves the weights as they are by itself, so the host need not wait for a step before the next one.
Where a batch comes in parts (gradient accumulation, or several processes), each part's mean loss counts by its share of
what the batch's loss is a mean over, so that the parts make the gradient of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..data.tokenize import IGNORED
from ..errors import Interrupted, LabError
from ..ops import ranks
from ..runs.checkpoint import CheckpointStore
from .callback import LabCallback, Log
from .look import Look
from .sampler import BucketSampler

Loss = Callable[[Any, torch.Tensor], torch.Tensor]
WEIGHTS = "trained.safetensors"
LOSS = "train/loss"
FILLER = "filler"  # in a batch: its row only keeps the process in step with the others, and counts for nothing


class LabTrainer(Trainer):
    """Trains the parameters of `model` that require gradients.

    `lengths`: tokens of each training row; where `rows` are several passes (see BucketSampler), of those of one.
    `loss`: the mean loss of a batch from the model's output and the batch's labels; by default the model's own.
    `groups`: the parameters with what AdamW does to each; by default one learning rate for all.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rows: Sequence[Any],
        lengths: Sequence[int],
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        store: CheckpointStore,
        log: Log,
        stop_requested: Callable[[], int | None],
        loss: Loss | None = None,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        given = (lambda outputs, labels, **_: loss(outputs, labels)) if loss else None
        optimizer = torch.optim.AdamW(groups, fused=args.device.type == "cuda") if groups else None
        super().__init__(
            model=model,
            args=args,
            train_dataset=Rows(rows),
            data_collator=collate if ranks.size() == 1 else lambda batch: _own_part(batch, collate),
            compute_loss_func=given,
            optimizers=(optimizer, None),
        )
        self.lengths, self.store, self.staging = list(lengths), store, ""
        self.in_parts, self.counted = args.gradient_accumulation_steps * ranks.size() > 1, 0
        self.loss_is_scaled_for_ga = self.in_parts or None
        self.remove_callback(PrinterCallback)
        self.look: Look | None = None
        self.stopper = LabCallback(log, stop_requested, args.max_steps, self._require_finite, self._weight)
        self.add_callback(self.stopper)

    def fit(self, checkpoint: Path | None) -> None:
        """Train to the end or to a stop, from the start or from a checkpoint's folder.

        Raises Interrupted after a signal (the checkpoint is written), LabError where a number is not finite.
        """
        folder = str(_inside(checkpoint)) if checkpoint else None
        state = TrainerState.load_from_json(f"{folder}/{TRAINER_STATE_NAME}") if folder else self.state
        if folder and state.global_step >= self.args.max_steps:  # Trainer would make one step more
            self._load_from_checkpoint(folder)
            self.state = state
            return
        if ranks.rank():  # dropout of its own; a resume takes each process's generators from the checkpoint
            torch.manual_seed(self.args.seed + ranks.rank())
        self.train(resume_from_checkpoint=folder)
        if self.stopper.signum:
            raise Interrupted(self.stopper.signum)

    def _get_train_sampler(self, train_dataset: Any = None) -> BucketSampler:
        rows: Any = self.train_dataset
        passes = len(rows) // len(self.lengths)
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return BucketSampler(self.lengths, batch, self.args.seed, passes=passes)

    def get_train_dataloader(self) -> Any:
        if ranks.size() == 1:
            return super().get_train_dataloader()
        # Every process goes through all batches, as one alone would, and `_own_part` takes its rows of each: accelerate
        # would fill the last batch up with rows of the first, and lose the epoch on a resume.
        rows: Any = self.train_dataset
        loader = torch.utils.data.DataLoader(
            rows,
            self.args.per_device_train_batch_size,
            sampler=self._get_train_sampler(),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
        )

    def _get_output_dir(self, trial: Any) -> str:
        return self.staging

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._require_finite()
        with self.store.stage(self.state.global_step) as folder:
            self.staging = str(folder)
            super()._save_checkpoint(model, trial)
            _share_generators(folder)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        parts, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self.in_parts:
            return parts, items
        self.counted = sum(ranks.objects(sum(map(_counted, parts))))
        return parts, None

    def floating_point_ops(self, inputs: Any) -> int:
        """Nobody asks for them, and Trainer would walk over all modules for them, each step."""
        return 0

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        if not self.in_parts:
            return super().compute_loss(model, inputs, *args, **options)
        if FILLER in inputs:
            model.eval()  # what takes note of the rows that it is trained on leaves this one out
        share = _counted(inputs) / max(self.counted, 1)
        bare = {name: value for name, value in inputs.items() if name != FILLER}
        loss: Any = super().compute_loss(model, bare, *args, **options)
        if not share:
            loss = torch.nan_to_num(loss)  # a part without a label has the mean of nothing
        return loss * share * ranks.size()  # gradients become the mean over the processes

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Makes the gradients; returns the loss as it counts in the log's mean."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._settle()  # of the step before, only now: the device has had its next work meanwhile
        if ranks.size() == 1 or self.accelerator.sync_gradients:
            self._look(loss)  # else once the processes have one gradient, and all or none of them stop
        return loss * self._weight(self.state.global_step + 1)

    def _weight(self, step: int) -> float:
        """The rows of this step's batch as a share of a whole one's: below 1 where it is an epoch's short last."""
        rows, size = len(self.lengths), self.args.train_batch_size * self.args.gradient_accumulation_steps
        before = (step - 1) % -(-rows // size) * size
        return min(size, rows - before) / min(size, rows)

    def _look(self, loss: torch.Tensor) -> None:
        """At loss and gradients, and at what the update before made of the weights: Adam may overflow on gradients that
        are finite."""
        gradients = {f"the gradient of {n}": p.grad for n, p in self.learned.items() if p.grad is not None}
        self.look = Look(self.state.global_step + 1, {**self.learned, LOSS: loss, **gradients})
        bare: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if bare.defaults.get("fused"):
            bare.found_inf = self.look.bad
        else:
            self._settle()

    def _settle(self) -> None:
        """Raises LabError where the last look found what is not finite."""
        look, self.look = self.look, None
        if look is None or not (sites := look.sites()):
            return
        site = next(iter(sites))
        if site in self.learned:
            raise LabError(f"step {look.step - 1}: its update made {site} {sites[site]}; lower lr")
        holds = "is" if site == LOSS else "holds"
        raise LabError(
            f"step {look.step}: {site} {holds} {sites[site]}; its update was not made; lower lr, or look at the step's "
            f"training rows {self._rows_of_step(look.step)}"
        )

    def _require_finite(self) -> None:
        """Of the step just made, before it is told or saved; waits for it."""
        self._settle()
        self.look = Look(self.state.global_step + 1, self.learned)
        self._settle()

    def _rows_of_step(self, step: int) -> list[int]:
        """Numbers, from 0, of the training rows in a step's batch."""
        sampler = self._get_train_sampler()
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        epoch, batch = divmod(step - 1, -(-len(sampler) // size))
        sampler.set_epoch(epoch)
        return list(sampler)[batch * size : (batch + 1) * size]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.staging)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: p.detach().cpu().contiguous() for n, p in self.learned.items()}, folder / WEIGHTS)

    @cached_property  # each step asks, and to find them takes a walk over all modules
    def learned(self) -> dict[str, torch.Tensor]:
        model: Any = self.model
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        if saved.keys() != self.learned.keys():
            raise LabError(f"{resume_from_checkpoint}: holds other parameters than this model trains")
        with torch.no_grad():
            for name, parameter in self.learned.items():
                parameter.copy_(saved[name])


class Rows(torch.utils.data.Dataset[Any]):
    """A list as a dataset."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def _own_part(rows: Sequence[Any], collate: Callable[[Sequence[Any]], dict[str, Any]]) -> dict[str, Any]:
    """This process's rows of a batch, as a batch: every so many, since they stand by length."""
    own = rows[ranks.rank() :: ranks.size()]
    return collate(own) if own else collate(rows[:1]) | {FILLER: torch.tensor(True)}


def _share_generators(folder: Path) -> None:
    """Trainer saves each process's generators where that process saves: the checkpoint is to hold all of them."""
    mine = {file.relative_to(folder): file.read_bytes() for file in folder.glob("*/rng_state_*.pth")}
    for files in ranks.objects(mine):
        for name, data in files.items():
            (folder / name).write_bytes(data)


def _counted(batch: Mapping[str, torch.Tensor]) -> int:
    """What the loss of a batch is a mean over: tokens with a label where each has one, else rows."""
    if FILLER in batch:
        return 0
    labels = batch.get("labels")
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        return int((labels != IGNORED).sum())
    return len(next(iter(batch.values())))


def _inside(step_folder: Path) -> Path:
    return next(step_folder.glob("checkpoint-*"))
