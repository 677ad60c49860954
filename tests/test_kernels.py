"""What decides about kernels of our own, without a GPU."""

from __future__ import annotations

import pytest
import torch

from peftlab.ops.kernels import SHARED, Kernels, kernels_of


def uncompiled(compiled) -> Kernels:
    """Kernels whose compiler is `compiled`."""
    kernels = object.__new__(Kernels)
    kernels._attends, kernels._compiled = {}, compiled
    return kernels


@pytest.mark.parametrize(("heads", "groups", "width", "fits"), [(32, 4, 128, 895), (9, 3, 64, 3519), (8, 8, 64, 11967)])
def test_attention_is_ours_while_a_block_need_not_ask_for_memory(heads, groups, width, fits):
    kernels, each = uncompiled(lambda name, sizes: name), heads // groups
    shares = (64 if each == 1 else 128) // (width // 4)
    assert kernels.holds(heads, groups, fits, width) and not kernels.holds(heads, groups, fits + 1, width)
    assert 4 * each * ((1 + shares) * width + fits + 1) == SHARED, "torch takes what is below"


def test_heads_that_no_kernel_is_for_are_torchs():
    kernels = uncompiled(lambda name, sizes: pytest.fail("nothing is to be compiled"))
    assert not any(kernels.holds(*heads) for heads in ((2, 1, 32, 18), (1, 1, 32, 260), (34, 2, 32, 64)))


def test_what_cannot_be_compiled_is_torchs_and_said_once(recwarn):
    def broken(name: str, sizes: str) -> None:
        raise RuntimeError("no NVRTC here\nand a log of many lines")

    kernels = uncompiled(broken)
    assert not kernels.holds(9, 3, 32, 64) and not kernels.holds(9, 3, 64, 64)
    assert [str(warning.message) for warning in recwarn] == [
        "a kernel was not compiled, so decoding and float32 products are slower: no NVRTC here"
    ]


def test_a_cpu_has_none():
    assert kernels_of(torch.device("cpu"), torch.float32) is None
