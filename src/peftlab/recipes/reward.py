"""A reward model from pairs of answers: LoRA and a scalar head on a frozen base, or an ensemble of them.

What is computed and how it departs from the papers: docs/reward.md.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from ..data.records import PreferencePair
from ..data.sources import RecordSet, load_records
from ..errors import UserError
from ..evaluation.calibration import fit_temperature, reliability
from ..evaluation.pairs import (
    ScoredPairs,
    accuracy_interval,
    agreement,
    histogram,
    longer_wins,
    most_wrong,
    pair_intervals,
    pair_metrics,
    texts_of,
    wins,
)
from ..models.adapter_files import load_stack
from ..models.adapters import Lora
from ..models.backbone import Backbone
from ..models.reward_model import RewardModel, RewardNet
from ..models.reward_scale import Combine, Scale
from ..models.stacks import Stack, stack_over
from ..ops.losses import bradley_terry_loss
from ..runs.atomic import write_json
from ..runs.checkpoint import Checkpoint, CheckpointStore
from ..runs.progress import say
from ..runs.rundir import RunDir
from ..training.arguments import TrainConfig, total_steps, training_arguments
from ..training.trainer import LabTrainer
from .common import load_recorded, load_rows, newest_checkpoint, note_data, note_model, say_measures, seed_everything
from .reward_data import PairRoles, collate_answers, pair_length, pair_roles, pair_rows, pair_tokens
from .several import of_first

SCALE_ON = 256  # training pairs whose answers set gain and bias
ERRORS_SHOWN = 10


class RewardConfig(TrainConfig):
    """Every key of `peftlab reward`. A row is a pair: limits and `batch_size` count pairs."""

    recipe: Literal["reward"] = "reward"
    model: str = Field("tiny-gpt2", description="a base model, or an adapter (an SFT run's) that is merged into it")
    train_data: str = "preferences/preferences-train.jsonl"
    eval_data: str = Field("preferences/preferences-test.jsonl", description="held-out pairs")
    ood_data: str = Field("", description="pairs of another policy's answers, to be measured on as well")
    train_limit: int = Field(0, ge=0, description="pairs to train on, a seeded sample; 0 = all")
    eval_limit: int = Field(0, ge=0)
    max_length: int = Field(512, ge=8, description="tokens of a prompt with an answer; the prompt loses its oldest")
    objective: Literal["pairwise", "pointwise"] = Field("pairwise", description="pointwise: learn the rubric's scores")
    margin: float = Field(0.0, ge=0, description="pairwise: so many times the data's margin a difference must reach")
    centre: float = Field(0.01, ge=0, description="pairwise: weight of (chosen + rejected)^2; keeps scores near 0")
    flip_labels: float = Field(0.0, ge=0, le=1, description="share of training pairs to turn round, an experiment")
    calibrate: float = Field(0.1, ge=0, lt=1, description="share of prompts kept for the temperature, if 100 pairs")
    members: int = Field(1, ge=1, le=16, description="reward models of an ensemble; they differ in seed and data order")
    combine: Combine = "mean"
    std_weight: float = Field(1.0, ge=0, description="standard deviations that mean-std takes off the mean")
    lora: Lora = Lora()

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        if self.objective == "pointwise" and (self.flip_labels or self.margin):
            raise ValueError("flip_labels and margin are about pairs; objective=pointwise looks at single answers")
        idle = {
            "centre": self.objective == "pointwise" and "objective is pairwise",
            "combine": self.members == 1 and "members is 2 or more",
            "std_weight": self.combine != "mean-std" and "combine is mean-std",
        }
        for key, only in idle.items():
            if only and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: acts only where {only}; leave it out")
        return self


CONFIG = RewardConfig


def run(config: RewardConfig, run: RunDir) -> dict[str, Any]:
    """Train every member, set scale and temperature, and measure on held-out pairs, before and after."""
    with run.session():
        if run.finished:
            return run.summary or {}
        seed_everything(config.seed)
        backbone, under = _base(config, config.device)
        note_model(run, "model", config.model, backbone.fingerprint)
        pairs = _recorded_pairs(config, run)
        net = RewardNet.fresh(backbone, config.lora, config.members, config.seed)
        model = RewardModel(run.name, net, backbone.tokenizer, config.max_length, Scale(((1.0, 0.0),) * config.members))
        rows = pair_rows(pairs.train, model, config.objective, config.margin)
        say_measures(run)
        fresh = _scaled(model, pairs.held_out, config)
        before, strange = (ScoredPairs.of(fresh, part) for part in (pairs.held_out, pairs.ood))
        baseline = pair_metrics(before) | _ood_metrics(strange)
        steps = total_steps(config, len(rows))
        stores = _stores(run, config.members)
        checkpoints = of_first(lambda: _resume_points(run, stores, steps))
        if checkpoints[0] is None:
            run.log(baseline | {"data/rows": len(rows), "data/tokens": pair_tokens(rows)}, 0)
        for member, (store, checkpoint) in enumerate(zip(stores, checkpoints, strict=True)):
            trainer = _trainer(config, model, member, rows, store, run, member * steps)
            with run.stepping():
                trainer.fit(checkpoint)

        sampled = random.Random(config.seed).sample(pairs.train, min(SCALE_ON, len(pairs.train)))
        model = _calibrated(_scaled(model, sampled, config), pairs.kept)
        after, strange = (ScoredPairs.of(model, part) for part in (pairs.held_out, pairs.ood))
        metrics = pair_metrics(after) | _ood_metrics(strange)
        if pairs.kept:
            metrics["eval/temperature"] = model.scale.temperature
        metrics |= _beside(model, after)
        run.log(metrics, config.members * steps)
        write_json(run.path / "reward.json", _tables(before, after))
        model.save(run.path / "adapter", stack_over(config.model, under, backbone.tokenizer, recipe="reward"))
        intervals = pair_intervals(after)
        if pairs.ood:
            intervals["eval/ood_pair_accuracy"] = accuracy_interval(strange)
        return run.finish(metrics, baseline, intervals, {"adapter": "adapter"})


def plan(config: RewardConfig) -> dict[str, Any]:
    """Sizes of the job, nothing trained."""
    backbone, under = _base(config, "cpu")
    read = (load_rows(config, "train", "preferences"), load_rows(config, "eval", "preferences"), _ood(config))
    pairs = _in_roles(config, *read)
    net = RewardNet.fresh(backbone, config.lora)
    rows = pair_rows(
        pairs.train, RewardModel("", net, backbone.tokenizer, config.max_length), config.objective, config.margin
    )
    apart = {"pairs dropped": pairs.dropped, "pairs kept for the temperature": len(pairs.kept)}
    return {
        "base": under.base,
        "rows": len(rows),
        "tokens": pair_tokens(rows),
        **{what: count for what, count in apart.items() if count},
        "steps": config.members * total_steps(config, len(rows)),
        "trained parameters": config.members * sum(p.numel() for p in net.learned(0).values()),
    }


def _recorded_pairs(config: RewardConfig, run: RunDir) -> PairRoles:
    train, held_out = (load_recorded(run, config, which, "preferences") for which in ("train", "eval"))
    ood = _ood(config)
    if ood:
        note_data(run, ood, config.eval_limit)
    pairs = _in_roles(config, train, held_out, ood)
    if pairs.dropped:
        run.event("pairs_dropped", pairs=pairs.dropped, reason="their prompts are evaluated on")
        say(f"{pairs.dropped} of {len(train.records)} training pairs dropped: their prompts are evaluated on")
    return pairs


def _in_roles(config: RewardConfig, train: RecordSet, held_out: RecordSet, ood: RecordSet | None) -> PairRoles:
    other = ood.records if ood else []
    return pair_roles(train.records, held_out.records, other, config.flip_labels, config.calibrate, config.seed)


def _ood(config: RewardConfig) -> RecordSet | None:
    if not config.ood_data:
        return None
    limit = config.eval_limit or None
    return load_records(
        config.ood_data, "preferences", limit, config.seed, columns=config.columns, on_bad_row=config.on_bad_row
    )


def _trainer(
    config: RewardConfig,
    model: RewardModel,
    member: int,
    rows: list[dict[str, Any]],
    store: CheckpointStore,
    run: RunDir,
    steps_before: int,
) -> LabTrainer:
    """Trains one member with a seed of its own; its steps are logged behind those of the members before it."""

    def loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if config.objective == "pointwise":
            return F.mse_loss(scores, targets.T.flatten())
        chosen, rejected = scores.chunk(2)
        return bradley_terry_loss(chosen, rejected, targets[:, 0], config.centre)

    model.net.learn(member)
    own = config.with_(seed=(config.seed + member) % 2**32)
    return LabTrainer(
        model.net,
        training_arguments(own, len(rows)),
        rows,
        [pair_length(row) for row in rows],
        lambda batch: collate_answers(batch, model.tokenizer.pad_token_id),
        store,
        lambda metrics, step: run.log(metrics, steps_before + step),
        lambda: run.stop_requested,
        loss=loss,
    )


def _stores(run: RunDir, members: int) -> list[CheckpointStore]:
    """Where each member's checkpoints go; a single model's are the run's own."""
    if members == 1:
        return [run.checkpoints]
    folder, logs = run.checkpoints.folder, run.checkpoints.logs
    return [CheckpointStore(folder / f"member-{member}", logs=logs) for member in range(members)]


def _resume_points(run: RunDir, stores: Sequence[CheckpointStore], steps: int) -> list[Path | None]:
    """The checkpoint that each member goes on from, None for its start; what was logged after them is dropped.

    Members are trained one after the other: behind the first that is not done, none has begun.
    """
    if len(stores) == 1:
        return [newest_checkpoint(run)]
    points: list[Path | None] = []
    newest: Checkpoint | None = None
    done = -1
    for member, store in enumerate(stores):
        checkpoint = None
        if member == 0 or done == member * steps:
            store.clean()
            checkpoint, skipped = store.newest_verified()
            for problem in skipped:
                run.event("checkpoint_skipped", reason=f"member {member}, {problem}")
        if checkpoint is not None:
            newest, done = checkpoint, member * steps + checkpoint.step
        points.append(checkpoint.path if checkpoint else None)
    run.cut_back(newest)
    return points


def _scaled(model: RewardModel, pairs: Sequence[PreferencePair], config: RewardConfig) -> RewardModel:
    """With scores of mean 0 and variance 1 over the answers of these pairs."""
    return replace(model, scale=Scale.fitted(model.logits(*texts_of(pairs)), config.combine, config.std_weight))


def _calibrated(model: RewardModel, kept: Sequence[PreferencePair]) -> RewardModel:
    """With the temperature at which its probabilities fit the kept pairs best."""
    if not kept:
        return model
    logits = torch.tensor(ScoredPairs.of(model, kept).logits)
    table = torch.stack([torch.zeros_like(logits), logits], 1)
    temperature = fit_temperature(table, torch.ones(len(kept), dtype=torch.long))
    return replace(model, scale=replace(model.scale, temperature=temperature))


def _ood_metrics(pairs: ScoredPairs) -> dict[str, float]:
    return {"eval/ood_pair_accuracy": float(wins(pairs.logits).mean())} if pairs.records else {}


def _beside(model: RewardModel, after: ScoredPairs) -> dict[str, float]:
    """What the accuracy is to be compared with: preferring the longer answer, and the members one by one."""
    found = {"compare/pair_accuracy_longer": longer_wins(after)}
    if len(model.scale.members) > 1:
        chosen, rejected = np.split(model.logits(*texts_of(after.records)).numpy(), 2)
        found["compare/pair_accuracy_member"] = float(wins(chosen - rejected).mean())
    return found


def _tables(before: ScoredPairs, after: ScoredPairs) -> dict[str, Any]:
    """reward.json: what the report shows beside the figures."""
    return {
        "histogram": {"before": histogram(before), "after": histogram(after)},
        "reliability": reliability(after.probabilities, np.ones(len(after.records), dtype=int)),
        "agreement": agreement(after),
        "wrong": most_wrong(after, ERRORS_SHOWN),
    }


def _base(config: RewardConfig, device: str) -> tuple[Backbone, Stack]:
    backbone, under = load_stack(config.model, device=device)
    if under.kind != "causal":
        raise UserError(f"model {config.model}: is a {under.kind}, but reward needs a causal language model")
    context = backbone.model.config.max_position_embeddings
    if config.max_length > context:
        raise UserError(f"max_length: {config.max_length} exceeds the context of {config.model}, {context} tokens")
    return backbone, under
