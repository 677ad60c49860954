"""Small models from nothing: a byte-level tokenizer, fresh weights, and the folder that holds both once trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.spans import MASK, SENTINELS

Architecture = Literal["gpt2", "t5"]
# The special tokens come first, so these are the ids 0, 1, ... T5's own order and names, with a mask between.
_SPECIAL = {"gpt2": ["<|endoftext|>", "<|pad|>"], "t5": ["<pad>", "</s>", MASK, *SENTINELS]}
SMALLEST_VOCABULARY = {name: 256 + len(special) for name, special in _SPECIAL.items()}


def train_tokenizer(architecture: Architecture, texts: Sequence[str], vocab_size: int, max_length: int) -> Any:
    """Byte-level BPE. A GPT-2's has EOS and pad; a T5's has pad, EOS (which it adds to a text), mask and sentinels."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = _SPECIAL[architecture]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer, len(texts))
    if architecture == "gpt2":
        end, pad = special
        names: dict[str, Any] = {"bos_token": end, "eos_token": end, "pad_token": pad}
    else:
        pad, end, mask, *sentinels = special
        core.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, special.index(end))]
        )
        names = {"eos_token": end, "pad_token": pad, "mask_token": mask, "extra_special_tokens": sentinels}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, model_max_length=max_length)


def new_model(
    architecture: Architecture,
    *,
    vocab_size: int,
    max_length: int,
    width: int,
    layers: int,
    heads: int,
    dropout: float,
) -> Any:
    """A GPT2LMHeadModel or T5ForConditionalGeneration with fresh weights. `layers`: a T5's encoder's, and decoder's."""
    if architecture == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        end, pad = range(2)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_positions=max_length,
                n_embd=width,
                n_layer=layers,
                n_head=heads,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                bos_token_id=end,
                eos_token_id=end,
                pad_token_id=pad,
                use_cache=False,
            )
        )
    from transformers import T5Config, T5ForConditionalGeneration

    pad, end = range(2)
    config: Any = T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=width // heads,
        # Gated GELU learns more at equal size than ReLU (Shazeer 2020; T5 1.1). At 2x width, as in T5 1.1 small, most
        # of a small budget is attention's. Embeddings are tied: a head of its own would add a quarter to the model.
        d_ff=2 * width,
        feed_forward_proj="gated-gelu",
        num_layers=layers,
        num_heads=heads,
        dropout_rate=dropout,
        pad_token_id=pad,
        eos_token_id=end,
        use_cache=False,
    )
    config.decoder_start_token_id = pad
    return T5ForConditionalGeneration(config)


def relative_groups(model: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: each parameter learns at `lr` times the size of its first values.

    The size is their root mean square, as the nearest power of two.

    Of a fresh T5's parameters the embeddings are a hundred times larger than the queries, which hold the 1/sqrt(d) of
    its attention: a rate at which the first learn anything tears the second, and the decoder never learns to look into
    the encoder. Adafactor's parameter scaling (Shazeer and Stern 2018, section 8), with a scale that stays.
    """
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        size = max(1e-3, float(parameter.detach().square().mean().sqrt()))
        groups.setdefault(2.0 ** round(math.log2(size)), []).append(parameter)
    return [{"params": own, "lr": lr * size, "weight_decay": weight_decay} for size, own in groups.items()]


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """float16 shards below 16 MB, config, tokenizer. Dropout is 0 in what is saved: it served this training only.

    Rounding is all that float16 does here: models are loaded, and compute, in float32.
    """
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    model.config.use_cache = model.generation_config.use_cache = True
    model.to(torch.float16).save_pretrained(str(folder), max_shard_size="15MB")
    tokenizer.save_pretrained(str(folder))
    model.to(torch.float32)
