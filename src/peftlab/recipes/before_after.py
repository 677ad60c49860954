"""What a policy is measured by, whatever it learned from: the same held-out prompts, answered before and after."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.prompts import openings
from ..data.sources import load_records
from ..errors import UserError
from ..evaluation.intervals import bootstrap_mean
from ..evaluation.policy import Measure, evaluate_side, perplexity_ratio
from ..models.roles import POLICY, Roles
from ..models.stacks import Stack, stack_over
from ..rl.rollout import PromptBatch, ScoreFunction
from ..runs.rundir import RunDir
from ..sampling.sampler import Decoding
from .common import fitting_rows, note_data, say_measures, too_long
from .tasks.config import TaskConfig
from .tasks.task import WHOLE

EVAL_SEED = 10**6  # added to the run's: an evaluation draws from there, far from what was learned from
REWARD = "eval/reward"


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
        taker = f"max_new_tokens {config.max_new_tokens}"
        rows = fitting_rows(run, spec, token_ids, longest, taker)
        if not rows:
            raise UserError(f"data {spec}: every prompt is {too_long(longest, taker)}")
        return batch.take(rows)
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in token_ids]
    return PromptBatch(token_ids, texts, found.records)


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
    say_measures(run, f"answers {len(prompts.texts)} held-out prompts, without and with what was learned")
    decoding = Decoding(max_new_tokens)
    sides = {
        name: evaluate_side(
            roles, role, prompts.token_ids, prompts.texts, prompts.records, measure, decoding, seed=seed + EVAL_SEED
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
        rewarded = [
            reward_columns(reward, prompts.texts, side.completions, prompts.records, side.measured)
            for side in (before, after)
        ]
        for figures, columns in zip((baseline, metrics), rewarded, strict=True):
            figures |= {name: float(values.mean()) for name, values in columns.items()}
        intervals |= {name: bootstrap_mean(values, after.clusters) for name, values in rewarded[1].items()}
    return BeforeAfter(metrics, baseline, intervals)


def reward_columns(
    reward: ScoreFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    records: Sequence[Any],
    measured: Container[str],
) -> dict[str, np.ndarray]:
    """The reward of each completion, and of several parts each that is not among what is `measured` anyway."""
    scores, parts = reward(prompts, completions, records)
    apart = {f"eval/part/{name}": part for name, part in parts.items() if f"rubric/{name}" not in measured}
    told = {REWARD: scores, **(apart if len(parts) > 1 else {})}
    return {name: values.double().numpy() for name, values in told.items()}


def policy_stack(config: TaskConfig, under: Stack, tokenizer: Any) -> Stack:
    """What the adapter of a policy says that it is: on what it stands, and what it was made for."""
    facts = {"want": config.want} if config.want else {}
    return stack_over(config.model, under, tokenizer, recipe=config.recipe, task=config.task, **facts)
