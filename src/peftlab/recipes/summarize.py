"""Teach an encoder-decoder to summarize: by prefix tuning, by LoRA, or whole, each beside the bare model and lead-1."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..data.collate import collate_seq2seq
from ..data.records import SummaryPair
from ..data.tokenize import Row
from ..evaluation.perplexity import perplexity, perplexity_interval
from ..evaluation.rouge import Rouge
from ..evaluation.summaries import MOST, SummaryFormat, lead_metrics, score_summaries, summarize
from ..evaluation.targets import target_nlls
from ..models.adapter_files import save_adapter
from ..models.adapters import LoraVariants, adapter_parameters, attach, attach_decoder_prefix
from ..models.backbone import Backbone, load_backbone
from ..models.prefix import attach_prefix, own_prefix, word_states
from ..models.stacks import Stack
from ..runs.checkpoint import whole_folder
from ..runs.rundir import RunDir
from ..training.arguments import TrainConfig, total_steps, training_arguments
from ..training.sampler import pair_length
from ..training.trainer import LabTrainer
from .common import (
    load_both,
    load_rows,
    note_model,
    require_gradients,
    resume_point,
    say_measures,
    seed_everything,
    trained_parameters,
)

ADAPTER = "policy"
SAMPLES, OPENING = 24, 240  # rows in samples.jsonl, and characters of a document there


class SummarizeConfig(TrainConfig):
    """Every key of `peftlab summarize`."""

    recipe: Literal["summarize"] = "summarize"
    model: str = "tiny-t5"
    train_data: str = "imdb-gist:train"
    eval_data: str = "imdb-gist:test"
    train_limit: int = Field(0, ge=0, description="records to train on, a seeded sample; 0 = all")
    eval_limit: int = Field(200, ge=0)
    max_length: int = Field(
        512, ge=8, le=MOST["max_length"], description="tokens of a document with its task prefix; longer ones are cut"
    )
    max_summary: int = Field(
        64, ge=2, le=MOST["max_summary"], description="tokens of a summary, in training and in writing"
    )
    method: Literal["prefix-full", "prefix", "lora", "full"] = Field(
        "prefix-full",
        description="prefix-full: a prefix for encoder, decoder and cross-attention; prefix: PEFT's, for the decoder's "
        "self-attention only; lora; full: every weight, saved as a model, as a yardstick",
    )
    prefix_tokens: int = Field(50, ge=1, description="positions of a prefix")
    prefix_hidden: int = Field(512, ge=0, description="width of the MLP that makes a prefix in training; 0 = no MLP")
    beams: int = Field(4, ge=1, le=MOST["beams"])
    task_prefix: str = Field("summarize: ", description="text put before each document")
    lora: LoraVariants = LoraVariants()


CONFIG = SummarizeConfig


def run(config: SummarizeConfig, run: RunDir) -> dict[str, Any]:
    """Train by `method`; ROUGE and perplexity of held-out summaries before and after, and ROUGE of lead-1."""
    with run.session():
        if run.finished:
            return run.summary or {}
        seed_everything(config.seed)
        backbone = load_backbone(config.model, "seq2seq", device=config.device)
        note_model(run, "model", config.model, backbone.fingerprint)
        tokenizer, form = backbone.tokenizer, _form(config)
        train, held_out = load_both(run, config, "summarize")
        rows = form.rows(train, tokenizer)

        say_measures(run)
        before = Measured(backbone.model, tokenizer, form, held_out)
        model = _learner(backbone, config, rows)
        checkpoint = resume_point(run)
        if checkpoint is None:
            run.log({**before.metrics, "data/rows": len(rows), "data/tokens": sum(map(pair_length, rows))}, 0)
        trainer = LabTrainer(
            model,
            training_arguments(config, len(rows)),
            rows,
            [pair_length(row) for row in rows],
            lambda batch: collate_seq2seq(batch, tokenizer.pad_token_id),
            run.checkpoints,
            run.log,
            lambda: run.stop_requested,
        )
        with run.stepping():
            trainer.fit(checkpoint)
        if prefix := own_prefix(model):
            prefix.fold()
        after = Measured(model, tokenizer, form, held_out)
        metrics = after.metrics | lead_metrics(held_out)
        run.log(metrics, trainer.state.global_step)
        run.write_samples(_samples(held_out[:SAMPLES], before, after))
        artifacts = {"model" if config.method == "full" else "adapter": _save(model, backbone, config, run.path)}
        return run.finish(metrics, before.metrics, after.intervals, artifacts)


def plan(config: SummarizeConfig) -> dict[str, Any]:
    """Sizes of the job, nothing trained."""
    backbone = load_backbone(config.model, "seq2seq", device="cpu")
    rows = _form(config).rows(load_rows(config, "train", "summarize").records, backbone.tokenizer)
    model = _learner(backbone, config, rows)
    return {
        "rows": len(rows),
        "tokens": sum(map(pair_length, rows)),
        "steps": total_steps(config, len(rows)),
        "trained parameters": trained_parameters(model),
    }


class Measured:
    """What a model writes of held-out documents: the texts, their ROUGE, all metrics and their intervals."""

    def __init__(self, model: Any, tokenizer: Any, form: SummaryFormat, pairs: Sequence[SummaryPair]) -> None:
        self.texts = summarize(model, tokenizer, [pair.document for pair in pairs], form)
        self.rouge: Rouge = score_summaries(self.texts, pairs)
        nats = target_nlls(model, form.rows(pairs, tokenizer), tokenizer.pad_token_id)
        self.metrics = {**self.rouge.metrics, "eval/perplexity": perplexity(*nats)}
        self.intervals = {**self.rouge.intervals, "eval/perplexity": perplexity_interval(*nats)}


def _form(config: SummarizeConfig) -> SummaryFormat:
    return SummaryFormat(config.task_prefix, config.max_length, config.max_summary, config.beams)


def _learner(backbone: Backbone, config: SummarizeConfig, rows: Sequence[Row]) -> Any:
    """The model with what `method` trains, and nothing else, marked for training."""
    model = backbone.model
    if config.method == "full":
        return model.requires_grad_(True)
    if config.method == "lora":
        model = attach(model, config.lora, ADAPTER, "seq2seq", config.model)
    elif config.method == "prefix":
        model = attach_decoder_prefix(model, config.prefix_tokens, config.prefix_hidden, ADAPTER, config.model)
    else:
        words = (_words(rows, name, config.prefix_tokens).to(backbone.device) for name in ("input_ids", "labels"))
        attach_prefix(model, word_states(model, *words), config.prefix_hidden)
    require_gradients(adapter_parameters(model, ADAPTER))
    return model


def _words(rows: Sequence[Row], name: str, count: int) -> Tensor:
    """The first `count` tokens of the rows, one behind the other, (1, count): real words for a prefix to start as."""
    tokens = itertools.cycle(itertools.chain.from_iterable(row[name] for row in rows))
    return torch.tensor([list(itertools.islice(tokens, count))])


def _samples(pairs: Sequence[SummaryPair], before: Measured, after: Measured) -> Iterator[dict[str, Any]]:
    """A row a document and side, as the report pairs them; `prompt` is the document's opening."""
    for index, pair in enumerate(pairs):
        opening = pair.document if len(pair.document) <= OPENING else pair.document[:OPENING] + " ..."
        for side, measured in (("before", before), ("after", after)):
            yield {
                "prompt_id": pair.id,
                "side": side,
                "prompt": opening + "\n",
                "completion": measured.texts[index],
                "reference": pair.summary,
                "rougeL": 100 * float(measured.rouge.rows[index, 2]),
            }


def _save(model: Any, backbone: Backbone, config: SummarizeConfig, folder: Path) -> str:
    """Write what was trained; the name of its folder in the run."""
    facts = {"recipe": "summarize", "method": config.method, **_form(config).facts()}
    if config.method == "full":
        model.config.peftlab = facts
        with whole_folder(folder / "model", marker="config.json") as place:
            model.save_pretrained(place)
            backbone.tokenizer.save_pretrained(place)
        return "model"
    stack = Stack("seq2seq", config.model, backbone.fingerprint, (), facts)
    save_adapter(model, ADAPTER, folder / "adapter", stack)
    return "adapter"
