"""A job in several processes, as accelerate or torchrun starts it: they join, the first decides, all leave together.

Every process does the whole of a recipe, but shares the sampling and the gradients; only the first writes the run's
folder. The others have a folder of their own, which is thrown away: so a recipe writes without asking which process it
is in, but for what is large (checkpoints, the report).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import Interrupted, UserError, brief
from ..models.backbone import pick_device
from ..ops import ranks
from ..rl.gather import all_or_none
from ..runs.launched import PeersLost, local_rank, peers, rank, world_size
from ..runs.progress import say
from ..runs.rundir import RunDir, differences
from ..runs.signals import StopSignals

T = TypeVar("T")


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """The processes as one group while the block runs, each with a GPU of its own where `device` is one."""
    if world_size() == 1:
        yield
        return
    for kind in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true":
            raise UserError(
                f"accelerate is configured for {kind}, which parts a model; here each process holds the whole of it: "
                "launch with --multi_gpu, or with a config of distributed_type MULTI_GPU"
            )
    chosen = pick_device(device)
    if chosen.type == "mps" or chosen.index is not None:
        raise UserError(f"device: {chosen} is one device, and there are {world_size()} processes; use cuda or cpu")
    if chosen.type == "cuda":
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"process {rank()} wants GPU {local_rank()} of {torch.cuda.device_count()} that this host has; launch "
                "one process a GPU"
            )
        torch.cuda.set_device(local_rank())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    except (ValueError, RuntimeError, OSError) as error:
        place = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(f"the processes cannot meet at {place}: {brief(error)}") from error
    # The first writes the run's end: no signal that comes late may take another from it, and itself with that.
    with StopSignals() if rank() else contextlib.nullcontext():
        try:
            with peers():
                yield
        except Interrupted:
            _leave(chosen)
            raise
        except BaseException:
            if chosen.type == "cpu":  # on a GPU this would wait for what the others may never send
                dist.destroy_process_group()
            raise
        _leave(chosen)


def _leave(device: torch.device) -> None:
    """Nobody goes before all have come: a launcher that sees one process end by a signal stops the others.

    Where one does not come, this one's work is done all the same.
    """
    try:
        with peers():
            ranks.objects(None)
    except PeersLost:
        say(f"another of the {world_size()} processes ended too early; the work of this one is done")
        if device.type != "cpu":
            return
    dist.destroy_process_group()


def of_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, in every one; where it fails there, it fails everywhere."""
    found: T | None = None
    with all_or_none():
        if ranks.rank() == 0:
            found = make()
    return ranks.objects(found)[0]  # type: ignore[return-value]


def require_same_job(recipe: str, config_toml: str, name: str | None, resume: bool) -> None:
    """UserError in every process where one was launched with another job than the first."""
    told = ranks.objects((config_toml, {"recipe": recipe, "--run": name, "--resume": resume}))
    for number, (theirs, words) in enumerate(told):
        places = "in process 0", f"in process {number}"
        differing = [f"{key} ({told[0][1][key]!r} {places[0]}, {word!r} {places[1]})" for key, word in words.items()
                     if word != told[0][1][key]]
        differing += differences(told[0][0], theirs, places)
        if differing:
            raise UserError(f"the processes were launched with different jobs: {', '.join(differing)}")


def require_same(what: str, sha256: str) -> None:
    """UserError in every process where `what` has another hash in one than in the first."""
    told = ranks.objects(sha256)
    if odd := ranks.odd(told):
        raise UserError(
            f"{what} is not the same for all processes (sha256 {told[0][:12]} in process 0, {told[odd][:12]} in "
            f"process {odd}); give every host the same files"
        )


@contextlib.contextmanager
def opened(root: Path, name: str, recipe: str, config_toml: str, resume: bool) -> Iterator[RunDir]:
    """The run's folder, made or taken up again; in any process but the first one that stands for it."""
    run: RunDir | None = None

    def create() -> tuple[bool, dict[str, object] | None]:
        nonlocal run
        run = RunDir.create(root, name, recipe, config_toml, resume=resume)
        return run.resumed, run.summary

    resumed, summary = of_first(create)
    if run is not None:
        yield run
        return
    with tempfile.TemporaryDirectory() as folder:
        stand_in = RunDir.create(Path(folder), name, recipe, config_toml)
        stand_in.resumed, stand_in.summary = resumed, summary
        yield stand_in


def require_shares(config: Any) -> None:
    """UserError where the processes cannot share what the config counts for all of them together evenly."""
    for key in ("prompts_per_step", "minibatch_size", "batch_size"):
        count, parts = getattr(config, key, 0), getattr(config, "accumulate", 1)
        if count // parts % world_size():
            of = f" in {parts} parts" if parts > 1 else ""
            raise UserError(
                f"{key}: {count}{of} cannot be shared evenly by {world_size()} processes; give a multiple of "
                f"{parts * world_size()}"
            )
