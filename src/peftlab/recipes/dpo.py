"""DPO on a LoRA policy: learn from pairs of answers which one is preferred, without a reward model.

The loss and its departures: docs/dpo.md. The pairs: `peftlab data preferences`, or a file of your own.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ..data.records import PreferencePair
from ..data.tokenize import encode
from ..errors import LabError, UserError
from ..evaluation.intervals import bootstrap_mean
from ..models.adapter_files import load_stack, save_adapter
from ..models.roles import POLICY, Roles
from ..models.stacks import Stack
from ..runs.rundir import RunDir
from ..training.arguments import TrainConfig, total_steps, training_arguments
from ..training.dpo import (
    Compared,
    PairPolicy,
    PairRow,
    collate_pairs,
    compare_rows,
    first_pairs,
    pair_length,
    pair_row,
)
from ..training.trainer import LabTrainer
from .before_after import before_after, longest_prompt, policy_stack, prompt_batch
from .common import (
    load_both,
    load_rows,
    note_model,
    resume_point,
    say_measures,
    seed_everything,
    trained_parameters,
)
from .tasks import TASKS
from .tasks.config import TaskConfig


class DpoConfig(TaskConfig, TrainConfig):
    """Every key of `peftlab dpo`. `batch_size` is in pairs; the task is that of the evaluation before and after."""

    CALLED: ClassVar = {"test": "prompts"}

    recipe: Literal["dpo"] = "dpo"
    train_data: str = "preferences/preferences-train.jsonl"
    eval_data: str = Field("preferences/preferences-test.jsonl", description="held-out pairs")
    train_limit: int = Field(0, ge=0, description="pairs to train on, a seeded sample; 0 = all")
    eval_limit: int = Field(500, ge=0)
    max_length: int = Field(512, ge=8, description="tokens of a prompt with an answer; the prompt loses its oldest")
    answers_end: bool = Field(True, description="an EOS ends each answer; false for answers cut at a length")
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = Field(0.1, gt=0, description="how strongly the policy is held to its reference")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs expected to be the wrong way round")
    prompts: str = Field("imdb:prompts", description="prompts of the evaluation before and after")

    @model_validator(mode="after")
    def _loss_and_judge_act(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            same = self.beta / (1 - 2 * self.label_smoothing)
            raise ValueError(f"label_smoothing: only rescales beta where loss is ipo; use beta={same:.4g} instead")
        if self.want and not self.judge:
            raise ValueError("want: only a judge looks for a sentiment; name one as judge, or leave want out")
        return self


CONFIG = DpoConfig


def run(config: DpoConfig, run: RunDir) -> dict[str, Any]:
    """Train, measure held-out pairs and prompts before and after, and write the run directory."""
    with run.session():
        if run.finished:
            return run.summary or {}
        seed_everything(config.seed)
        roles, under = _roles(config)
        note_model(run, "model", config.model, under.fingerprint)
        tokenizer = roles.tokenizer
        base_hash = roles.frozen_hash()
        train, held_out = load_both(run, config, "preferences")
        rows, test = rows_of(train, tokenizer, config), rows_of(held_out, tokenizer, config)
        # Loaded before training, so that a judge or data that is not there costs seconds.
        longest = longest_prompt(config, roles.model)
        prompts = prompt_batch(run, config, config.prompts, tokenizer, longest, config.eval_prompts)
        measure = TASKS[config.task].measure(run, config)

        policy = PairPolicy(roles, config.loss, config.beta, config.label_smoothing)
        # The adapter is fresh, on a resume too: it gets the checkpoint's weights in `fit`.
        first = first_pairs(policy, rows[: config.batch_size], tokenizer.pad_token_id)
        say_measures(run)
        before = _figures(compare_rows(policy, test, tokenizer.pad_token_id), config)
        checkpoint = resume_point(run)
        if checkpoint is None:
            size = {"data/rows": len(rows), "data/tokens": _tokens(rows)}
            run.log(first.metrics() | before | size, 0)
        first.check()
        trainer = LabTrainer(
            policy,
            training_arguments(config, len(rows)),
            rows,
            [pair_length(row) for row in rows],
            lambda batch: collate_pairs(batch, tokenizer.pad_token_id),
            run.checkpoints,
            lambda metrics, step: run.log({**metrics, **policy.drain()}, step),
            lambda: run.stop_requested,
        )
        with run.stepping():
            trainer.fit(checkpoint)
        if roles.frozen_hash() != base_hash:
            raise LabError("the frozen base changed during training; its adapter was not saved")
        compared = compare_rows(policy, test, tokenizer.pad_token_id)
        after = _figures(compared, config)
        run.log(after, trainer.state.global_step)
        save_adapter(roles.model, POLICY, run.path / "adapter", policy_stack(config, under, tokenizer))
        sides = before_after(run, roles, prompts, measure, config.max_new_tokens, config.seed)
        of_prompt = np.array([record.prompt for record in held_out])
        intervals = {"eval/pair_accuracy": bootstrap_mean(compared.wins().numpy(), of_prompt), **sides.intervals}
        artifacts = {"adapter": "adapter", "samples": "samples.jsonl"}
        return run.finish(after | sides.metrics | first.metrics(), before | sides.baseline, intervals, artifacts)


def plan(config: DpoConfig) -> dict[str, Any]:
    """Sizes of the job, nothing trained."""
    roles, under = _roles(config)
    rows = rows_of(load_rows(config, "train", "preferences").records, roles.tokenizer, config)
    sizes = roles.bytes_per_role()
    return {
        "base": under.base,
        "rows": len(rows),
        "tokens": _tokens(rows),
        "steps": total_steps(config, len(rows)),
        "trained parameters": trained_parameters(roles.model),
        "bytes": {role: sizes[role] for role in ("base", "policy", "sampler")},
    }


def rows_of(records: list[PreferencePair], tokenizer: Any, config: DpoConfig) -> list[PairRow]:
    """Token ids of each pair. Prompt and answers are encoded apart, as they are when the policy samples."""
    prompts, chosen, rejected = (
        encode([getattr(record, field) for record in records], tokenizer) for field in ("prompt", "chosen", "rejected")
    )
    end = [tokenizer.eos_token_id] if config.answers_end else []
    return [
        pair_row(prompt, [*better, *end], [*worse, *end], config.max_length)
        for prompt, better, worse in zip(prompts, chosen, rejected, strict=True)
    ]


def _roles(config: DpoConfig) -> tuple[Roles, Stack]:
    backbone, under = load_stack(config.model, device=config.device)
    if under.kind != "causal":
        raise UserError(f"model {config.model}: a {under.kind}; dpo needs a causal language model or its adapter")
    context = backbone.model.config.max_position_embeddings
    if config.max_length > context:
        raise UserError(f"max_length: {config.max_length} exceeds the context of {config.model}, {context} tokens")
    longest_prompt(config, backbone.model)
    return Roles(backbone, config.lora), under


def _figures(compared: Compared, config: DpoConfig) -> dict[str, float]:
    return {f"eval/{name}": value for name, value in compared.figures(config.beta).items()}


def _tokens(rows: list[PairRow]) -> int:
    """Tokens that the model reads of the rows: each prompt twice, with either answer."""
    return sum(2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) for row in rows)
