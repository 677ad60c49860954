"""What the recipes share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.sources import RecordSet, load_records
from ..runs.rundir import RunDir


def seed_everything(seed: int) -> None:
    """Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_recorded(
    run: RunDir, spec: str, kind: str, limit: int, seed: int, labels: list[str] | None = None
) -> RecordSet:
    """Records with their hash noted in the run; `limit` 0 takes all. A resumed run refuses changed data."""
    data = load_records(spec, kind, limit=limit or None, seed=seed, labels=labels)
    # With the limit, since one file may serve both training and evaluation, each with rows of its own.
    run.record_data(f"{spec}, at most {limit} rows" if limit else spec, data.sha256, len(data.records))
    return data


def resume_point(run: RunDir) -> Path | None:
    """The folder of the newest verified checkpoint; what the run logged after it is dropped."""
    checkpoint, skipped = run.checkpoints.newest_verified()
    for problem in skipped:
        run.event("checkpoint_skipped", reason=problem)
    run.truncate_after(checkpoint.step if checkpoint else -1)
    return checkpoint.path if checkpoint else None


def trained_parameters(model: nn.Module) -> int:
    """How many numbers learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def require_gradients(parameters: dict[str, Any]) -> None:
    """Mark exactly these for training; everything else was frozen at load."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
