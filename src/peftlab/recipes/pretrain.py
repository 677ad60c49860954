"""Train a small GPT-2 from scratch on the training reviews: tokenizer, model, held-out perplexity, model card."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from ..data.collate import collate_language
from ..data.records import Text
from ..data.sources import RecordSet, load_records
from ..data.tokenize import document_ids, pack
from ..errors import UserError
from ..evaluation.perplexity import perplexity, perplexity_interval, row_nlls
from ..runs.rundir import RunDir
from ..sampling.sampler import Decoding, Sampler
from ..training.arguments import TrainConfig, training_arguments
from ..training.trainer import LabTrainer
from .common import load_recorded, resume_point, seed_everything, trained_parameters
from .sft import row_length

EOS, PAD = "<|endoftext|>", "<|pad|>"
CARD_PROMPTS = ("This movie is", "I watched this because", "The acting")


class PretrainConfig(TrainConfig):
    """Every key of `peftlab pretrain`."""

    recipe: Literal["pretrain"] = "pretrain"
    train_data: str = "imdb:train"
    eval_data: str = "imdb:test"
    train_limit: int = Field(0, ge=0)
    eval_limit: int = Field(0, ge=0)
    vocab_size: int = Field(8192, ge=300)
    max_length: int = Field(512, ge=8, description="context in tokens")
    width: int = Field(352, ge=8)
    layers: int = Field(6, ge=1)
    heads: int = Field(11, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} heads do not share a width of {self.width} evenly")
        return self


CONFIG = PretrainConfig


def run(config: PretrainConfig, run: RunDir) -> dict[str, Any]:
    """Train, measure on held-out reviews, write `model/` with its card."""
    with run.session():
        if run.finished:
            return run.summary or {}
        seed_everything(config.seed)
        train = _texts(load_recorded(run, config.train_data, "sft", config.train_limit, config.seed))
        test = _texts(load_recorded(run, config.eval_data, "sft", config.eval_limit, config.seed))
        tokenizer = train_tokenizer(train, config)
        rows = pack(document_ids(train, tokenizer), config.max_length)
        held_out = pack(document_ids(test, tokenizer), config.max_length)
        model = new_model(tokenizer, config)
        arguments = training_arguments(config, len(rows))
        model.to(arguments.device)
        before = perplexity(*row_nlls(model, held_out, tokenizer.pad_token_id))
        tokens = sum(map(row_length, rows))
        checkpoint = resume_point(run)
        if checkpoint is None:
            run.log({"eval/perplexity": before, "data/rows": len(rows), "data/tokens": tokens}, 0)
        trainer = LabTrainer(
            model,
            arguments,
            rows,
            [row_length(row) for row in rows],
            lambda batch: collate_language(batch, tokenizer.pad_token_id),
            run.checkpoints,
            run.log,
            lambda: run.stop_requested,
        )
        started = time.monotonic()
        trainer.fit(checkpoint)
        seconds = time.monotonic() - started
        # The shipped weights are float16: round first, so that the figure is theirs.
        model.to(torch.float16).to(torch.float32)
        sums, counts = row_nlls(model, held_out, tokenizer.pad_token_id)
        after, interval = perplexity(sums, counts), perplexity_interval(sums, counts)
        run.log({"eval/perplexity": after}, trainer.state.global_step)
        save_model(model, tokenizer, run.path / "model")
        facts = {"perplexity": after, "interval": interval, "tokens": tokens, "seconds": seconds,
                 "parameters": trained_parameters(model), "steps": trainer.state.global_step}
        (run.path / "model" / "README.md").write_text(card(config, facts, samples(model, tokenizer)))
        return run.finish(
            {"eval/perplexity": after}, {"eval/perplexity": before}, {"eval/perplexity": interval}, {"model": "model"}
        )


def plan(config: PretrainConfig) -> dict[str, Any]:
    """Sizes of the job; the tokenizer is not trained, so tokens are estimated at 4.6 characters each."""
    texts = _texts(load_records(config.train_data, "sft", config.train_limit or None, config.seed))
    width, layers = config.width, config.layers
    embeddings, layer = (config.vocab_size + config.max_length) * width, (12 * width + 13) * width
    parameters = embeddings + layers * layer + 2 * width
    tokens = int(sum(map(len, texts)) / 4.6)
    rows = -(-tokens // config.max_length)
    steps = config.max_steps or int(config.epochs * -(-rows // config.batch_size))
    return {"rows": len(texts), "tokens (estimate)": tokens, "parameters": parameters, "steps (estimate)": steps}


def _texts(data: RecordSet) -> list[str]:
    texts = [r.text for r in data.records if isinstance(r, Text)]
    if len(texts) < len(data.records):
        raise UserError(f"data {data.name}: pretrain takes rows of `text`; sft learns from prompts with completions")
    return texts


def train_tokenizer(texts: list[str], config: PretrainConfig) -> Any:
    """Byte-level BPE with an end-of-text token and a pad token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer, len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=EOS, eos_token=EOS, pad_token=PAD, model_max_length=config.max_length
    )


def new_model(tokenizer: Any, config: PretrainConfig) -> Any:
    """A GPT2LMHeadModel with fresh weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=config.max_length,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=False,
        )
    )


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """float16 shards below 16 MB, config, tokenizer. Dropout is 0 in what is saved: it served this training only."""
    model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = 0.0
    model.config.use_cache = True
    model.to(torch.float16).save_pretrained(str(folder), max_shard_size="15MB")
    tokenizer.save_pretrained(str(folder))
    model.to(torch.float32)


def samples(model: Any, tokenizer: Any) -> list[str]:
    """One sample a prompt, seeds 0, 1, 2, not picked."""
    sampler = Sampler(model.eval(), tokenizer)
    context = model.config.n_positions
    # A small context is shared: half for the prompt at most, the rest for what follows.
    prompts = [tokenizer(p, add_special_tokens=False)["input_ids"][: context // 2] for p in CARD_PROMPTS]
    new = min(48, context - max(map(len, prompts)))
    drawn = sampler.sample(prompts, range(len(prompts)), Decoding(max_new_tokens=new))
    return [sampler.text(p) + c for p, c in zip(prompts, sampler.texts(drawn), strict=True)]


def card(config: PretrainConfig, facts: dict[str, Any], texts: list[str]) -> str:
    """The model card: how to make this model again, and how good it is."""
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    low, high = facts["interval"]
    keys = json.dumps(config.model_dump(exclude={"recipe", "device"}))
    quoted = "\n".join("> " + " ".join(text.split()) + "\n" for text in texts)
    shape = f"width {config.width}, {config.layers} layers, {config.heads} heads, context {config.max_length}"
    quality = f"{facts['perplexity']:.2f} (95% interval {low:.2f} to {high:.2f})"
    return f"""# A small GPT-2 for movie reviews

Trained from scratch by `peftlab pretrain` on the lab's training block of IMDb reviews ({config.train_data}) and on
nothing else. It writes English that looks like a review, and knows nothing: use it to study training, not to answer.

| | |
|---|---|
| architecture | GPT2LMHeadModel, {shape} |
| parameters | {facts["parameters"]:,} |
| tokenizer | byte-level BPE of {config.vocab_size}, trained on the same reviews; own EOS and pad tokens |
| data | {facts["tokens"]:,} tokens an epoch, documents packed whole with EOS and kept apart, {config.epochs:g} epochs |
| steps, seed | {facts["steps"]} of {config.batch_size} blocks, seed {config.seed} |
| hardware, time | {hardware}, {facts["seconds"]:.0f} s of training |
| held-out perplexity | {quality} on {config.eval_data}, EOS counted |
| weights | float16 safetensors; the perplexity above is of these rounded weights |
| licence | MIT; the reviews belong to their authors |

Command: `peftlab pretrain`, with {keys}

Samples (temperature 1, seeds 0 to 2, not picked):

{quoted}"""
