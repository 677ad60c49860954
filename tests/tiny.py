"""Small random models, tokenizers for them, folders that recipes load by path, and rows to train on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
    T5Config,
    T5ForConditionalGeneration,
)

from peftlab.models.quick_layers import quicken_layers

WORDS = ["the", "a", "film", "movie", "was", "is", "good", "bad", "great", "awful", "i", "it", "and", "but", "not"]
WORDS += ["very", "plot", "actor", "scene", "fun", "dull"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other take many times longer on tensors this small, where others compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    """(model, tokenizer), as they are after loading: two layers, width 32, vocabulary 64, context 64."""
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
    return quicken_layers(model).requires_grad_(False).eval(), tokenizer()


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


def llama_folder(folder: Path, seed: int = 0) -> Path:
    """As `causal_folder`, of Llama's architecture."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=320, max_position_embeddings=96, hidden_size=32, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
                         tie_word_embeddings=True, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    return _save(LlamaForCausalLM(config), spelling_tokenizer(), folder)


def causal_folder(folder: Path, seed: int = 0) -> Path:
    """A random GPT-2 with its tokenizer as a folder that loads by path: width 32, context 96.

    Its embeddings are large: they are frozen, and bound how sure of a token an adapter can make the model.
    """
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=320, n_positions=96, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=1, eos_token_id=1, pad_token_id=0)
    return _save(GPT2LMHeadModel(config), spelling_tokenizer(), folder)


def encoder_folder(folder: Path, seed: int = 0) -> Path:
    """A random DistilBERT with its tokenizer as a folder: width 32, context 64."""
    torch.manual_seed(seed)
    config = DistilBertConfig(vocab_size=320, max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=2, n_heads=4,
                              initializer_range=0.2, dropout=0.0, attention_dropout=0.0, pad_token_id=0)
    return _save(DistilBertForMaskedLM(config), spelling_tokenizer(encoder=True), folder)


def seq2seq(seed: int = 0, **changes: Any) -> Any:
    """A random T5 built like t5-small (ReLU, tied embeddings), with heads wider than the model; vocabulary 320."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 320, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = T5Config(**{**sizes, **ids, "dropout_rate": 0.0, **changes})
    return T5ForConditionalGeneration(config).requires_grad_(False).eval()


def seq2seq_folder(folder: Path, seed: int = 0) -> Path:
    """A random T5 with its tokenizer as a folder."""
    return _save(seq2seq(seed), spelling_tokenizer(), folder)


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


def summaries(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Documents of two to four sentences; the summary is the words of the first, without its end."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        said = [" ".join(draw.choices(WORDS, k=draw.randint(3, 6))) for _ in range(draw.randint(2, 4))]
        rows.append({"id": f"d{number}", "document": ". ".join(said) + ".", "summary": said[0]})
    return rows


def preferences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of two to four words; the chosen answer has praise where the rejected one has blame."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        prompt, answer = " ".join(draw.choices(WORDS[:4], k=draw.randint(2, 4))), draw.choices(WORDS[10:15], k=3)
        said = {side: " " + " ".join([*answer[: draw.randint(1, 3)], draw.choice(words)])
                for side, words in (("chosen", ["good", "great"]), ("rejected", ["bad", "awful"]))}
        rows.append({"id": f"p{number}", "prompt": prompt, **said})
    return rows


def documents(count: int, seed: int = 0) -> list[str]:
    """Texts of three to six sentences."""
    draw = random.Random(seed)
    return [
        " ".join(" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) + "." for _ in range(draw.randint(3, 6)))
        for _ in range(count)
    ]


def workshop(folder: Path) -> dict[str, str]:
    """What recipes need, by the name of their keys: two base models, and files of texts, labels, pairs and prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    labelled = reviews(60)
    texts = [{"text": row["text"] + " ."} for row in labelled]
    return {
        "gpt2": str(causal_folder(folder / "gpt2")),
        "encoder": str(encoder_folder(folder / "encoder")),
        "t5": str(seq2seq_folder(folder / "t5")),
        "summaries": write_rows(folder / "summaries.jsonl", summaries(24)),
        "summaries_test": write_rows(folder / "summaries-test.jsonl", summaries(6, seed=1)),
        "labelled": write_rows(folder / "labelled.jsonl", labelled[:40]),
        "labelled_test": write_rows(folder / "labelled-test.jsonl", labelled[40:]),
        "texts": write_rows(folder / "texts.jsonl", texts[:40]),
        "texts_test": write_rows(folder / "texts-test.jsonl", texts[40:]),
        "preferences": write_rows(folder / "preferences.jsonl", preferences(24)),
        "preferences_test": write_rows(folder / "preferences-test.jsonl", preferences(8, seed=1)),
        "prompts": write_rows(folder / "prompts.jsonl", [{"prompt": row["text"]} for row in labelled[:40]]),
    }


def overrides(shop: Mapping[str, str], verb: str, *pairs: str) -> list[str]:
    """`key=value` pairs that make `verb` a job of seconds in this workshop; later pairs win."""
    keys = {
        "pretrain": ["train_data={texts}", "eval_data={texts_test}", "vocab_size=300", "max_length=64", "width=16",
                     "layers=1", "heads=2", "batch_size=4", "max_steps=2"],
        "sft": ["model={gpt2}", "train_data={texts}", "eval_data={texts_test}", "max_length=64", "batch_size=4",
                "lora.r=4", "lora.alpha=8", "lr=1e-2", "max_steps=2"],
        "classify": ["model={encoder}", "train_data={labelled}", "eval_data={labelled_test}", "max_length=48",
                     "batch_size=8", "lora.r=4", "lora.alpha=8", "lr=1e-2", "max_steps=2"],
        "summarize": ["model={t5}", "train_data={summaries}", "eval_data={summaries_test}", "max_length=64",
                      "max_summary=12", "batch_size=4", "prefix_tokens=5", "prefix_hidden=16", "beams=2", "lora.r=4",
                      "lora.alpha=8", "lr=1e-2", "max_steps=2"],
        "reward": ["model={gpt2}", "train_data={preferences}", "eval_data={preferences_test}", "max_length=64",
                   "batch_size=4", "lora.r=4", "lora.alpha=8", "lr=1e-2", "max_steps=2"],
        "dpo": ["model={gpt2}", "train_data={preferences}", "eval_data={preferences_test}", "prompts={prompts}",
                "max_length=64", "max_new_tokens=8", "eval_prompts=6", "batch_size=4", "lora.r=4", "lora.alpha=8",
                "lr=1e-2", "max_steps=2"],
        "ppo": ["model={gpt2}", "train_data={prompts}", "eval_data={prompts}", "max_new_tokens=8", "steps=2",
                "prompts_per_step=8", "minibatch_size=4", "eval_prompts=6", "record_every=1", "lora.r=4",
                "lora.alpha=8", "lr=1e-2"],
        "rloo": ["model={gpt2}", "train_data={prompts}", "eval_data={prompts}", "max_new_tokens=8", "steps=2",
                 "prompts_per_step=3", "samples_per_prompt=4", "eval_prompts=6", "record_every=1", "lora.r=4",
                 "lora.alpha=8", "lr=1e-2"],
    }
    return ["device=cpu", *(pair.format(**shop) for pair in keys[verb]), *pairs]
