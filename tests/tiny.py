"""Small random models, tokenizers for them, folders that recipes load by path, and rows to train on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
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


def spelling_tokenizer(encoder: bool = False) -> Any:
    """A byte-level tokenizer of 320 ids that gives every text back exactly; an encoder's adds <cls> and <sep>."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<cls>", "<sep>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([f" {word}" for word in WORDS] * 4, trainer)
    names = {"pad_token": "<pad>", "eos_token": "<eos>"}
    if encoder:
        names |= {"cls_token": "<cls>", "sep_token": "<sep>"}
        core.post_processor = processors.TemplateProcessing(
            single="<cls> $A <sep>", special_tokens=[("<cls>", 2), ("<sep>", 3)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def causal_folder(folder: Path, seed: int = 0) -> Path:
    """A random GPT-2 with its tokenizer as a folder that loads by path: width 32, context 96."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=320, n_positions=96, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=1, eos_token_id=1, pad_token_id=0)
    return _save(GPT2LMHeadModel(config), spelling_tokenizer(), folder)


def encoder_folder(folder: Path, seed: int = 0) -> Path:
    """A random DistilBERT with its tokenizer as a folder: width 32, context 64."""
    torch.manual_seed(seed)
    config = DistilBertConfig(vocab_size=320, max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=2, n_heads=4,
                              initializer_range=0.2, dropout=0.0, attention_dropout=0.0, pad_token_id=0)
    return _save(DistilBertForMaskedLM(config), spelling_tokenizer(encoder=True), folder)


def _save(model: Any, words: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """A JSONL file; returns its path as a config spells it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def reviews(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Labelled reviews of 3 to 14 words: text, label 1 for those with praise."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = number % 2
        words = draw.choices(WORDS[:6] + WORDS[10:], k=draw.randint(3, 14))
        words[draw.randrange(len(words))] = draw.choice(["good", "great"] if label else ["bad", "awful"])
        rows.append({"text": " ".join(words), "label": label})
    return rows
