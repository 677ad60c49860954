"""Float32 matrix products on units that multiply bfloat16.

A float32 is taken as the sum of two bfloat16, x = high + low, which leaves out 2^-17 of it at most. Then

    x w = high_x high_w + low_x high_w + high_x low_w,

less low_x low_w, is one product of rows three times as long, added up in float32: 16 bits of each factor count, where
TF32 keeps 11 and bfloat16 8. (Henry et al. 2019, "Leveraging the bfloat16 artificial intelligence datatype for
higher-precision computations".) Within half a percent of float32's largest number the high part is infinite.

Shapes: T rows, D inputs and E outputs of a layer, K = 3D, and 8 more where the layer has a bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kernels import fitting, kernels_of

NEVER = -1e30  # a logit: finite, so that its product with a probability of 0 is 0
ONES = 8  # columns of a bias: cuBLAS asks for rows of a multiple of 16 bytes


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are made: autocast's where that is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def splits_pay(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 several times as fast as float32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class SplitRows:
    """The parts of rows; where asked, the last are remembered for the next layer that reads the same tensor."""

    def __init__(self, remember: bool = False) -> None:
        self.remember = remember
        self._last: tuple[Tensor, int, Tensor] | None = None

    def of(self, x: Tensor, bias: bool = False) -> Tensor:
        """x (..., D), float32 -> (T, K), bfloat16: high, low, high, and ones for a bias to be multiplied by.

        Of bfloat16 are rows that are in parts already.
        """
        if x.dtype == torch.bfloat16:
            return x
        rows, wide = x.detach().reshape(-1, x.shape[-1]), 3 * x.shape[-1] + ONES * bias
        if self._last is not None:
            seen, version, parts = self._last
            # What is remembered keeps its memory, so that nothing else can lie there meanwhile.
            same = seen.data_ptr() == rows.data_ptr() and seen.shape == rows.shape and seen.stride() == rows.stride()
            if same and not rows.is_inference() and version == rows._version and parts.shape[1] == wide:
                return parts
        parts = _rows(rows, wide)
        if self.remember and not rows.is_inference():  # tensors of inference mode do not count their changes
            self._last = rows, rows._version, parts
        return parts


def _rows(x: Tensor, wide: int) -> Tensor:
    width = x.shape[1]
    kernels = kernels_of(x.device, torch.float32)
    if kernels is not None and fitting(x):
        return kernels.columns(x, ones=wide - 3 * width)
    parts = torch.empty(len(x), wide, dtype=torch.bfloat16, device=x.device)
    thrice = parts[:, : 3 * width].unflatten(1, (3, width))
    thrice[:, ::2].copy_(x.unsqueeze(1))
    torch.sub(x, thrice[:, 0], out=thrice[:, 1])
    parts[:, 3 * width :].fill_(1.0)
    return parts


class SplitWeight:
    """A weight (E, D), and bias (E,), of float32, in parts that `SplitRows.of` are multiplied by.

    One of bfloat16 is its only part; rows for it are in parts already.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, rows: SplitRows | None = None) -> None:
        assert weight.dtype in (torch.float32, torch.bfloat16)
        self.rows, self.dtype = rows or SplitRows(), weight.dtype
        self.biased = bias is not None
        wide = (3 if self.dtype == torch.float32 else 1) * weight.shape[1] + ONES * self.biased
        self.columns = torch.zeros(len(weight), wide, dtype=torch.bfloat16, device=weight.device)
        self.renew(weight, bias)

    def beside(self, weight: Tensor, x: Tensor) -> Tensor:
        """x by another weight (F, D), whose parts are made for this once: (..., D) -> (..., F)."""
        other = SplitWeight(weight, weight.new_zeros(len(weight)) if self.biased else None, self.rows)
        return other(x)

    def window(self, start: int, stop: int, rows: SplitRows) -> SplitWeight:
        """Outputs `start` to `stop` alone, in the same memory, of rows split by `rows`."""
        made = object.__new__(SplitWeight)
        made.rows, made.dtype, made.biased, made.columns = rows, self.dtype, self.biased, self.columns[start:stop]
        return made

    @torch.no_grad()
    def renew(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take other values, in place."""
        width = weight.shape[1]
        high = self.columns[:, :width].copy_(weight)
        if self.dtype == torch.float32:
            self.columns[:, width : 2 * width] = high
            torch.sub(weight, high, out=self.columns[:, 2 * width : 3 * width])
        if bias is not None:
            ones = self.columns[:, -ONES:]
            ones[:, 0] = bias
            torch.sub(bias, ones[:, 0], out=ones[:, 1])

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x W^T + b, (..., D) -> (..., E), in the weight's dtype. Without a gradient. `out` (T, E) takes it."""
        parts, columns = self.rows.of(x, self.biased), self.columns.t()
        if parts.device.type != "cuda":
            made = torch.mm(parts.float(), columns.float(), out=out)
        elif out is None:
            made = torch.mm(parts, columns, out_dtype=self.dtype)
        else:
            made = torch.mm(parts, columns, out_dtype=self.dtype, out=out)
        return made.view(*x.shape[:-1], -1)

    def add(self, x: Tensor, to: Tensor) -> Tensor:
        """`to` (T, E) plus x W^T + b, in place. Without a gradient."""
        parts, columns = self.rows.of(x, self.biased), self.columns.t()
        if parts.device.type != "cuda":
            return to.addmm_(parts.float(), columns.float())
        return torch.addmm(to, parts, columns, out_dtype=self.dtype, out=to)


def aligned(weight: Tensor) -> Tensor:
    """A weight (V, D) with rows of zeros up to W, a multiple of 8: rows of another length take cuBLAS four times as
    long."""
    more = -len(weight) % 8
    return torch.cat([weight.detach(), weight.new_zeros(more, weight.shape[1])]) if more else weight.detach()


class SplitHead(SplitWeight):
    """The weight (V, D) by which logits are made, `aligned`: words beyond V have no chance. `weight` (W, D) is that of
    float32."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.bias = aligned(weight), None
        if more := len(self.weight) - len(weight):
            self.bias = torch.cat([weight.new_zeros(len(weight)), weight.new_full((more,), NEVER)])
        super().__init__(self.weight, self.bias)

    @torch.no_grad()
    def follow(self, weight: Tensor) -> None:
        """Take the head's values again, in place."""
        if self.bias is not None:
            self.weight[: len(weight)] = weight
        self.renew(self.weight, self.bias)


class AlignedHead:
    """The weight (V, D) by which logits are made, `aligned`, as a `weight` (W, D) of `dtype`."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.words, self.weight = len(weight), aligned(weight).to(dtype)

    def __call__(self, states: Tensor) -> Tensor:
        """Logits (N, W) of states (N, D); words beyond V have no chance."""
        logits = states.to(self.weight.dtype) @ self.weight.t()
        logits[:, self.words :] = max(NEVER, torch.finfo(logits.dtype).min)
        return logits


class in_tf32:
    """A context in which float32 products on CUDA round their factors to 11 bits, where it is `active`.

    Enough for a gradient, not for a ratio. Meanwhile torch's older settings of precision may not be read.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active

    def __enter__(self) -> None:
        if self.active:
            settings: Any = torch.backends.cuda.matmul
            self.was = settings.fp32_precision
            settings.fp32_precision = "tf32"

    def __exit__(self, *_: object) -> None:
        if self.active:
            settings: Any = torch.backends.cuda.matmul
            settings.fp32_precision = self.was
