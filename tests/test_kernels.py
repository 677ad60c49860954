"""What decides about kernels of our own, without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peftlab.ops import kernels
from peftlab.ops.kernels import SHARED, Kernels, kernels_of
from peftlab.sampling.between import Fused


def uncompiled(compiled) -> Kernels:
    """Kernels whose compiler is `compiled`."""
    ours = object.__new__(Kernels)
    ours._attends, ours._compiled = {}, compiled
    return ours


@pytest.mark.parametrize(("heads", "groups", "width", "fits"), [(32, 4, 128, 895), (9, 3, 64, 3519), (8, 8, 64, 11967)])
def test_attention_is_ours_while_a_block_need_not_ask_for_memory(heads, groups, width, fits):
    ours, each = uncompiled(lambda name, sizes: {name: name}), heads // groups
    shares = (64 if each == 1 else 128) // (width // 4)
    assert ours.holds(heads, groups, fits, width) and not ours.holds(heads, groups, fits + 1, width)
    assert 4 * each * ((1 + shares) * width + fits + 1) == SHARED, "torch takes what is below"


def test_heads_that_no_kernel_is_for_are_torchs():
    ours = uncompiled(lambda name, sizes: pytest.fail("nothing is to be compiled"))
    assert not any(ours.holds(*heads) for heads in ((2, 1, 32, 18), (1, 1, 32, 260), (34, 2, 32, 64)))


def test_what_cannot_be_compiled_is_torchs_and_said_once(recwarn):
    def broken(name: str, sizes: str) -> None:
        raise RuntimeError("no NVRTC here\nand a log of many lines")

    ours = uncompiled(broken)
    assert not ours.holds(9, 3, 32, 64) and not ours.holds(9, 3, 64, 64)
    assert [str(warning.message) for warning in recwarn] == [
        "a kernel was not compiled, so decoding and training are slower: no NVRTC here"
    ]


def test_a_cpu_has_none():
    assert kernels_of(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ones", [0, 8])
def test_kernels_are_given_what_they_declare(monkeypatch, dtype, ones):
    source = Path(kernels.__file__).with_name("kernels.cu").read_text()
    declared = {name: given.split(",") for name, given in re.findall(r"__global__ void (\w+)\(([^)]*)\)", source)}
    launched = set()

    def launch(self, kernel, grid, threads, shared, *given):
        kinds = {Tensor: "*", int: "int ", float: "double "}
        for said, value in zip(declared[kernel], given, strict=True):
            assert kinds[Tensor if isinstance(value, Tensor) else type(value)] in said, (kernel, said)
        assert 32 <= threads <= 256 and shared < SHARED and all(size > 0 for size in grid)
        launched.add(kernel)

    monkeypatch.setattr(Kernels, "_compiled", lambda self, *names, sizes="": dict(zip(names, names, strict=True)))
    monkeypatch.setattr(Kernels, "_launch", launch)
    fused, x, root = Fused(Kernels(torch.device("cpu"), dtype), ones), torch.randn(6, 32).to(dtype), nn.RMSNorm(32)
    root.variance_epsilon = 1e-6
    wide = (3 if dtype == torch.float32 else 1) * 32 + ones
    made = [fused.gelu(x), fused.norm(x, nn.LayerNorm(32).to(dtype)), fused.norm(x, root.to(dtype)), fused.rows(x)]
    made.append(fused.gated(torch.randn(6, 64).to(dtype)))
    shapes = (2, 6, 1, 64, 8), (6, 64), (6, 8)
    cache, unseen, turned = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    for rotary in (None, (turned, turned)):
        heads = torch.randn(6, 6, 8).to(dtype)
        made.append(fused.attend(heads, rotary, cache, unseen, torch.tensor([3]), fused.seen(4, cache, 32)))
    gate, up, slopes = torch.randn(3, 6, 32).to(dtype)
    beside = [fused.kernels.gated(gate, up), *fused.kernels.gated_slopes(gate, up, slopes)]
    assert all(each.shape == gate.shape and each.dtype == dtype for each in beside)
    of_rows = fused.kernels.softmax(x.clone(), torch.arange(6), 0.7, 30, True)
    assert [(found.shape, found.dtype) for found in of_rows] == [((6,), torch.float32)] * 3
    assert {tuple(rows.shape) for rows in made} == {(6, wide)} and launched == set(declared)
