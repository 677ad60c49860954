"""What the recipes share."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from ..data.overlap import leaked
from ..data.sources import RecordSet, load_records, same_data
from ..models.catalog import resolve
from ..models.stacks import files_hash
from ..runs.progress import Progress, say
from ..runs.rundir import RunDir
from .several import of_first, require_same


def seed_everything(seed: int) -> None:
    """Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class DataConfig(Protocol):
    """The keys of a supervised recipe's config that say which rows it reads."""

    train_data: str
    eval_data: str
    train_limit: int
    eval_limit: int
    seed: int
    columns: dict[str, str]
    on_bad_row: Literal["stop", "skip"]


def load_rows(
    config: DataConfig, which: Literal["train", "eval"], kind: str, labels: list[str] | None = None
) -> RecordSet:
    """The training or the held-out rows of a config; a limit of 0 takes all.

    Where both are of the same data, the held-out rows are of those that training leaves: UserError if it leaves none.
    """
    spec, limit = _rows_asked(config, which)
    shared = which == "eval" and same_data(config.train_data, config.eval_data)
    trained_on = config.train_limit if shared else None
    return load_records(spec, kind, limit or None, config.seed, labels, config.columns, config.on_bad_row, trained_on)


def load_recorded(
    run: RunDir, config: DataConfig, which: Literal["train", "eval"], kind: str, labels: list[str] | None = None
) -> RecordSet:
    """`load_rows`, with their hash and what was skipped noted in the run. A resumed run refuses changed data."""
    data = load_rows(config, which, kind, labels)
    if which == "eval" and os.path.isfile(config.train_data) and not os.path.exists(config.eval_data):
        say(f"measures on {config.eval_data}; eval_data=FILE takes held-out rows of the kind that it is trained on")
    note_data(run, data, _rows_asked(config, which)[1])
    if data.skipped:
        run.record_skipped(which, data.skipped)
        say(f"{data.name}: {len(data.skipped)} bad rows skipped; {run.path / 'skipped.jsonl'} lists them")
    return data


def load_both(
    run: RunDir, config: DataConfig, kind: str, labels: list[str] | None = None
) -> tuple[list[Any], list[Any]]:
    """The training and the held-out records, each by `load_recorded`; tells which are both."""
    train, held_out = (load_recorded(run, config, which, kind, labels).records for which in ("train", "eval"))
    note_leak(run, config.eval_data, train, held_out)
    return train, held_out


def note_leak(run: RunDir, spec: str, train: Sequence[Any], held_out: Sequence[Any]) -> None:
    """Tells, and notes in the run, how many of the held-out records of `spec` are trained on."""
    if found := leaked(train, held_out):
        first, told = found[0].id, f"{len(found)} of {len(held_out)} held-out rows are trained on too"
        run.event("held_out_rows_trained_on", data=spec, rows=len(found), first=first)
        say(f"{spec}: {told}, the first with id {first}; the figures tell how well those are remembered")


def note_data(run: RunDir, data: RecordSet, limit: int) -> None:
    """Notes which rows a run reads, by their hash."""
    # With the limit: ppo may evaluate on a draw of its training prompts, and one name has one hash.
    name = f"{data.name}, at most {limit} rows" if limit else data.name
    require_same(f"data {name!r}", data.sha256)
    run.record_data(name, data.sha256, len(data.records))


def fitting_rows(
    run: RunDir | None, spec: str, prompts: Sequence[Sequence[int]], longest: int, taker: str
) -> list[int]:
    """The rows of prompts of at most `longest` tokens; where some are longer but not all, tells how many.

    `taker`: what takes the rest of the context. `run` notes it too, where there is one.
    """
    rows = [i for i, ids in enumerate(prompts) if len(ids) <= longest]
    left = len(prompts) - len(rows)
    if rows and left:
        if run is not None:
            run.event("prompts_left_out", data=spec, rows=left, longest=longest)
        say(f"{spec}: {left} of {len(prompts)} prompts are left out: {too_long(longest, taker)}")
    return rows


def too_long(longest: int, taker: str) -> str:
    """Why a prompt is left out."""
    return f"longer than {longest} tokens, which is what {taker} leaves of the context"


def note_model(run: RunDir, key: str, name: str, fingerprint: str = "") -> None:
    """Notes what a key of the config names: an adapter, or a whole model with its head, by its files; a base by its
    `fingerprint`.

    A resumed run refuses another one under the same name. An empty name is nothing.
    """
    if name:
        by_files = resolve(name).kind == "adapter" or not fingerprint
        _note(run, f"{key} {name}", files_hash(name) if by_files else fingerprint)


def note_function(run: RunDir, key: str, path: str) -> None:
    """The same of `module:function`, which is imported by now: by the bytes of the module's file."""
    file = getattr(sys.modules.get(path.partition(":")[0]), "__file__", None)
    if file:
        _note(run, f"{key} {path}", hashlib.sha256(Path(file).read_bytes()).hexdigest())


def _note(run: RunDir, what: str, sha256: str) -> None:
    require_same(what, sha256)
    run.record_model(what, sha256)


def _rows_asked(config: DataConfig, which: Literal["train", "eval"]) -> tuple[str, int]:
    return (config.train_data, config.train_limit) if which == "train" else (config.eval_data, config.eval_limit)


def resume_point(run: RunDir) -> Path | None:
    """The folder of the newest verified checkpoint; what the run logged after it is dropped."""
    return of_first(lambda: newest_checkpoint(run))


def newest_checkpoint(run: RunDir) -> Path | None:
    """The same, by the first process alone."""
    checkpoint, skipped = run.checkpoints.newest_verified()
    for problem in skipped:
        run.event("checkpoint_skipped", reason=problem)
    run.cut_back(checkpoint)
    if run.resumed:
        where = f"after step {checkpoint.step}" if checkpoint else "from the start, since it has no checkpoint"
        say(f"{run.name}: goes on {where}")
    return checkpoint.path if checkpoint else None


def say_measures(run: RunDir, what: str = "") -> None:
    """Before figures that may take as long as many steps: by default those of the model before its first step."""
    first = "measures the model as it is; then come the steps"
    again = "measures the model as it was before the first step, to compare with; then goes on"
    if not Progress.quiet:
        say(f"{run.name}: {what or (again if run.resumed else first)}")


def trained_parameters(model: nn.Module) -> int:
    """How many numbers learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def require_gradients(parameters: dict[str, Any]) -> None:
    """Mark exactly these for training; everything else was frozen at load."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
