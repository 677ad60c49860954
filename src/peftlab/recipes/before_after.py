"""What a policy is measured by, whatever it learned from: the same held-out prompts, answered before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data.prompts import openings
from ..data.sources import load_records
from ..errors import UserError
from ..evaluation.intervals import bootstrap_mean
from ..evaluation.policy import evaluate_side, perplexity_ratio
from ..models.classifier import TextClassifier
from ..models.roles import POLICY, Roles
from ..rewards.sentiment import class_of
from ..rl.rollout import PromptBatch, ScoreFunction
from ..runs.rundir import RunDir
from ..sampling.sampler import Decoding
from .common import note_data, note_model


@dataclass(frozen=True)
class BeforeAfter:
    """Figures of the policy, the same of its reference, and intervals of the policy's."""

    metrics: dict[str, float]
    baseline: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def prompt_batch(
    run: RunDir, spec: str, tokenizer: Any, prompt_tokens: tuple[int, int], seed: int, limit: int = 0
) -> PromptBatch:
    """The openings of `spec`'s prompts, of so many tokens at least and at most; `limit` 0 takes all prompts."""
    low, high = prompt_tokens
    if not 1 <= low <= high:
        raise UserError(f"prompt_tokens: expected 1 <= shortest <= longest, not {low}, {high}")
    records = load_records(spec, "prompts", limit or None, seed)
    note_data(run, records, limit)
    token_ids = openings([r.prompt for r in records.records], tokenizer, low, high, seed)
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in token_ids]
    return PromptBatch(token_ids, texts, records.records)


def load_judge(run: RunDir, name: str, want: str, device: str) -> TextClassifier:
    """The independent classifier of an evaluation, noted in the run; UserError where it does not know `want`."""
    judge = TextClassifier.load(name, device=device, dtype="bfloat16")
    class_of(judge, want)
    note_model(run, "judge", name)
    return judge


def before_after(
    run: RunDir,
    roles: Roles,
    prompts: PromptBatch,
    judge: TextClassifier,
    want: str,
    max_new_tokens: int,
    seed: int,
    reward: ScoreFunction | None = None,
) -> BeforeAfter:
    """Sample both sides at temperature 1, measure them by the independent judge, and write samples.jsonl.

    `reward`: what the policy learned from, if that was a function; its mean is told too.
    """
    label, decoding = class_of(judge, want), Decoding(max_new_tokens)
    sides = {
        name: evaluate_side(roles, role, prompts.token_ids, prompts.texts, judge, label, decoding, seed=seed + 10**6)
        for name, role in (("before", None), ("after", POLICY))
    }
    before, after = sides["before"], sides["after"]
    run.write_samples(
        {
            "prompt_id": record.id,
            "side": name,
            "prompt": prompt,
            "completion": side.completions[i],
            "judge": float(side.judge[i]),
            "kl": float(side.kl[i]),
        }
        for name, side in sides.items()
        for i, (record, prompt) in enumerate(zip(prompts.records, prompts.texts, strict=True))
    )
    metrics = after.metrics() | {"eval/perplexity_ratio": perplexity_ratio(before, after)}
    baseline, intervals = before.metrics() | {"eval/perplexity_ratio": 1.0}, after.intervals()
    if reward is not None:
        first, last = (
            reward(prompts.texts, side.completions, prompts.records)[0].double().numpy() for side in (before, after)
        )
        metrics |= {"eval/reward": float(last.mean())}
        baseline |= {"eval/reward": float(first.mean())}
        intervals |= {"eval/reward": bootstrap_mean(last)}
    return BeforeAfter(metrics, baseline, intervals)
