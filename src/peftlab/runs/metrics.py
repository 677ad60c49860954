"""Every metric that peftlab writes: what it means exactly, where it should lie, which way is better.

One registry serves the run directory (an unknown name is a programmer's KeyError), the report and
docs/metrics.md, which is the output of `python -m peftlab.runs.metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """A metric's meaning.

    `healthy` is the range (low, high) that the field expects, None for an open end, with its `source`;
    `limit` is the value above which the run stops.
    """

    name: str
    definition: str
    unit: str = ""
    healthy: tuple[float | None, float | None] | None = None
    better: Literal["higher", "lower"] | None = None
    limit: float | None = None
    source: str = ""


# The cached decode rounds differently from the full forward that recomputes it.
TIGHTEST = "tiny-gpt2 in fp32 on CPU, short prompts"
FIRST_RATIO_LIMITS = {TIGHTEST: 1e-5, "fp32": 1e-4, "fp32 in parts": 1e-3, "tf32": 5e-3, "bf16": 5e-3}


def first_ratio_limit(precision: str, *, tiny_on_cpu: bool = False) -> float:
    """The limit of invariant/first_ratio_error for `precision`: "fp32", "fp32 in parts", "tf32" or "bf16".

    `tiny_on_cpu`: of tiny-gpt2 itself on a CPU, at temperature 1 and behind prompts of a few tokens; with an adapter
    merged below it has had 8e-6, behind 450 tokens 1.2e-5, and at temperature .5 1.5e-5. In parts (ops/split.py) is how
    CUDA multiplies from compute capability 8 on: 5e-4 at most was measured with smollm2-135m, 9e-5 with tiny-gpt2, 3e-5
    with random weights.
    """
    tiny = tiny_on_cpu and precision == "fp32"
    return FIRST_RATIO_LIMITS[TIGHTEST if tiny else precision]


# How the names of what is measured on held-out data begin, before and after a job.
EVALUATION = ("eval/", "rubric/")
_N = "nats"
_REGISTRY = [
    Metric(
        "train/loss",
        "Mean cross-entropy per counted target token (per row for a classifier; dpo: its loss per pair), averaged over "
        "the rows since the last log, at least those of a whole batch: the last batch of an epoch may be a single row.",
        unit="nats", better="lower",
    ),
    Metric("train/lr", "Learning rate of the step just taken."),
    Metric(
        "train/grad_norm",
        "L2 norm of the gradient over all trained parameters, before clipping; not told of a batch shorter "
        "than the others.",
        source="watch for jumps: a spike of 10x its running level precedes divergence",
    ),
    Metric(
        "train/tokens_per_s",
        "Tokens that are not padding, per second of training, since the last log.",
        unit="tokens/s", better="higher",
    ),
    Metric(
        "train/reward_margin",
        "beta * (s(chosen) - s(rejected)), mean over the pairs trained on since the last log: by how much the "
        "policy's implicit reward prefers the chosen answer. s is log p(answer) - log q(answer) of policy p and "
        "reference q, summed over the answer's tokens (loss=ipo: their mean).",
        better="higher", source="Rafailov et al. 2023, section 4",
    ),
    Metric(
        "train/pair_accuracy",
        "Share of those pairs whose chosen answer has the higher s; a tie counts one half.",
        better="higher",
    ),
    Metric(
        "train/chosen_change",
        "log p(chosen) - log q(chosen) of policy p and reference q, summed over the answer's tokens, mean over "
        "those pairs.",
        unit="nats", source="often falls too while the margin grows: watch the samples",
    ),
    Metric(
        "train/rejected_change",
        "The same of the rejected answers.",
        unit="nats", better="lower",
    ),
    Metric(
        "eval/accuracy",
        "Share of the held-out rows whose most probable label is the true one.",
        better="higher",
    ),
    Metric(
        "compare/accuracy",
        "Accuracy on the same rows of the classifier that the key `compare` names, which reads as many tokens at most.",
        better="higher",
    ),
    Metric(
        "eval/f1",
        "Unweighted mean over labels of F1 = 2PR / (P + R), P and R taken over the held-out rows.",
        better="higher",
    ),
    Metric(
        "eval/ece",
        "Expected calibration error: over 15 equal-width bins of the top probability, the mean of |accuracy "
        "- confidence| weighted by the rows in each bin.",
        healthy=(0, 0.02), better="lower", source="the lab's target; definition: Guo et al. 2017",
    ),
    Metric(
        "eval/temperature",
        "What a classifier's logits, or a reward model's differences of raw scores, are divided by before "
        "probabilities are taken: fitted on training rows kept aside, and saved with the adapter. 1 changes nothing; "
        "above 1 it was too sure.",
        source="Guo et al. 2017",
    ),
    Metric(
        "eval/loss",
        "Mean cross-entropy per counted target token (per row for a classifier or pairwise model) over the "
        "held-out rows.",
        unit="nats", better="lower",
    ),
    Metric(
        "eval/perplexity",
        "exp of the total negative log-likelihood of the held-out tokens divided by their number, each "
        "predicted from the tokens before it in its window; of an encoder-decoder, the target's tokens, from its "
        "input too (pretrain: the hidden spans, sentinels and EOS; summarize: the reference summaries).",
        better="lower",
    ),
    Metric(
        "eval/gap_perplexity",
        "Perplexity per token of the principal sentences of held-out texts (EOS included), each predicted from the "
        "whole text, in which it stands, behind the prefix of a summary: how sure a T5 finds and copies it.",
        better="lower", source="gap sentences: Zhang et al. 2020",
    ),
    Metric(
        "eval/rouge1",
        "ROUGE-1 F-measure x 100: unigram overlap of summary and reference, unstemmed, mean over rows.",
        unit="points", better="higher", source="Lin 2004",
    ),
    Metric(
        "eval/rouge2",
        "ROUGE-2 F-measure x 100: bigram overlap of summary and reference, unstemmed, mean over rows.",
        unit="points", better="higher", source="Lin 2004",
    ),
    Metric(
        "eval/rougeL",
        "ROUGE-L F-measure x 100: longest common subsequence of summary and reference, unstemmed, mean over "
        "rows.",
        unit="points", better="higher", source="Lin 2004",
    ),
    *(
        Metric(
            f"compare/rouge{kind}",
            f"The same as eval/rouge{kind} for lead-1, the first sentence of each document: what any summarizer has to "
            "beat.",
            unit="points", better="higher",
        )
        for kind in "12L"
    ),
    Metric(
        "eval/pair_accuracy",
        "Share of the held-out pairs whose chosen answer scores above the rejected one; a tie counts one "
        "half.",
        better="higher",
    ),
    Metric(
        "eval/reward_margin",
        "beta * (s(chosen) - s(rejected)), mean over the held-out pairs: by how much the "
        "policy's implicit reward prefers the chosen answer. s is log p(answer) - log q(answer) of policy p and "
        "reference q, summed over the answer's tokens (loss=ipo: their mean).",
        better="higher", source="Rafailov et al. 2023, section 4",
    ),
    Metric(
        "eval/chosen_change",
        "log p(chosen) - log q(chosen) of policy p and reference q, summed over the answer's tokens, mean over "
        "the held-out pairs.",
        unit="nats", source="often falls too while the margin grows: watch the samples",
    ),
    Metric(
        "eval/rejected_change",
        "The same of the rejected answers.",
        unit="nats", better="lower",
    ),
    *(
        Metric(
            f"eval/pair_accuracy_{what}_{third}",
            f"The same over the third of the held-out pairs whose {words} is {size}.",
            better="higher",
        )
        for what, words, sizes in (
            ("margin", "margin in the data", ("smallest", "neither small nor large", "largest")),
            ("length", "length in tokens, chosen minus rejected,", ("smallest", "near the middle", "largest")),
        )
        for third, size in zip(("low", "middle", "high"), sizes, strict=True)
    ),
    Metric(
        "eval/ood_pair_accuracy",
        "eval/pair_accuracy on the pairs that the key `ood_data` names: answers of another policy.",
        better="higher",
    ),
    Metric(
        "eval/length_correlation",
        "Spearman's rank correlation of an answer's score with its length in tokens, over the chosen and the rejected "
        "answers of the held-out pairs. Beside it, compare/pair_accuracy_longer says how far length decides the pairs.",
        source="Singhal et al. 2023: much of what reward models reward is length",
    ),
    Metric(
        "compare/pair_accuracy_longer",
        "Pair accuracy on the same pairs of whoever always prefers the answer of more tokens.",
    ),
    Metric(
        "compare/pair_accuracy_member",
        "Mean over the members of an ensemble of the pair accuracy of each alone, on the same pairs.",
        better="higher",
    ),
    Metric(
        "compare/win_rate",
        "Share of the pairs, an answer of the policy and one of the other model to the same prompt, that the policy's "
        "wins by score; a tie counts one half. All pairs of a prompt are compared.",
        better="higher", source="0.5 is a draw; interval by prompt",
    ),
    Metric("compare/ties", "Share of those pairs whose scores are at most the tie margin apart."),
    Metric(
        "compare/win_rate_length_matched",
        "The win rate of those pairs alone whose lengths in tokens differ by 10% of the longer at most: what is left "
        "of it where length cannot decide.",
        better="higher", source="Singhal et al. 2023",
    ),
    Metric("compare/length_matched", "Share of the pairs that are so matched."),
    Metric(
        "agreement/*",
        "Of the held-out pairs that this part of the rubric tells apart, the share in which the reward model gives the "
        "higher score to the answer that the part prefers; a tie counts one half.",
    ),
    Metric(
        "eval/judge",
        "Mean probability of the wanted sentiment by a judge that shares neither architecture nor data with "
        "the reward, over the evaluation prompts, one sampled completion each.",
        better="higher",
    ),
    Metric(
        "eval/kl",
        "Exact KL(policy || reference) over the full vocabulary at each token of the policy's samples, "
        "summed over a completion, mean over completions.",
        unit="nats", better="lower",
        source="spend: the tilted optimum of a 0/1 reward of mean .5 reaches .92 at .41 nats (computed)",
    ),
    Metric(
        "eval/length",
        "Counted tokens of a completion, its EOS included, mean over completions.",
        unit="tokens",
    ),
    Metric(
        "eval/perplexity_ratio",
        "exp of the mean negative log-likelihood, under the frozen reference (the SFT model, where there is one), of "
        "the policy's samples, over the same of the reference's own samples, both at temperature 1.",
        healthy=(None, 1.3), better="lower",
        source="the lab's demo bound; above it the text drifts from the language of the data",
    ),
    Metric(
        "eval/reference_perplexity",
        "exp of the mean negative log-likelihood per token of the policy's samples under the frozen reference.",
        better="lower", source="compare with the reference's own samples, its baseline",
    ),
    Metric(
        "eval/distinct_1",
        "Different words over all words (lower-cased, split at white space), pooled over the completions; "
        "it falls as their number grows, so compare equal counts.",
        better="higher", source="Li et al. 2016",
    ),
    Metric(
        "eval/distinct_2",
        "Different pairs of neighbouring words over all such pairs, pooled over the completions; it falls "
        "as their number grows, so compare equal counts.",
        better="higher", source="Li et al. 2016",
    ),
    Metric(
        "eval/self_bleu_4",
        "BLEU-4 of each completion with the others as references, mean over completions; high means that "
        "they repeat each other.",
        better="lower", source="Zhu et al. 2018",
    ),
    Metric(
        "eval/entropy",
        "Entropy of the policy's next-token distribution, mean over the counted tokens of its samples.",
        unit="nats/token",
    ),
    Metric(
        "eval/reward",
        "Reward before any KL penalty, mean over the evaluation completions.",
        better="higher",
    ),
    Metric(
        "eval/part/*",
        "One named part of a reward of several, before weighting, mean over the evaluation completions; not those of "
        "the rubric in task explanation, which stand as rubric/*.",
        better="higher",
    ),
    Metric(
        "eval/eos_fraction",
        "Share of the evaluation completions that EOS ended before the length limit.",
    ),
    Metric(
        "rubric/label",
        "Share of the held-out answers that state the review's true sentiment; an answer that states none misses it.",
        better="higher",
    ),
    Metric(
        "rubric/explained",
        "Share of the held-out answers with four words or more beside the label.",
        better="higher",
    ),
    Metric(
        "rubric/evidence",
        "Share of the held-out answers that cite the review: a quotation of two words or more, or a run of three, "
        "that stands in it and is not of common words alone.",
        better="higher",
    ),
    Metric(
        "rubric/length",
        "1 for an answer of 6 to 45 words, words / 6 below and 45 / words above, mean over the held-out answers.",
        better="higher",
    ),
    Metric(
        "rubric/repetition",
        "Different runs of three words over all such runs of an answer (1 where nothing is said twice), mean over the "
        "held-out answers.",
        better="higher",
    ),
    Metric(
        "rubric/ended",
        "Share of the held-out answers whose last sentence is whole.",
        better="higher",
    ),
    Metric(
        "rubric/all",
        "Share of the held-out answers for which every part of the rubric is 1.",
        better="higher",
    ),
    Metric(
        "invariant/first_kl",
        "Exact KL between the logits with adapters on and off in one scoring pass, summed over a "
        "completion, the largest of the first batch, before the first update.",
        unit="nats", healthy=(0, 0), better="lower", limit=0.0,
        source="a fresh LoRA equals its base bitwise",
    ),
    Metric(
        "invariant/first_loss_error",
        "|loss / expected - 1| of dpo's first pairs, before the first update: a policy that equals its reference has "
        "the loss ln 2, with loss=ipo 1 / (2 beta)^2.",
        healthy=(0, 1e-6), better="lower", limit=1e-6,
        source="both log-ratios are exactly 0 there; what is left is rounding in float32",
    ),
    Metric(
        "invariant/first_ratio_error",
        "Largest |exp(logp recomputed - logp sampled) - 1| over the counted tokens of the first batch, "
        "before the first update.",
        healthy=(0, 1e-4), better="lower", limit=1e-4,
        source="float noise of the cached decode; limits by precision: "
        + ", ".join(f"{limit:g} {where}" for where, limit in FIRST_RATIO_LIMITS.items()).replace("e-0", "e-"),
    ),
    Metric(
        "reward/mean",
        "Reward of a completion before any KL penalty (the sum of its weighted parts), mean over the step's "
        "rollouts.",
        better="higher",
    ),
    Metric(
        "reward/std",
        "Standard deviation of that reward over the step's rollouts.",
        healthy=(0.1, None),
        source="judgement: with rewards normalised to variance 1, near 0 leaves nothing to learn from",
    ),
    Metric(
        "reward/group_std",
        "Standard deviation (n - 1) of the return, reward less KL penalty, among the completions of one prompt, mean "
        "over the step's prompts: what rloo learns from.",
        healthy=(0.1, None), source="as reward/std; a prompt whose completions are paid alike teaches nothing",
    ),
    Metric(
        "reward/part/*",
        "One named part of the reward, before weighting, mean over the step's rollouts.",
        better="higher",
    ),
    Metric(
        "kl/reference",
        "k1 estimate of KL(policy || reference): log p_policy - log p_reference of the sampled tokens, "
        "summed over a completion, mean over the step's rollouts.",
        unit="nats", better="lower",
        source="Schulman 2020; unbiased, may dip below 0 by chance, keeps below 0 only where sampling is "
               "truncated",
    ),
    Metric(
        "kl/exact",
        "KL(policy || reference) itself, over the whole vocabulary at each sampled token and at the temperature of "
        "sampling, summed over a completion, mean over the step's rollouts: what the estimates scatter about. In the "
        "first step and each record_every-th.",
        unit="nats", better="lower",
    ),
    Metric(
        "kl/k2",
        "k2 estimate of the same: half the squared log-ratio of the sampled tokens, summed over a completion, mean "
        "over the step's rollouts; never negative, close while the two are close.",
        unit="nats", better="lower", source="Schulman 2020; biased",
    ),
    Metric(
        "kl/k3",
        "k3 estimate of the same: (r - 1) - log r with r = p_reference / p_policy, summed over a "
        "completion, mean over the step's rollouts; never negative.",
        unit="nats", better="lower", source="Schulman 2020",
    ),
    Metric("kl/coef", "Coefficient beta of the per-token KL penalty in this step's rewards."),
    Metric(
        "policy/loss",
        "Clipped surrogate loss per counted token (rloo: per completion, over its length_normaliser), mean over the "
        "step's minibatches; its level says little, since advantages are centred.",
        source="Schulman et al. 2017, eq. 7",
    ),
    Metric(
        "policy/approx_kl",
        "KL(old || new) between the policy that sampled and the policy being trained, estimated as (r - 1) "
        "- log r with r = p_new / p_old, mean over the counted tokens of the step's minibatches.",
        unit="nats/token", healthy=(0, 0.02), better="lower",
        source="epochs break above .02; Spinning Up uses .015",
    ),
    Metric(
        "policy/clip_fraction",
        "Share of the counted tokens whose gradient the clip cuts off (the ratio p_new / p_old lies past 1 "
        "+- clip in the direction of the advantage), mean over the step's minibatches.",
        healthy=(0, 0.3), better="lower",
        source="above .3 most of the step's gradient is thrown away (judgement)",
    ),
    Metric(
        "policy/ratio_error",
        "Largest |p_new / p_old - 1| over the counted tokens of the step's first minibatch, before any "
        "update of the step.",
        healthy=(0, 1e-3), better="lower",
        source="the float noise of invariant/first_ratio_error, watched through the run; its limits hold",
    ),
    Metric(
        "policy/entropy",
        "Entropy of the policy's next-token distribution, mean over the counted tokens of the step's "
        "minibatches.",
        unit="nats/token", source="a steady fall towards 0 is collapse",
    ),
    Metric(
        "policy/grad_norm",
        "L2 norm of the gradient over all trained parameters, policy and any critic, before clipping, mean over "
        "the step's minibatches.",
    ),
    Metric(
        "value/loss",
        "Clipped squared error of the value against the return, halved, mean over the counted tokens of the "
        "step's minibatches.",
        better="lower", source="Schulman et al. 2017, eq. 9; value clipping: baselines",
    ),
    Metric(
        "value/clip_fraction",
        "Share of the counted tokens where the clipped value error is the larger one, mean over the step's "
        "minibatches.",
        healthy=(0, 0.3), better="lower", source="as policy/clip_fraction",
    ),
    Metric(
        "value/explained_variance",
        "1 - Var(return - value) / Var(return) over the counted tokens of the step's rollouts; 1 is "
        "perfect, 0 is no better than a constant.",
        healthy=(0, 1), better="higher", source="below 0 the critic hurts; usual within the first steps",
    ),
    Metric(
        "rollout/length",
        "Counted tokens of a completion, its EOS included, mean over the step's rollouts.",
        unit="tokens",
    ),
    Metric("rollout/eos_fraction", "Share of the step's rollouts that EOS ended before the length limit."),
    Metric(
        "advantage/mean",
        "Mean advantage over the counted tokens, before whitening.",
        source="far from 0 the critic is off",
    ),
    Metric("advantage/std", "Standard deviation of the advantage over the counted tokens, before whitening."),
    Metric(
        "update/epochs",
        "Passes over the step's rollouts that were made before approx_kl broke them off.",
        unit="epochs",
    ),
    Metric(
        "time/rollout_s",
        "Time to collect the step's rollouts: sampling, with their scoring where time/score_s is not logged "
        "beside it.",
        unit="s", better="lower",
    ),
    Metric(
        "time/score_s",
        "Time for rewards, reference log-probabilities and values.",
        unit="s", better="lower",
    ),
    Metric(
        "time/update_s",
        "Time from the collected rollouts to the end of the step's last epoch.",
        unit="s", better="lower",
    ),
    Metric("time/step_s", "Time of the whole step.", unit="s", better="lower"),
    Metric(
        "memory/peak_bytes",
        "Largest memory so far: allocated on the accelerator, or resident in the process on CPU.",
        unit="bytes", better="lower",
    ),
    Metric(
        "data/tokens",
        "Tokens of the training set in one epoch, without padding; of a T5, inputs and targets.",
        unit="tokens",
    ),
    Metric("data/rows", "Rows of the training set in one epoch, after packing.", unit="rows"),
]
METRICS = {entry.name: entry for entry in _REGISTRY}


def metric(name: str) -> Metric:
    """The registry's entry for `name`, by pattern for reward/part/*; KeyError for a name nobody defined."""
    if name in METRICS:
        return METRICS[name]
    pattern = f"{name.rpartition('/')[0]}/*"
    if pattern in METRICS and not name.endswith("/"):
        return METRICS[pattern]
    raise KeyError(f"metric {name!r} is not in the registry peftlab.runs.metrics; define it there")


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a logged row, without what is null: a figure that was not finite."""
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def healthy_text(entry: Metric) -> str:
    """The healthy range in words: "0 to 0.3", "at most 1.3"; empty where the field has none."""
    if entry.healthy is None:
        return ""
    low, high = entry.healthy
    if low is None:
        return f"at most {_number(high)}"
    if high is None:
        return f"at least {_number(low)}"
    return f"{_number(low)}" if low == high else f"{_number(low)} to {_number(high)}"


def glossary() -> str:
    """docs/metrics.md: a table a prefix, in the order of their first metrics."""
    lines = [
        "# Metrics", "",
        "Generated by `python -m peftlab.runs.metrics > docs/metrics.md`; a test compares the two. "
        "\"Counted tokens\" are those of the completion up to and with its EOS, never prompt or padding. "
        "Logarithms are natural. A \"step\" is one round of rollouts and their update in RL, one optimizer "
        "step elsewhere.", "",
    ]
    groups: dict[str, list[Metric]] = {}
    for entry in METRICS.values():
        groups.setdefault(entry.name.split("/")[0], []).append(entry)
    for group, entries in groups.items():
        lines += ["", f"## {group}", "", "| metric | definition | unit | healthy | better | source |",
                  "|---|---|---|---|---|---|", *map(_row, entries)]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _row(entry: Metric) -> str:
    healthy = healthy_text(entry)
    if entry.limit is not None:
        healthy += f" (above {entry.limit:g} the run stops)"
    cells = [f"`{entry.name}`", entry.definition, entry.unit, healthy, entry.better or "", entry.source]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(glossary(), end="")
