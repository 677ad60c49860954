"""A policy's passes by the merged weights that the sampler reads: sampling and training multiply by the same numbers.

A LoRA of rank 16 beside each product costs a pass of these models a fifth of its time on a GPU, and nothing once it is
merged; its gradients need the adapter's own factors, not what they add. To merge takes milliseconds, once an update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .adapters import lora_layers
from .graphs import aside, capturing
from .packed import matrix, packed_of
from .quick_lora import Merged, QuickLora


@torch.no_grad()
def merge(model: nn.Module, name: str | None, twin: nn.Module) -> None:
    """Write W + (alpha / r) B A of a PeftModel's adapter, or (None) W itself, into the layers of `twin`."""
    weights = dict(twin.named_parameters())
    for place, layer in lora_layers(model).items():
        base = layer.base_layer.weight
        # A reward model that joined may have layers which the policy has not.
        own = name is not None and name in layer.lora_A
        merged = base + layer.get_delta_weight(name).to(base.dtype) if own else base
        weights[f"{place}.weight"].copy_(merged)


class MergedPolicy:
    """The adapter `name` of `model`, merged into `twin`; the layers of both lie where they lie from now on.

    `stream`: that of captures, None to do without graphs.
    """

    def __init__(self, model: nn.Module, name: str, twin: nn.Module, stream: Any = None) -> None:
        self.model, self.name, self.twin = model, name, twin
        self.packed, self.stream = packed_of(twin), stream
        self.layers: list[Merged] = []
        twins, windows = dict(twin.named_modules()), None
        for place, layer in lora_layers(model).items():
            if isinstance(layer, QuickLora) and layer.split is not None:
                windows = windows or self.packed.windows(layer.split.rows)
                layer.merged_weight = Merged(matrix(twins[place]), windows[id(twins[place])])
                self.layers.append(layer.merged_weight)
        self.fresh = self.begun = False
        self.graph: torch.cuda.CUDAGraph | None = None

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The context in which passes multiply by the merged weights, which are those of the adapter as it is."""
        self.follow()
        for layer in self.layers:
            layer.acts = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer.acts = False

    def follow(self) -> None:
        """Merge again where the adapter has moved, or something else was written to the sampler's copy."""
        if not self.fresh:
            self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        """Merge again. Hundreds of small kernels: called once, then captured, then replayed."""
        if self.graph is not None:
            self.graph.replay()
        elif self.stream is None:
            self._merge()
        elif not self.begun:
            with aside(self.stream):
                self._merge()
        else:
            with capturing(self.stream) as graph:
                self._merge()
            self.graph = graph
            graph.replay()
        self.fresh = self.begun = True

    def _merge(self) -> None:
        merge(self.model, self.name, self.twin)
        self.packed.renew()
