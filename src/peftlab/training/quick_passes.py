"""Training passes of a PeftModel on a causal language model, sooner: without logits, and on a GPU by CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..models.adapters import lora_layers
from ..models.backbone import trunk
from ..models.captured import CapturedStates, capturable, packed
from ..ops import ranks
from .state_loss import loss_from_states


@contextmanager
def quick_passes(model: Any) -> Iterator[None]:
    """While it lasts, the model's passes and losses are made sooner, where they can be."""
    # Replays fill `.grad` by themselves, which DistributedDataParallel does not see.
    replays = model.device.type == "cuda" and ranks.size() == 1 and replayable(model)
    with loss_from_states(model), replayed_passes(model) if replays else nullcontext():
        yield


def replayable(model: Any) -> bool:
    """Whether graphs can hold the model's passes: its class and its LoRA are of kinds that were tried."""
    plain = not any(layer.lora_variant for layer in lora_layers(model).values())
    return plain and capturable(model.get_base_model())


@contextmanager
def replayed_passes(model: Any) -> Iterator[CapturedStates]:
    """While it lasts, passes that train on packed rows give their final states by CUDA graphs.

    Other passes (with an attention mask, or where more than states is asked for) are made as before.
    """
    body: Any = trunk(model)
    plain, learned = body.forward, [parameter for parameter in body.parameters() if parameter.requires_grad]
    # A training has one number of rows, and at an epoch's end another one: none is to be rounded up.
    captured, acting = CapturedStates(plain, model.device, multiple=1), partial(_autocast, model.device.type)

    def forward(
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Any = None,
        **given: Any,
    ) -> Any:
        more = any(value is not None and value is not False for value in given.values())
        if input_ids is None or position_ids is None or more or not (body.training and torch.is_grad_enabled()):
            return plain(input_ids, position_ids=position_ids, **given)
        states = captured(input_ids, position_ids, packed(position_ids), None, acting, learned)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)

    body.forward = forward
    try:
        yield captured
    finally:
        del body.forward


def _autocast(device: str) -> AbstractContextManager[None]:
    """Autocast as it is, but that each pass rounds its weights itself: a graph must not read what another one kept."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    context: Any = torch.autocast(device, dtype, enabled, cache_enabled=False)
    return context
