"""Small random models and a tokenizer for them, made in memory."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ["the", "a", "film", "movie", "was", "is", "good", "bad", "great", "awful", "i", "it", "and", "but", "not"]
WORDS += ["very", "plot", "actor", "scene", "fun", "dull"]


def tokenizer() -> Any:
    """A word tokenizer of 64 ids: 0 pads, 1 ends, 2 is unknown."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    for word in [*WORDS, *(f"w{i}" for i in range(64))]:
        vocabulary.setdefault(word, len(vocabulary))
    vocabulary = {word: i for word, i in vocabulary.items() if i < 64}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return fast


def causal(kind: str = "gpt2", seed: int = 0) -> tuple[Any, Any]:
    """(model, tokenizer): two layers, width 32, vocabulary 64, context 64."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
                            bos_token_id=1, eos_token_id=1, pad_token_id=0)
        model: Any = GPT2LMHeadModel(config)
    else:
        llama = LlamaConfig(vocab_size=64, max_position_embeddings=64, hidden_size=32, intermediate_size=64,
                            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
                            tie_word_embeddings=True, bos_token_id=1, eos_token_id=1, pad_token_id=0)
        model = LlamaForCausalLM(llama)
    return model.requires_grad_(False).eval(), tokenizer()
