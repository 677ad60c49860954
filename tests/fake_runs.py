"""Run folders as the recipes write them, made from nothing: to test the report, and to look at its pages."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from peftlab.runs.rundir import RunDir

PPO_CONFIG = """\
recipe = "ppo"
model = "demo/sft/adapter"
train_data = "imdb:train"
eval_data = "imdb:prompts"
reward = "imdb-sentiment + 0.5*rubric:length"
judge = "imdb-judge"
max_new_tokens = 24
lr = 0.001
seed = 0

[lora]
r = 16
alpha = 32
"""
TEXT = "the film was a quiet and honest story about people who never gave up . It made me laugh , twice"
OPENINGS = [
    "I went into this",
    "The acting",
    "This movie is",
    "What can I say about",
    "Having seen the",
    "A young man",
]
BEFORE = " really not what I hoped for. The plot drags on and the jokes fall flat, so we left before the"
AFTER = " a wonderful surprise. The cast is warm and funny, and I loved every minute of this beautiful little"


def ppo_run(root: Path, name: str = "ppo", steps: int = 40, prompts: int = 60) -> RunDir:
    """A PPO run that is done: judge .47 -> .86, with every metric that the recipe logs."""
    dice = random.Random(0)
    run = RunDir.create(root, name, "ppo", PPO_CONFIG, environment={"device": "cpu", "dtype": "float32"})
    with run.session():
        run.record_data("imdb:train", "9f2c" * 16, 9000)
        run.record_data("imdb:prompts", "77ab" * 16, 256)
        run.event("roles", base_bytes=41_000_000, policy_bytes=1_300_000, value_bytes=1281)
        for step in range(1, steps + 1):
            run.log(_ppo_metrics(dice, step / steps), step)
            if step in (1, 10, 20, steps):
                run.append_rollouts([_rollout(dice, step, index) for index in range(4)])
        run.write_samples(_samples(prompts))
        before = {
            "eval/judge": 0.472,
            "eval/kl": 0.0,
            "eval/length": 23.8,
            "eval/eos_fraction": 0.008,
            "eval/entropy": 4.21,
            "eval/distinct_1": 0.31,
            "eval/distinct_2": 0.842,
            "eval/perplexity_ratio": 1.0,
            "eval/reward": 0.03,
        }
        after = {
            "eval/judge": 0.861,
            "eval/kl": 5.93,
            "eval/length": 23.9,
            "eval/eos_fraction": 0.004,
            "eval/entropy": 3.42,
            "eval/distinct_1": 0.28,
            "eval/distinct_2": 0.791,
            "eval/perplexity_ratio": 1.12,
            "eval/reward": 1.71,
            "invariant/first_kl": 0.0,
            "invariant/first_ratio_error": 3.4e-6,
        }
        intervals = {"eval/judge": (0.826, 0.893), "eval/kl": (5.61, 6.27)}
        run.finish(after, before, intervals, {"adapter": "adapter"}, 2.31)
    return run


def sft_run(root: Path, name: str = "sft", steps: int = 30) -> RunDir:
    """A supervised run: the loss falls, and perplexity is evaluated five times."""
    dice = random.Random(1)
    run = RunDir.create(
        root, name, "sft", 'recipe = "sft"\nmodel = "tiny-gpt2"\ntrain_data = "imdb:train"\nseed = 0\n'
    )
    with run.session():
        run.record_data("imdb:train", "9f2c" * 16, 9000)
        for step in range(1, steps + 1):
            share = step / steps
            metrics: dict[str, Any] = {
                "train/loss": 4.31 - 0.19 * share + dice.gauss(0, 0.03),
                "train/lr": 5e-4 * (1 - share),
                "train/grad_norm": 0.6 + dice.random() * 0.2,
                "train/tokens_per_s": 5200 + dice.random() * 300,
            }
            if step % 6 == 0:
                metrics |= {
                    "eval/loss": 4.25 - 0.13 * share,
                    "eval/perplexity": math.exp(4.25 - 0.13 * share),
                }
            run.log(metrics, step)
        run.write_samples({"id": str(i), "prompt": OPENINGS[i], "completion": AFTER} for i in range(3))
        run.finish(
            {"eval/perplexity": 61.5, "eval/loss": 4.12},
            {"eval/perplexity": 64.8, "eval/loss": 4.171},
            {"eval/perplexity": (60.1, 63.0)},
            {"adapter": "adapter"},
            0.9,
        )
    return run


def classify_run(root: Path, name: str = "classify") -> RunDir:
    """A classifier, evaluated at its end only."""
    dice = random.Random(2)
    run = RunDir.create(
        root, name, "classify", 'recipe = "classify"\nmodel = "minilm-distilbert"\nseed = 0\n'
    )
    with run.session():
        for step in range(1, 21):
            run.log(
                {"train/loss": 0.7 * math.exp(-step / 9) + 0.2 + dice.gauss(0, 0.02), "train/lr": 5e-4}, step
            )
        run.finish(
            {"eval/accuracy": 0.887, "eval/f1": 0.8868, "eval/ece": 0.031},
            {"eval/accuracy": 0.503, "eval/f1": 0.341, "eval/ece": 0.007},
            {"eval/accuracy": (0.866, 0.906)},
            {"adapter": "adapter"},
            1.1,
        )
    return run


def demo_run(root: Path, name: str = "demo") -> RunDir:
    """A demo of three stages, each a run of its own."""
    run = RunDir.create(root, name, "demo", 'recipe = "demo"\nstages = ["classify", "sft", "ppo"]\n')
    with run.session():
        made = {make.__name__.removesuffix("_run"): make for make in (classify_run, sft_run, ppo_run)}
        stages = {stage: make(root, f"{name}/{stage}").summary or {} for stage, make in made.items()}
        ppo = stages["ppo"]
        run.finish(
            ppo["metrics"], ppo["baseline"], ppo["intervals"], {"report": "report.html"}, stages=stages
        )
    return run


def record(root: Path, rows: list[dict[str, Any]], recipe: str = "ppo", name: str = "run") -> Path:
    """The folder of a run that holds these rollouts and nothing else."""
    run = RunDir.create(root, name, recipe, "")
    with run.session():
        run.append_rollouts(rows)
        run.finish({}, {})
    return run.path


def rollout_row(step: int, prompt_id: str, kl: float = 0.5, **fields: Any) -> dict[str, Any]:
    """A recorded rollout of four tokens, without a critic and without rewards of tokens."""
    tokens = [
        {"token": f" {word}", "logprob": -1.0, "ref_logprob": -1.0 - kl, "kl": kl * at, "advantage": -0.25}
        for at, word in enumerate(("so", "good", "it", "was"))
    ]
    base = {"step": step, "prompt_id": prompt_id, "prompt": f"About {prompt_id}:", "completion": " so good it was"}
    return base | {"score": 1.5, "score_parts": {"fun": 1.5}, "tokens": tokens} | fields


def _ppo_metrics(dice: random.Random, share: float) -> dict[str, float]:
    rise = 1 - math.exp(-3 * share)
    noise = dice.gauss
    metrics = {
        "reward/std": 1 - 0.45 * rise + noise(0, 0.03),
        "reward/part/imdb-sentiment": 1.6 * rise + noise(0, 0.06),
        "reward/part/length": 0.2 * rise + noise(0, 0.02),
        "kl/reference": 6 * share**0.8 + noise(0, 0.2),
        "kl/k3": 6.2 * share**0.8 + abs(noise(0, 0.1)),
        "kl/coef": 0.1,
        "policy/loss": -0.02 + noise(0, 0.006),
        "policy/approx_kl": 0.008 + abs(noise(0, 0.007)),
        "policy/clip_fraction": 0.12 + noise(0, 0.03),
        "policy/entropy": 4.2 - 0.8 * rise + noise(0, 0.03),
        "policy/grad_norm": 0.7 + abs(noise(0, 0.2)),
        "value/loss": 0.5 * math.exp(-2 * share) + 0.1,
        "value/clip_fraction": 0.06 + abs(noise(0, 0.02)),
        "value/explained_variance": 0.7 * rise - 0.1 + noise(0, 0.05),
        "rollout/length": 23.8 + noise(0, 0.1),
        "rollout/eos_fraction": abs(noise(0.01, 0.005)),
        "update/epochs": 2.0,
        "time/rollout_s": 0.9 + abs(noise(0, 0.1)),
        "time/update_s": 1.3 + abs(noise(0, 0.1)),
    }
    # As the recipe has it: the parts are logged unweighted, and the reward is their weighted sum.
    metrics["reward/mean"] = metrics["reward/part/imdb-sentiment"] + 0.5 * metrics["reward/part/length"]
    return metrics | {"time/step_s": metrics["time/rollout_s"] + metrics["time/update_s"]}


def _rollout(dice: random.Random, step: int, index: int) -> dict[str, Any]:
    tokens = []
    for place, word in enumerate(TEXT.split()):
        logprob, ref = -abs(dice.gauss(2, 1.2)), -abs(dice.gauss(2.2, 1.2))
        advantage = dice.gauss(0.1 * place / 5 - 0.3, 0.9)
        tokens.append(
            {
                "token": "\n" if word == "." else f" {word}",
                "logprob": logprob,
                "ref_logprob": ref,
                "kl": logprob - ref,
                "value": dice.gauss(0.3, 0.2),
                "reward": -0.1 * (logprob - ref),
                "advantage": advantage,
            }
        )
    return {
        "step": step,
        "prompt_id": f"imdb/{9000 + index}",
        "prompt": OPENINGS[index],
        "completion": "".join(token["token"] for token in tokens),
        "score": dice.gauss(1, 0.5),
        "score_parts": {"imdb-sentiment": dice.gauss(1, 0.5), "length": 0.2},
        "tokens": tokens,
    }


def _samples(prompts: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": f"imdb/{index}",
            "side": side,
            "prompt": OPENINGS[index % 6],
            "completion": words,
            "judge": judge,
            "kl": kl,
        }
        for side, words, judge, kl in (("before", BEFORE, 0.21, 0.0), ("after", AFTER, 0.97, 6.1))
        for index in range(prompts)
    ]
