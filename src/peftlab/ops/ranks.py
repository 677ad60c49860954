"""Several processes as one: what they add up, and what each learns of all. Alone every function is a no-op.

A process's number is its rank; the processes are those of torch.distributed's default group.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if size() > 1 else 0


def share(count: int) -> range:
    """The rows of `count` that are this process's: a block, the ranks' blocks in their order."""
    return range(rank() * count // size(), (rank() + 1) * count // size())


def objects(mine: T) -> list[T]:
    """`mine` of every process, in the order of ranks. Tensors in it must be on the CPU."""
    if size() == 1:
        return [mine]
    found: list[T | None] = [None] * size()
    dist.all_gather_object(found, mine)
    return found  # type: ignore[return-value]


def odd(told: list[T]) -> int:
    """Of what the processes told, the first that is not what process 0 did: its number; 0 where all are the same."""
    return next((number for number, theirs in enumerate(told) if theirs != told[0]), 0)


def agreed(asked: int | None) -> int | None:
    """What any process asked for, as of a signal: the largest number; None where none did. Each asks at one place."""
    return max((number for number in objects(asked) if number), default=None)


def add_up(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its sum over the processes, which all get the same bits. In one message."""
    if size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
