"""Stacks of one base act in one batch, each on its own rows.

The base's own matmuls are one for all rows; a LoRA adds its delta to the rows that ask for it. Merging would write the
same sum into a copy of the weights, a copy for each stack, and read each copy in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .adapters import lora_layers
from .mix import Mixer

# The LoRAs of a row by their PEFT name, with the weight of each; none: the bare base.
Blend = tuple[tuple[str, float], ...]


class PerRow:
    """What a `Mixer` holds, by the row: once it is here, nothing acts but within `rows`. `model` is what decodes.

    Adapters that the mixer loads later act as well, `settle` told.
    """

    def __init__(self, mixer: Mixer) -> None:
        self.mixer, self.model = mixer, mixer.model
        self.device: torch.device = next(mixer.model.parameters()).device
        self._plan: list[tuple[str, float, Tensor | None]] = []
        self._hooked: set[int] = set()
        self.settle()

    def blend(self, weights: Mapping[str, float]) -> Blend | None:
        """The LoRAs of a weighted sum of loaded stacks; None where one is no plain LoRA, and so no sum."""
        if any(self.mixer.loaded[name].odd for name in weights):
            return None
        return tuple(self.mixer.shares(weights).items())

    def settle(self) -> None:
        """Take over layers whose first adapter came since."""
        for layer in lora_layers(self.model).values():
            if id(layer) not in self._hooked:
                layer.register_forward_hook(self._add)
                self._hooked.add(id(layer))
        self.mixer.use({})

    @contextmanager
    def rows(self, blends: Sequence[Blend]) -> Iterator[None]:
        """Within the block, row b of what the model is given is read with blends[b]."""
        wanted: dict[tuple[str, float], list[int]] = {}
        for row, blend in enumerate(blends):
            for part in blend:
                wanted.setdefault(part, []).append(row)
        self._plan = [
            (name, weight, None if len(rows) == len(blends) else torch.tensor(rows, device=self.device))
            for (name, weight), rows in wanted.items()
        ]
        try:
            yield
        finally:
            self._plan = []

    def _add(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A layer's output with the deltas of the plan. Its own adapters are off, so `output` is the base's."""
        for name, weight, rows in self._plan:
            if name not in layer.lora_A:
                continue
            states = inputs[0] if rows is None else inputs[0].index_select(0, rows)
            delta = layer.lora_B[name](layer.lora_A[name](states)) * (weight * layer.scaling[name])
            output = output + delta if rows is None else output.index_add(0, rows, delta.to(output.dtype))
        return output
