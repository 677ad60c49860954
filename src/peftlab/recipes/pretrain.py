"""Train a small GPT-2 or T5 from scratch on plain text: tokenizer, model, held-out perplexity, model card."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from ..data.records import Text
from ..errors import UserError
from ..evaluation.perplexity import perplexity, perplexity_interval
from ..models.fresh import (
    SMALLEST_VOCABULARY,
    Architecture,
    new_model,
    relative_groups,
    save_model,
    train_tokenizer,
)
from ..runs.checkpoint import whole_folder
from ..runs.rundir import RunDir
from ..training.arguments import TrainConfig, total_steps, training_arguments
from ..training.trainer import LabTrainer
from .common import load_both, load_rows, resume_point, say_measures, seed_everything, trained_parameters
from .pretrain_card import Facts, card
from .pretrain_tasks import Denoising, LanguageModelling, Task

# Processes that make rows for a GPU: a T5's are corrupted as they are asked for, which takes as long as a step.
WORKERS = 4


class PretrainConfig(TrainConfig):
    """Every key of `peftlab pretrain`."""

    recipe: Literal["pretrain"] = "pretrain"
    architecture: Architecture = "gpt2"
    train_data: str = "imdb:train"
    eval_data: str = "imdb:test"
    train_limit: int = Field(0, ge=0)
    eval_limit: int = Field(0, ge=0)
    vocab_size: int = Field(8192, ge=300)
    max_length: int = Field(512, ge=8, description="context in tokens")
    width: int = Field(352, ge=8)
    layers: int = Field(6, ge=1, description="of a T5: of the encoder, and as many of the decoder")
    heads: int = Field(11, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    copy_epochs: int = Field(0, ge=0, description="of a T5: first epochs that repeat a few tokens of each text")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} heads do not share a width of {self.width} evenly")
        least = SMALLEST_VOCABULARY[self.architecture]
        if self.vocab_size < least:
            raise ValueError(f"vocab_size: a {self.architecture} needs {least} at least, for bytes and special tokens")
        if self.copy_epochs and self.architecture != "t5":
            raise ValueError("copy_epochs: only a T5 (architecture = 't5') repeats its input; leave it 0")
        return self


CONFIG = PretrainConfig


def run(config: PretrainConfig, run: RunDir) -> dict[str, Any]:
    """Train, measure on held-out texts, write `model/` with its card."""
    with run.session():
        if run.finished:
            return run.summary or {}
        seed_everything(config.seed)
        train, test = map(_texts, load_both(run, config, "sft"), (config.train_data, config.eval_data))
        tokenizer = train_tokenizer(config.architecture, train, config.vocab_size, config.max_length)
        task = _task(train, test, tokenizer, config)
        model = _model(len(tokenizer), config)
        arguments = training_arguments(config, task.epoch_rows, workers=WORKERS)
        model.to(arguments.device)
        say_measures(run)
        before, _ = _figures(task, model)
        checkpoint = resume_point(run)
        if checkpoint is None:
            run.log({**before, "data/rows": task.epoch_rows, "data/tokens": task.epoch_tokens}, 0)
        trainer = LabTrainer(
            model,
            arguments,
            task.rows,
            task.lengths,
            task.collate,
            run.checkpoints,
            run.log,
            lambda: run.stop_requested,
            groups=relative_groups(model, config.lr, config.weight_decay) if config.architecture == "t5" else None,
        )
        started = time.monotonic()
        with run.stepping():
            trainer.fit(checkpoint)
        seconds = time.monotonic() - started
        # The shipped weights are float16: round first, so that the figures are theirs.
        model.to(torch.float16).to(torch.float32)
        after, intervals = _figures(task, model)
        run.log(after, trainer.state.global_step)
        size, steps = trained_parameters(model), trainer.state.global_step
        facts = Facts(after, intervals, task.epoch_tokens, seconds, size, steps, model.device)
        with whole_folder(run.path / "model", marker="config.json") as place:
            save_model(model, tokenizer, place)
            (place / "README.md").write_text(card(config, facts, task.samples(model)), encoding="utf-8")
        return run.finish(after, before, intervals, {"model": "model"})


def plan(config: PretrainConfig) -> dict[str, Any]:
    """Sizes of the job; the tokenizer is not trained, so tokens are estimated at 4.6 characters each."""
    texts = _texts(load_rows(config, "train", "sft").records, config.train_data)
    with torch.device("meta"):
        parameters = trained_parameters(_model(config.vocab_size, config))
    lengths = [-(-len(text) // 4.6) for text in texts]
    if config.architecture == "gpt2":
        rows = -(-int(sum(lengths)) // config.max_length)
    else:  # a gap sentence of every text, a row of every block
        rows = len(texts) + sum(int(-(-length // (config.max_length - 1))) for length in lengths)
    sizes = {"rows": len(texts), "tokens (estimate)": int(sum(lengths)), "parameters": parameters}
    return {**sizes, "steps (estimate)": total_steps(config, rows)}


def _texts(records: Sequence[Any], spec: str) -> list[str]:
    texts = [r.text for r in records if isinstance(r, Text)]
    if len(texts) < len(records):
        raise UserError(f"data {spec}: pretrain takes rows of `text`; sft learns from prompts with completions")
    return texts


def _task(train: list[str], test: list[str], tokenizer: Any, config: PretrainConfig) -> Task:
    if config.architecture == "gpt2":
        return LanguageModelling(train, test, tokenizer, config.max_length)
    return Denoising(train, test, tokenizer, config.max_length, config, config.copy_epochs)


def _model(vocabulary: int, config: PretrainConfig) -> Any:
    return new_model(
        config.architecture,
        vocab_size=vocabulary,
        max_length=config.max_length,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        dropout=config.dropout,
    )


def _figures(task: Task, model: Any) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Perplexities by metric, and their 95% intervals."""
    measured = task.measure(model)
    figures = {name: perplexity(*sums) for name, sums in measured.items()}
    return figures, {name: perplexity_interval(*sums) for name, sums in measured.items()}
