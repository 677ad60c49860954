"""Which numbers are not finite, and where."""

from __future__ import annotations

import torch
from torch import Tensor


def not_finite(named: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, in the order given.

    Their common norm tells at once, and with one wait for the device, that none does: NaN and infinity pass through it.
    """
    if torch.isfinite(torch.nn.utils.get_total_norm([tensor.detach() for tensor in named.values()])):
        return []
    fine = torch.stack([torch.isfinite(tensor.detach()).all() for tensor in named.values()]).tolist()
    return [name for name, good in zip(named, fine, strict=True) if not good]


def first_not_finite(tensor: Tensor) -> tuple[list[int], float]:
    """Index and value of the first entry that is NaN or infinite, of a tensor that holds one."""
    index = (~torch.isfinite(tensor.detach())).nonzero()[0].tolist()
    return index, float(tensor[tuple(index)])
