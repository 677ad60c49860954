"""The converted models say what their originals say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertModel

from peftlab.data.imdb import load_block
from peftlab.models.catalog import resolve
from peftlab.models.convert import minilm_source
from peftlab.models.gguf import gguf_path, llama_name, unpermute

TEXTS = ["A film.", "It was not good, and it was not bad either; it simply was.", "unaffordable " * 120]


@pytest.fixture(scope="module")
def minilm():
    """(the converted model in eval mode, its tokenizer)."""
    path = resolve("minilm-distilbert").path
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def smollm2():
    """Folder of the converted model."""
    return resolve("smollm2-135m").path


@torch.inference_mode()
def test_minilm_gives_berts_hidden_states(minilm):
    model, tokenizer = minilm
    bert = BertModel.from_pretrained(minilm_source(), add_pooling_layer=False).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert type(model).__name__ == "DistilBertModel" and 0 in batch["attention_mask"]
    ours = model(**batch, output_hidden_states=True).hidden_states
    theirs = bert(**batch, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 7
    counted = batch["attention_mask"].bool()
    for mine, original in zip(ours, theirs, strict=True):
        assert (mine - original)[counted].abs().max() < 1e-5


def test_minilms_tokenizer_leaves_length_to_its_caller(minilm):
    _, tokenizer = minilm
    assert tokenizer.model_max_length == 512 and tokenizer.padding_side == "right"
    batch = tokenizer(TEXTS)
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert [len(ids) for ids in batch["input_ids"]][0] == 5 and len(batch["input_ids"][2]) > 128
    assert len(tokenizer("film " * 999, truncation=True)["input_ids"]) == 512
    assert tokenizer.decode(batch["input_ids"][0]) == "[CLS] a film. [SEP]"


def test_every_tensor_of_smollm2_is_the_dequantized_one(smollm2):
    import gguf

    def permute(weight: np.ndarray, heads: int) -> np.ndarray:
        """What llama.cpp's converter does to query and key rows: halves -> pairs."""
        rows, width = weight.shape
        return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)

    reader = gguf.GGUFReader(gguf_path())
    with safe_open(smollm2 / "model.safetensors", "np") as file:
        assert sorted(file.keys()) == sorted(llama_name(tensor.name) for tensor in reader.tensors)
        for tensor in reader.tensors:
            value = file.get_tensor(llama_name(tensor.name))
            assert value.dtype == np.float32
            if heads := {"attn_q": 9, "attn_k": 3}.get(tensor.name.split(".")[-2]):
                value = permute(value, heads)
            assert np.array_equal(value, gguf.dequantize(tensor.data, tensor.tensor_type)), tensor.name


def test_the_permutation_on_rows_that_can_be_read():
    # Two heads of four rows; the pairs are (a0, b0), (a1, b1).
    rows = np.array(["a0", "b0", "a1", "b1", "A0", "B0", "A1", "B1"])[:, None]
    assert unpermute(rows, heads=2)[:, 0].tolist() == ["a0", "a1", "b0", "b1", "A0", "A1", "B0", "B1"]


@torch.inference_mode()
def test_smollm2_answers(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    assert type(model).__name__ == "LlamaForCausalLM" and model.num_parameters() == 134_515_008
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=16, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert written[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(written, skip_special_tokens=True) == "The capital of France is Paris."


def test_smollm2s_tokenizer(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    special = tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token
    assert special == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert tokenizer.convert_tokens_to_ids([*special]) == [0, 1, 2] and len(tokenizer) == 49_152
    odd = ["x = 12345.678e9  \n\n\t", "naïve — “so” I'LL", "日本語 👩‍👩‍👧 ½²", "a\u200bb\u00a0c\x96\r\n", ""]
    for text in odd + [row.text for row in load_block("test")[::50]]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("in 1984½") == ["in", "Ġ", "1", "9", "8", "4", "Â½"]  # Â½ is ½ in bytes
    assert tokenizer("<|im_end|>\n")["input_ids"][0] == 2
    # One turn of the chat template, by the ids of its special tokens.
    turn = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert [i for i in ids if i < 3] == [1, 2, 1, 2, 1]
