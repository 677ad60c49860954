"""What lies between the matrix products of a pass, one kernel each: `kernels.cu`, compiled at run time.

NVRTC compiles them, which comes with torch: no compiler of the host and no toolkit is needed.

Shapes: N rows of states of width D; K = 3D + `ones` where they are float32, and what is made goes out in the parts of
`split.py`, K = D + `ones` where they are bfloat16. H heads of queries and G of keys and values, W wide.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

THREADS = 128
SHARED = 48 << 10  # bytes of its own that any block may ask for
AS_IT_IS, GELU, GATED = range(3)


class Kernels:
    """The kernels of one device for states of one dtype, float32 or bfloat16. All tensors are contiguous in their last
    dimension and lie on it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.parts = 3 if dtype == torch.float32 else 1
        state = "float" if self.parts == 3 else "unsigned short"
        code = Path(__file__).with_name("kernels.cu").read_text()
        source = f"typedef {state} T;\n#define PARTS {self.parts}\n{code}"
        with torch.cuda.device(device):
            self._columns, self._norms, self._attend = (
                _compiled(source, name) for name in ("columns", "norms", "attend")
            )

    def columns(self, x: Tensor, made: int = AS_IT_IS, ones: int = 0) -> Tensor:
        """x (N, D), its GELU (tanh), or of (N, 2D) the SiLU of the first half times the second -> (N, K)."""
        width = x.shape[1] // 2 if made == GATED else x.shape[1]
        out = self._rows(len(x), width, ones)
        grid = len(x), -(-width // THREADS), 1
        self._launch(self._columns, grid, THREADS, 0, x, out, x.stride(0), width, out.shape[1], made)
        return out

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, ones: int = 0) -> Tensor:
        """The LayerNorm of x (N, D), or its RMSNorm where there is no bias -> (N, K)."""
        rows, width = x.shape
        out = self._rows(rows, width, ones)
        centred = bias is not None
        given = x, weight, weight if bias is None else bias, out, width, out.shape[1], int(centred), epsilon
        self._launch(self._norms, (rows, 1, 1), THREADS, 0, *given)
        return out

    def holds(self, heads: int, groups: int, slots: int, width: int) -> bool:
        """Whether `attend` has room for so many slots."""
        return heads // groups * (width + slots) * 4 <= SHARED

    def attend(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Tensor,
        unseen: Tensor,
        slot: Tensor,
        ones: int = 0,
    ) -> Tensor:
        """A token a row, x (N, H + 2G, W) of queries, keys and values, attends to the slots of a cache (2, N, G, S, W)
        up to `slot` (1,), into which its own go -> (N, K), K of D = H W.

        `rotary`: cosines and sines (N, W), of which the first half is negative. `unseen` (N, S) is added to scores.
        """
        _, rows, groups, slots, width = cache.shape
        heads = x.shape[1] - 2 * groups
        out = self._rows(rows, heads * width, ones)
        each = heads // groups
        cosine, sine = rotary or (x, x)
        threads = min(256, max(64, -(-each * width // 32) * 32))
        given = x, cosine, sine, cache, unseen, slot, out, heads, slots, width, out.shape[1], int(rotary is not None)
        self._launch(self._attend, (rows, groups, 1), threads, each * (width + slots) * 4, *given)
        return out

    def _rows(self, rows: int, width: int, ones: int) -> Tensor:
        return torch.empty(rows, self.parts * width + ones, dtype=torch.bfloat16, device=self.device)

    def _launch(self, kernel: Any, grid: tuple[int, int, int], threads: int, shared: int, *given: Any) -> None:
        with torch.cuda.device(self.device):
            kernel(grid, (threads, 1, 1), list(given), shared)


def _compiled(source: str, name: str) -> Any:
    from torch.utils import cpp_extension

    # torch asks for the headers of a toolkit, which these kernels do without.
    with patch.object(cpp_extension, "CUDA_HOME", cpp_extension.CUDA_HOME or ""):
        return torch.cuda._compile_kernel(source, name)


@cache
def kernels_of(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The kernels of a device for states of a dtype, compiled once; None where it has to do without."""
    known = dtype in (torch.float32, torch.bfloat16) and device.type == "cuda" and not torch.version.hip
    if not known or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        return Kernels(device, dtype)
    except Exception as error:  # of a driver, of NVRTC, of a torch that calls it otherwise: torch alone does it too
        warnings.warn(f"kernels were not compiled, so decoding is slower: {error}", stacklevel=2)
        return None
