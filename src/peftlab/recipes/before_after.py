"""What a policy is measured by, whatever it learned from: the same held-out prompts, answered before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.prompts import openings
from ..data.sources import load_records
from ..errors import UserError
from ..evaluation.intervals import bootstrap_mean
from ..evaluation.policy import Measure, Side, evaluate_side, perplexity_ratio
from ..models.roles import POLICY, Roles
from ..rl.rollout import PromptBatch, ScoreFunction
from ..runs.progress import say
from ..runs.rundir import RunDir
from ..sampling.sampler import Decoding
from .common import note_data
from .tasks.config import TaskConfig
from .tasks.task import WHOLE


@dataclass(frozen=True)
class BeforeAfter:
    """Figures of the policy, the same of its reference, and intervals of the policy's."""

    metrics: dict[str, float]
    baseline: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def longest_prompt(config: TaskConfig, model: Any) -> int:
    """Tokens of the longest prompt that leaves room for an answer in the model's context; UserError where none does."""
    context, longest = int(model.config.max_position_embeddings), config.prompt_tokens[1]
    if max(longest, 1) + config.max_new_tokens > context:
        raise UserError(
            f"max_new_tokens: prompts of up to {longest} tokens and {config.max_new_tokens} new ones exceed the "
            f"context of {config.model}, {context} tokens"
        )
    return context - config.max_new_tokens


def prompt_batch(
    run: RunDir, config: TaskConfig, spec: str, tokenizer: Any, longest: int, limit: int = 0
) -> PromptBatch:
    """The prompts of `spec` as the config has them, openings or whole; `limit` 0 takes all rows.

    Whole ones of more than `longest` tokens are left out, which is told; UserError where none remains.
    """
    found = load_records(spec, "prompts", limit or None, config.seed)
    note_data(run, found, limit)
    token_ids = openings([r.prompt for r in found.records], tokenizer, *config.prompt_tokens, config.seed)
    if config.prompt_tokens == WHOLE:
        batch = PromptBatch(token_ids, [r.prompt for r in found.records], found.records)
        return batch.take(_fitting(run, config, spec, token_ids, longest))
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in token_ids]
    return PromptBatch(token_ids, texts, found.records)


def _fitting(run: RunDir, config: TaskConfig, spec: str, prompts: list[list[int]], longest: int) -> list[int]:
    """The rows of prompts that leave room for an answer; tells how many do not."""
    rows = [i for i, ids in enumerate(prompts) if len(ids) <= longest]
    why = f"longer than {longest} tokens, which is what max_new_tokens {config.max_new_tokens} leaves of the context"
    if not rows:
        raise UserError(f"data {spec}: every prompt is {why}")
    if left := len(prompts) - len(rows):
        run.event("prompts_left_out", data=spec, rows=left, longest=longest)
        say(f"{spec}: {left} of {len(prompts)} prompts are left out: {why}")
    return rows


def before_after(
    run: RunDir,
    roles: Roles,
    prompts: PromptBatch,
    measure: Measure,
    max_new_tokens: int,
    seed: int,
    reward: ScoreFunction | None = None,
) -> BeforeAfter:
    """Sample both sides at temperature 1, measure them, and write samples.jsonl.

    `reward`: what the policy learned from, if that was a function; its mean is told too.
    """
    decoding = Decoding(max_new_tokens)
    sides = {
        name: evaluate_side(
            roles, role, prompts.token_ids, prompts.texts, prompts.records, measure, decoding, seed=seed + 10**6
        )
        for name, role in (("before", None), ("after", POLICY))
    }
    before, after = sides["before"], sides["after"]
    run.write_samples(
        {
            "prompt_id": record.id,
            "side": name,
            "prompt": prompt,
            "completion": side.completions[i],
            **{key.removeprefix("eval/"): float(values[i]) for key, values in side.measured.items()},
            "kl": float(side.kl[i]),
        }
        for name, side in sides.items()
        for i, (record, prompt) in enumerate(zip(prompts.records, prompts.texts, strict=True))
    )
    metrics = after.metrics() | {"eval/perplexity_ratio": perplexity_ratio(before, after)}
    baseline, intervals = before.metrics() | {"eval/perplexity_ratio": 1.0}, after.intervals()
    if reward is not None:
        baseline |= {name: float(values.mean()) for name, values in _rewarded(reward, prompts, before).items()}
        rewarded = _rewarded(reward, prompts, after)
        metrics |= {name: float(values.mean()) for name, values in rewarded.items()}
        intervals |= {name: bootstrap_mean(values, after.clusters) for name, values in rewarded.items()}
    return BeforeAfter(metrics, baseline, intervals)


def _rewarded(reward: ScoreFunction, prompts: PromptBatch, side: Side) -> dict[str, np.ndarray]:
    """The reward of each completion, and of several parts each that the task does not measure by anyway."""
    scores, parts = reward(prompts.texts, side.completions, prompts.records)
    apart = {f"eval/part/{name}": part for name, part in parts.items() if f"rubric/{name}" not in side.measured}
    told = {"eval/reward": scores, **(apart if len(parts) > 1 else {})}
    return {name: values.double().numpy() for name, values in told.items()}
