"""What lies between the matrix products of a pass, one kernel each: `kernels.cu`, compiled at run time.

NVRTC compiles them, which comes with torch: no compiler of the host and no toolkit is needed.

Shapes: N rows of states of width D; K = 3D + `ones` where they are float32, and what is made goes out in the parts of
`split.py`, K = D + `ones` where they are bfloat16. H heads of queries and G of keys and values, W wide.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

THREADS = 256
SHARED = 48 << 10  # bytes of its own from which on a block has to ask
AS_IT_IS, GELU, GATED = range(3)
C = TypeVar("C")


class Kernels:
    """The kernels of one device for states of one dtype, float32 or bfloat16, whose rows are `fitting`."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.parts = 3 if dtype == torch.float32 else 1
        self._known = self._compiled("columns", "norms", "gates", "gate_slopes", "softmax")
        self._attends: dict[tuple[int, int], Any] = {}

    def columns(self, x: Tensor, made: int = AS_IT_IS, ones: int = 0) -> Tensor:
        """x (N, D), its GELU (tanh), or of (N, 2D) the SiLU of the first half times the second -> (N, K)."""
        assert x.dtype == self.dtype and fitting(x)
        width = x.shape[1] // 2 if made == GATED else x.shape[1]
        out = self._rows(len(x), width, ones)
        grid = -(-x.shape[0] * width // (4 * THREADS)), 1, 1
        self._launch(self._known["columns"], grid, THREADS, 0, x, out, len(x), x.stride(0), width, out.shape[1], made)
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, ones: int = 0) -> Tensor:
        """x (N, D) -> (N, K)."""
        return self._norm(x, weight, bias, epsilon, ones, centred=True)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, ones: int = 0) -> Tensor:
        """x (N, D) -> (N, K)."""
        return self._norm(x, weight, weight, epsilon, ones, centred=False)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, ones: int, centred: bool) -> Tensor:
        assert x.is_contiguous() and weight.dtype == bias.dtype == x.dtype == self.dtype
        rows, width = x.shape
        out = self._rows(rows, width, ones)
        given = x, weight, bias, out, width, out.shape[1], int(centred), epsilon
        self._launch(self._known["norms"], (rows, 1, 1), min(THREADS, -(-width // 128) * 32), 0, *given)
        return out

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) up, of tensors that are `flat`."""
        out = torch.empty_like(gate)
        self._each("gates", gate, up, out)
        return out

    def gated_slopes(self, gate: Tensor, up: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up, of that of silu(gate) up; all of them `flat`."""
        out = torch.empty_like(gate), torch.empty_like(up)
        self._each("gate_slopes", gate, up, slopes, *out)
        return out

    def softmax(
        self, logits: Tensor, tokens: Tensor, temperature: float, words: int, kept: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log p of tokens (N,), the entropies, and the sums of exp(logit - the row's highest), each (N,) float32, of
        logits (N, W) over a temperature, of whose columns the first `words` count; NaN of a token that is none of them.

        Where `kept`, each logit makes way for its exp.
        """
        assert logits.dtype == self.dtype and logits.is_contiguous() and fitting(logits)
        assert tokens.dtype == torch.long and tokens.is_contiguous() and tokens.shape == logits.shape[:1]
        rows, width = logits.shape
        found = torch.empty(3, rows, dtype=torch.float32, device=self.device)
        given = logits, tokens, *found, width, words, int(kept), float(temperature)
        self._launch(self._known["softmax"], (rows, 1, 1), THREADS, 0, *given)
        logprobs, entropies, totals = found
        return logprobs, entropies, totals

    def _each(self, name: str, *tensors: Tensor) -> None:
        """Four numbers of each tensor a thread."""
        count = tensors[0].numel()
        assert all(flat(x) and x.dtype == self.dtype and x.numel() == count for x in tensors)
        self._launch(self._known[name], (-(-count // (4 * THREADS)), 1, 1), THREADS, 0, *tensors, count)

    def holds(self, heads: int, groups: int, slots: int, width: int) -> bool:
        """Whether `attend` takes such heads, and has room for so many slots; compiles it for them."""
        each = heads // groups
        if width % 4 or width > 256 or each > 16 or _shared(each, width, slots) >= SHARED:
            return False
        if (each, width) not in self._attends:
            sizes = f"#define EACH {each}\n#define WIDTH {width}\n#define THREADS {_threads(each)}\n"
            self._attends[each, width] = _or_torch(lambda: self._compiled("attend", sizes=sizes)["attend"])
        return self._attends[each, width] is not None

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
        up to `slot` (1,), into which its own go -> (N, K), K of D = H W. Where it `holds` them.

        `rotary`: cosines and sines (N, W), of which the first half is negative. `unseen` (N, S) is added to scores.
        """
        _, rows, groups, slots, width = cache.shape
        heads = x.shape[1] - 2 * groups
        each = heads // groups
        assert x.is_contiguous() and cache.is_contiguous() and unseen.is_contiguous()
        assert x.dtype == cache.dtype == unseen.dtype == self.dtype
        out = self._rows(rows, heads * width, ones)
        cosine, sine = rotary or (x, x)
        given = x, cosine, sine, cache, unseen, slot, out, slots, out.shape[1], int(rotary is not None)
        shared = _shared(each, width, slots)
        self._launch(self._attends[each, width], (rows, groups, 1), _threads(each), shared, *given)
        return out

    def _rows(self, rows: int, width: int, ones: int) -> Tensor:
        return torch.empty(rows, self.parts * width + ones, dtype=torch.bfloat16, device=self.device)

    def _compiled(self, *names: str, sizes: str = "") -> dict[str, Any]:
        """Kernels of the file by name. It is compiled once for all of them, which takes half a second."""
        from torch.cuda import _utils
        from torch.utils import cpp_extension

        state = "float" if self.parts == 3 else "unsigned short"
        code = Path(__file__).with_name("kernels.cu").read_text()
        source = f"typedef {state} T;\n#define PARTS {self.parts}\n{sizes}{code}"
        # torch asks for the headers of a toolkit, which these kernels do without.
        with torch.cuda.device(self.device), patch.object(cpp_extension, "CUDA_HOME", cpp_extension.CUDA_HOME or ""):
            compiled, _ = _utils._nvrtc_compile(source, names[0])
            loaded: Any = _utils._cuda_load_module(compiled, list(names))
            return dict(loaded)

    def _launch(self, kernel: Any, grid: tuple[int, int, int], threads: int, shared: int, *given: Any) -> None:
        if not grid[0]:
            return
        with torch.cuda.device(self.device):
            kernel(grid, (threads, 1, 1), list(given), shared)


def fitting(x: Tensor) -> bool:
    """Whether four numbers of a row of x (N, D) may be read at once."""
    return x.stride(1) == 1 and x.shape[1] % 4 == 0 and x.stride(0) % 4 == 0 and x.data_ptr() % 16 == 0


def flat(x: Tensor) -> bool:
    """Whether the numbers of x lie one behind the other, to be read by fours and counted by an int."""
    return x.is_contiguous() and x.numel() % 4 == 0 and x.data_ptr() % 16 == 0 and x.numel() < 2**31


def _threads(each: int) -> int:
    """Threads of a block that attends: more of them wait for no more memory where a key has one query."""
    return 64 if each == 1 else 128


def _shared(each: int, width: int, slots: int) -> int:
    """Bytes of such a block: its queries, as many sums of each as add up side by side, and all scores."""
    shares = _threads(each) // (width // 4)
    return 4 * each * ((1 + shares) * width + slots)


@cache
def kernels_of(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The kernels of a device for states of a dtype, compiled once; None where it has to do without."""
    known = dtype in (torch.float32, torch.bfloat16) and device.type == "cuda" and not torch.version.hip
    if not known or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return _or_torch(lambda: Kernels(device, dtype))


def _or_torch(compiled: Callable[[], C]) -> C | None:
    """What is compiled, or None, with a warning, where it cannot be."""
    try:
        return compiled()
    except Exception as error:  # of a driver, of NVRTC, of a torch that calls it otherwise: torch alone does it too
        why = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"a kernel was not compiled, so decoding and training are slower: {why}", stacklevel=2)
        return None
