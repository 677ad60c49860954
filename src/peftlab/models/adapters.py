"""Adapters on a model: their configs, fresh ones attached, and which of them acts in the forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field
from torch import nn

from ..config import Config
from ..errors import UserError
from .backbone import trunk
from .prefix import own_prefix
from .stacks import TASK_TYPES, Kind


class PolicyLora(Config):
    """Low-rank adaptation, W + (alpha / r) B A (Hu et al. 2021), on the named linear layers.

    Without dropout, which never acts where a policy starts as its reference.
    """

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    targets: list[str] | Literal["all-linear"] = "all-linear"


class Lora(PolicyLora):
    """The same with dropout, for supervised training."""

    dropout: float = Field(default=0.0, ge=0, lt=1)


class LoraVariants(Lora):
    """LoRA and two variants, for supervised training.

    `rslora` scales by alpha / sqrt(r) (Kalajdzievski 2023), so that a larger rank learns as fast as a small one; `dora`
    learns each column's magnitude apart from its direction (Liu et al. 2024), and so adds no plain delta to W.
    """

    rslora: bool = False
    dora: bool = False


def linear_names(model: nn.Module) -> list[str]:
    """Leaf names of every linear layer inside the transformer (heads and embeddings excluded)."""
    from transformers.pytorch_utils import Conv1D

    linear = (n for n, m in trunk(model).named_modules() if isinstance(m, nn.Linear | Conv1D))
    # A layer that has adapters already appears as NAME.base_layer beside NAME.lora_A.ADAPTER.
    own = {n.removesuffix(".base_layer").rsplit(".", 1)[-1] for n in linear if ".lora_" not in n}
    return sorted(own - {"lm_head"})


def attach(model: nn.Module, lora: PolicyLora, name: str, kind: Kind = "causal", base: str = "") -> Any:
    """A PeftModel with a fresh adapter `name` (another one, when `model` has adapters already); B = 0, so a no-op."""
    from peft import LoraConfig, PeftModel, TaskType

    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    linear = linear_names(plain)
    targets = linear if lora.targets == "all-linear" else lora.targets
    if not targets or not set(targets) <= set(linear):
        raise UserError(f"lora.targets: {targets}: give all-linear, or some of this model's {', '.join(linear)}")
    heads = [n for n, _ in plain.named_children() if n in ("classifier", "pre_classifier", "score")]
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout if isinstance(lora, Lora) else 0.0,
        target_modules=targets,
        use_rslora=isinstance(lora, LoraVariants) and lora.rslora,
        use_dora=isinstance(lora, LoraVariants) and lora.dora,
        fan_in_fan_out=type(plain).__name__.startswith("GPT2"),
        task_type=TaskType(TASK_TYPES[kind]),
        modules_to_save=heads or None,
    )
    return wrap(model, config, name, base)


def attach_decoder_prefix(model: Any, length: int, hidden: int, name: str, base: str = "") -> Any:
    """PEFT's prefix tuning of a T5: trained keys and values for the decoder's self-attention only.

    The encoder and the cross-attention stay as they are (`prefix.attach_prefix` reaches them). Its start is random and
    no no-op. With `hidden`, an MLP makes the prefix while it trains; the result is saved.
    """
    from peft import PrefixTuningConfig, TaskType

    if model.config.model_type not in ("t5", "mt5"):
        raise UserError(f"prefix: works on T5 models, and {base} is a {model.config.model_type}; use method=lora")
    config = PrefixTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        num_virtual_tokens=length,
        prefix_projection=hidden > 0,
        encoder_hidden_size=hidden,
        # PEFT takes these from the encoder, and a head's width from that of the model.
        num_layers=model.config.num_decoder_layers,
        num_attention_heads=model.config.num_heads,
        token_dim=model.config.num_heads * model.config.d_kv,
    )
    return wrap(model, config, name, base)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Module name (as in the plain base) -> LoRA layer."""
    from peft.tuners.lora import LoraLayer

    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def activate(model: nn.Module, *names: str) -> None:
    """Make exactly these adapters act in the forward pass; with none, the bare base.

    Sets the layers' own fields: peft's set_adapter and disable_adapter also flip requires_grad, which would hand
    frozen adapters to the optimizer.
    """
    _act(lora_layers(model).values(), names)


@contextmanager
def only(model: nn.Module, *names: str) -> Iterator[None]:
    """`activate`, for the length of a block."""
    layers = lora_layers(model).values()
    layer = next(iter(layers))
    before = () if layer._disable_adapters else tuple(layer._active_adapter)
    _act(layers, names)
    try:
        yield
    finally:
        _act(layers, before)


def _act(layers: Iterable[Any], names: Sequence[str]) -> None:
    for layer in layers:
        layer._active_adapter = list(names)
        layer._disable_adapters = not names


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter by full name (LoRA factors and saved heads, or a prefix)."""
    if own := own_prefix(model):
        return dict(own.named_parameters("prefix"))
    parts = (".lora_A", ".lora_B", ".lora_magnitude_vector", ".modules_to_save", "prompt_encoder")
    marks = tuple(f"{part}.{name}." for part in parts)
    return {n: p for n, p in model.named_parameters() if any(mark in n for mark in marks)}


def wrap(model: Any, config: Any, name: str, base: str) -> Any:
    """A PeftModel with adapter `name` as PEFT's `config` describes it, which alone acts."""
    from peft import PeftModel, get_peft_model

    from .quick_lora import quicken

    config.base_model_name_or_path = None  # peft would warn that ours is not the folder the base was read from
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property by its old name
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
    quicken(model)
    config.base_model_name_or_path = base
    activate(model, name)
    return model.eval()
