"""The same numbers sooner: where transformers and the allocator go through memory more often than it takes."""

from __future__ import annotations

import ctypes
from functools import cache

from torch import Tensor, nn
from torch.nn import functional as F

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


@cache
def keep_freed_memory() -> bool:
    """Let the C library keep what tensors on a CPU have freed, for the next ones: once a process, where it can.

    glibc hands large blocks back to the kernel, which then fills the next with zeros, page by page: beside that, an
    elementwise kernel takes a fraction of the time. Kept are up to 2 GB, of blocks below 32 MB. Returns whether it can.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    # 32 MB is the most that every glibc takes.
    return bool(mallopt(M_MMAP_THRESHOLD, 2**25) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def fuse_gelu(model: nn.Module) -> nn.Module:
    """GELU by tanh, as GPT-2 and T5 have it, in one kernel for transformers' eight. Last bits differ."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def fuse_norms(model: nn.Module) -> nn.Module:
    """The norms of Llama-class models in one kernel for transformers' six. Last bits differ."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class FusedRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            weight = self.weight.to(hidden_states.dtype)
            return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)

    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = FusedRMSNorm
    return model
