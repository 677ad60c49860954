"""`peftlab eval` of a run of ppo, rloo or dpo: its policy beside its reference, or against any other model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.tokenize import encode
from ..errors import UserError
from ..evaluation.diversity import self_bleu_4
from ..evaluation.intervals import bootstrap_mean
from ..evaluation.policy import Measure, Side, evaluate_side, perplexity_ratio
from ..evaluation.winrate import Scored, win_rate
from ..models.adapter_files import load_stack
from ..models.roles import POLICY, Roles
from ..rl.rollout import PromptBatch
from ..runs.progress import doing
from ..sampling.sampler import Decoding, Sampler
from .before_after import EVAL_SEED
from .makers import sample_texts
from .policy_options import PolicyOptions, Ruler, ruler_of, with_reward
from .policy_run import PolicyRun


def evaluate_policy(
    folder: Path, data: str | None, limit: int | None, device: str, options: PolicyOptions
) -> dict[str, Any]:
    """Figures of the policy, the same of its reference (`baseline`), and 95% intervals by prompt of the policy's.

    With one sample a prompt they are those of the run's own end.
    """
    opened = PolicyRun.open(folder, device)
    opened.load_policy(options.checkpoint)
    prompts = opened.prompts(data, limit)
    measure = with_reward(opened.measure(), opened.reward())
    before, after = (sampled_side(opened, role, prompts, options.samples, measure) for role in (None, POLICY))
    spread = {"eval/length": after.lengths, "eval/eos_fraction": after.ended}
    return {
        **_told(opened, prompts, options),
        "metrics": _figures(after, before),
        "baseline": _figures(before, before),
        "intervals": after.intervals() | {name: bootstrap_mean(of, after.clusters) for name, of in spread.items()},
    }


def compare_policy(
    folder: Path, data: str | None, limit: int | None, device: str, options: PolicyOptions
) -> dict[str, Any]:
    """Win rates of the policy's answers against another model's, to the same prompts; `baseline` is the other's score.

    Either answers at temperature 1. Lengths are counted in tokens of the run's tokenizer, whoever wrote the answer.
    """
    opened = PolicyRun.open(folder, device)
    opened.load_policy(options.checkpoint)
    prompts = opened.prompts(data, limit)
    by, ruler = ruler_of(opened, options.by, prompts)
    asked = prompts.repeated(options.samples)
    other, other_ids = _other(str(options.against), opened, asked, device)
    policy = own_sampler(opened.roles, POLICY)
    ours = scored(policy, "the policy", asked.token_ids, asked, ruler, opened, options.samples)
    theirs = scored(other, str(options.against), other_ids, asked, ruler, opened, options.samples)
    found = win_rate(ours, theirs, options.tie_margin)
    rows = np.repeat(np.arange(len(prompts.texts)), options.samples)
    return {
        **_told(opened, prompts, options),
        "against": options.against,
        "by": options.by or by,
        "tie_margin": options.tie_margin,
        "metrics": {**found.metrics, by: float(ours.scores.mean())},
        "baseline": {by: float(theirs.scores.mean())},
        "intervals": {**found.intervals, by: bootstrap_mean(ours.scores.ravel(), rows)},
    }


def sampled_side(opened: PolicyRun, role: str | None, prompts: PromptBatch, samples: int, measure: Measure) -> Side:
    """`samples` completions a prompt of a role, at temperature 1, measured."""
    asked, config = prompts.repeated(samples), opened.config
    doing(f"samples and measures {len(asked.texts)} answers of {'the policy' if role else 'its reference'}")
    return evaluate_side(
        opened.roles,
        role,
        asked.token_ids,
        asked.texts,
        asked.records,
        measure,
        Decoding(config.max_new_tokens),
        config.seed + EVAL_SEED,
    )


def own_sampler(roles: Roles, role: str | None) -> Sampler:
    """Samples from a role's weights, until the next `refresh`, or pass of a policy that is read merged."""
    roles.refresh(role)
    return Sampler(roles.twin, roles.tokenizer)


def scored(
    sampler: Sampler,
    author: str,
    token_ids: Sequence[list[int]],
    asked: PromptBatch,
    ruler: Ruler,
    opened: PolicyRun,
    samples: int,
) -> Scored:
    """One completion a row of `asked`, scored, as (prompts, samples). `author`: whose they are, for who waits."""
    texts = completions(sampler, author, token_ids, opened)
    lengths = np.array(list(map(len, encode(texts, opened.roles.tokenizer))))
    scores = ruler(asked.texts, texts, asked.records)
    return Scored(scores.reshape(-1, samples), lengths.reshape(-1, samples))


def completions(sampler: Sampler, author: str, token_ids: Sequence[list[int]], opened: PolicyRun) -> list[str]:
    """One completion a prompt at temperature 1; row i has the same draws whoever samples."""
    seeds = [opened.config.seed + EVAL_SEED + row for row in range(len(token_ids))]
    texts, _ = sample_texts(sampler, token_ids, seeds, Decoding(opened.config.max_new_tokens), 64, author)
    return texts


def _other(name: str, opened: PolicyRun, asked: PromptBatch, device: str) -> tuple[Sampler, list[list[int]]]:
    """Another model, and the prompts in its tokens: the very ones of the run where it has the run's base."""
    backbone, stack = load_stack(name, device=device)
    if stack.kind != "causal":
        raise UserError(f"--against {name}: a {stack.kind}; give a causal language model, its adapter, or a run")
    same = backbone.fingerprint == opened.ground[0].fingerprint
    ids = asked.token_ids if same else encode(asked.texts, backbone.tokenizer)
    room = int(backbone.model.config.max_position_embeddings) - opened.config.max_new_tokens
    long = next((record.id for record, row in zip(asked.records, ids, strict=True) if len(row) > room), None)
    if long is not None:
        raise UserError(
            f"--against {name}: prompt {long} leaves no room for {opened.config.max_new_tokens} tokens in its context; "
            "give --data of shorter prompts"
        )
    return Sampler(backbone.model, backbone.tokenizer), ids


def _figures(side: Side, before: Side) -> dict[str, float]:
    return side.metrics() | {
        "eval/perplexity_ratio": perplexity_ratio(before, side),
        "eval/reference_perplexity": float(np.exp(side.mean_nll())),
        "eval/self_bleu_4": self_bleu_4(side.completions),
    }


def _told(opened: PolicyRun, prompts: PromptBatch, options: PolicyOptions) -> dict[str, Any]:
    return {
        "run": opened.run.name,
        "checkpoint": "the run's end" if options.checkpoint is None else options.checkpoint,
        "prompts": len(prompts.texts),
        "samples": options.samples,
        "sha256": opened.run.sha256,
    }
