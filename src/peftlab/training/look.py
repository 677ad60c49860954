"""Whether a step's numbers are finite, asked of the device now and answered when it has come so far."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor


class Look:
    """A look at the tensors that a step made, `named`, all on one device.

    `bad` (), 1.0 where a number is NaN or infinite, is on it too: a fused optimizer that is given it as `found_inf`
    leaves the weights as they are.
    """

    def __init__(self, step: int, named: Mapping[str, Tensor]) -> None:
        self.step, self.names = step, list(named)
        # The largest of each tensor, which cannot overflow; NaN passes through it.
        largest = torch.stack(torch._foreach_norm([tensor.detach() for tensor in named.values()], torch.inf)).float()
        self.bad = (~torch.isfinite(largest)).any().float()
        self.told, self.there = largest, None
        if largest.is_cuda:  # into memory that the device may write to while the host goes on
            self.told = torch.empty(largest.shape, pin_memory=True)
            self.told.copy_(largest, non_blocking=True)
            self.there = torch.cuda.Event()
            self.there.record()

    def sites(self) -> dict[str, float]:
        """What is not finite, in the order given: NaN where it holds one, else infinity. Waits for the device."""
        if self.there is not None:
            self.there.synchronize()
        return {name: told for name, told in zip(self.names, self.told.tolist(), strict=True) if not isfinite(told)}
