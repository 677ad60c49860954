"""The experiments behind docs/results.md and LOG.md: grids of the lab's own commands, spread over GPUs.

    python benchmarks/experiments.py NAME [--gpus 0,1] [--per-gpu 4] [--only WORD,WORD] [--dry-run]

A job's run is runs/NAME/JOB, what it prints is in runs/NAME/JOB.log. What is done is not done again, and what was cut
goes on from its checkpoint: give the same command again, on another machine too if runs/ is there. Last comes one JSON
line a group of seeds: of each metric the mean, the least and the greatest of the seeds, or, of one, its 95% interval;
and of `overoptimization` a fit of proxy and judge to the KL for each reward model.
Without a GPU give `--gpus cpu`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PROGRAM = [sys.executable, "-c", "from peftlab.cli import main; main()"]
FIGURES = re.compile(r"(eval|rubric|compare)/")
PAIRS = (
    "data preferences --policy RUNS/sft --prompts imdb:train --k 4 --prompt-tokens 2,8 --max-new-tokens 48 "
    "--scorer imdb-sentiment --min-margin 1 --batch-size 512"
)


@dataclass(frozen=True)
class Job:
    """A command of the lab, which makes a run or, if it is one of `data`, a folder. `after`: jobs to be done first."""

    name: str
    command: str
    after: tuple[str, ...] = ()

    @property
    def makes_data(self) -> bool:
        return self.command.split()[0] == "data"

    def finished(self, runs: Path) -> bool:
        if self.makes_data:
            return any((runs / self.name).glob("*.json"))
        path = runs / self.name / "summary.json"
        return path.is_file() and json.loads(path.read_text())["status"] == "done"

    def arguments(self, runs: Path) -> list[str]:
        """What the program is given; a run that has not begun is one to resume from its start."""
        words = self.command.replace("RUNS", str(runs)).split()
        if self.makes_data:
            return [*words, "--output", str(runs / self.name)]
        return [*words, "--run", f"{runs.name}/{self.name}", "--resume"]


def summaries() -> list[Job]:
    """ROUGE of the four ways to teach tiny-t5 to say the gist of a review."""
    methods = {
        "prefix-full": "lr=1e-3 epochs=3 batch_size=16",
        "prefix": "lr=1e-3 epochs=3 batch_size=16",
        "lora": "lr=2e-3 epochs=4 batch_size=64",
        "full": "lr=1e-3 epochs=4 batch_size=64",
    }
    return [
        Job(f"{name}-s{seed}", f"summarize summarize-tiny method={name} {keys} eval_limit=0 seed={seed}")
        for seed in range(3)
        for name, keys in methods.items()
    ]


def explanations() -> list[Job]:
    """Base, SFT, reward model, then PPO and RLOO by it and DPO from its pairs, on SmolLM2's explanations of reviews."""
    # Answers that differ by less than a part of the rubric, a sixth, are near ties. Hot sampling also errs where the
    # verdict is plain, and a reward model is to know those errors as well.
    asked = "--k 8 --temperature 1.3 --min-margin 0.15 --batch-size 256 --dtype bfloat16"
    answers = f"data preferences --policy RUNS/sft {asked}"
    held_out = "eval_data=RUNS/pairs-held-out/preferences-test.jsonl"
    pairs = f"train_data=RUNS/pairs/preferences-train.jsonl {held_out}"
    made = ("pairs", "pairs-held-out")
    steps = "model=RUNS/sft steps=30 epochs=2"
    sizes = {"ppo": "prompts_per_step=128", "rloo": "prompts_per_step=32"}
    return [
        Job("sft-tiny", "sft tiny-explanations"),
        Job("sft", "sft smollm2-explanations"),
        Job("pairs", f"{answers} --prompts imdb-explanations:train --limit 6000 --held-out 200", ("sft",)),
        Job("pairs-held-out", f"{answers} --prompts imdb-explanations:test --held-out 0.95", ("sft",)),
        Job("reward", f"reward reward-explanations model=RUNS/sft {pairs}", made),
        *(
            Job(
                f"{how}-s{seed}",
                f"{how} {how}-explanations {steps} {size} reward=RUNS/reward/adapter seed={seed}",
                ("reward",),
            )
            for seed in range(3)
            for how, size in sizes.items()
        ),
        *(
            Job(f"dpo-s{seed}", f"dpo dpo-explanations model=RUNS/sft {pairs} beta=0.5 seed={seed}", made)
            for seed in range(3)
        ),
        Job("reward-flipped", f"reward reward-explanations model=RUNS/sft {pairs} flip_labels=0.25", made),
        *(
            Job(f"ppo-rubric-s{seed}", f"ppo ppo-explanations {steps} {sizes['ppo']} seed={seed}", ("sft",))
            for seed in range(3)
        ),
    ]


def continuations() -> list[Job]:
    """SmolLM2 on IMDb: a reward model of pairs that `imdb-sentiment` ranks; PPO, RLOO, DPO towards praise.

    ppo-p: by the probability of praise and not its log-odds; half the steps reach its plateau.
    """
    pairs = "train_data=RUNS/pairs/preferences-train.jsonl eval_data=RUNS/pairs/preferences-test.jsonl"
    shape = "model=RUNS/sft prompt_tokens=[2,8] max_new_tokens=48 eval_prompts=750 lora.r=16 lora.alpha=32"
    steered = f"{shape} steps=200 kl_target=5 kl_stop=12"
    # RLOO takes sixty steps to its target. A quick controller would have let go of the penalty by then.
    rloo = "prompts_per_step=64 lr=1e-4 kl_horizon=20000"
    ppo = "prompts_per_step=256 minibatch_size=128 lr=2e-4 critic_lr=1e-3 kl_horizon=2000"
    jobs = [
        Job("sft", "sft smollm2-imdb train_limit=8000"),
        Job("pairs", f"{PAIRS} --limit 8000 --dtype bfloat16", ("sft",)),
        Job("reward", f"reward reward-explanations model=RUNS/sft {pairs} max_length=128", ("pairs",)),
    ]
    for seed in range(5):
        if seed < 3:
            jobs.append(Job(f"rloo-s{seed}", f"rloo rloo-tiny {steered} {rloo} seed={seed}", ("sft",)))
            bounded = f"{steered.replace('=200', '=100')} {ppo} reward=p(imdb-sentiment)"
            jobs.append(Job(f"ppo-p-s{seed}", f"ppo ppo-tiny {bounded} seed={seed}", ("sft",)))
            for beta in (0.5, 0.7):
                dpo = f"{shape} {pairs} max_length=64 beta={beta} epochs=2 lr=1e-4"
                jobs.append(Job(f"dpo-{beta}-s{seed}", f"dpo dpo-tiny {dpo} seed={seed}", ("pairs",)))
        jobs.append(Job(f"ppo-s{seed}", f"ppo ppo-tiny {steered} {ppo} seed={seed}", ("sft",)))
    return jobs


def frontier() -> list[Job]:
    """Judge against KL on continuations of 48 tokens: PPO, RLOO and DPO at several strengths, three seeds."""
    shape = "model=RUNS/sft prompt_tokens=[2,8] max_new_tokens=48 eval_prompts=750"
    steered = f"{shape} steps=100 kl_horizon=2000"
    jobs = [Job("sft", "sft sft-tiny"), Job("pairs", PAIRS, ("sft",))]
    data = "train_data=RUNS/pairs/preferences-train.jsonl eval_data=RUNS/pairs/preferences-test.jsonl max_length=64"
    for seed in range(3):
        for target in (1.5, 3, 6, 9, 12):
            aim = f"kl_target={target} kl_coef={max(0.15, 0.6 / target)} kl_stop={2 * target + 2} seed={seed}"
            jobs += [
                Job(f"{how}-{target}-s{seed}", f"{how} {how}-tiny {steered} {aim} {size}", ("sft",))
                for how, size in (
                    ("ppo", "prompts_per_step=256 minibatch_size=128"),
                    ("rloo", "prompts_per_step=64"),
                )
            ]
        jobs += [
            Job(f"dpo-{beta}-s{seed}", f"dpo dpo-tiny {shape} {data} beta={beta} lr=5e-4 seed={seed}", ("pairs",))
            for beta in (0.03, 0.05, 0.1, 0.3, 1.0)
        ]
    return jobs


def overoptimization() -> list[Job]:
    """PPO against reward models of few and many pairs, clean and noisy, single and in fives: proxy and judge by KL."""
    jobs = [Job("sft", "sft sft-tiny"), Job("pairs", PAIRS, ("sft",))]
    data = "train_data=RUNS/pairs/preferences-train.jsonl eval_data=RUNS/pairs/preferences-test.jsonl max_length=64"
    reward = f"reward reward-tiny model=RUNS/sft {data}"
    rewards = [
        (f"rm{pairs}{noise}{size}", pairs, noise, size)
        for size in ("", "-five")
        for noise in ("", "-noisy")
        for pairs in (500, 2000, 20_000)
    ]
    for name, pairs, noise, size in rewards:
        keys = " flip_labels=0.25" * bool(noise) + " members=5 combine=min" * bool(size)
        jobs.append(Job(name, f"{reward} train_limit={pairs}{keys}", ("pairs",)))
    shape = "prompt_tokens=[2,8] max_new_tokens=48 steps=100 prompts_per_step=128 kl_horizon=2000 kl_stop=0"
    for target in (40, 10, 20, 5, 2):
        for name, *_ in rewards:
            aim = f"kl_target={target} kl_coef={0.8 / target} eval_prompts=750"
            given = f"model=RUNS/sft reward=RUNS/{name}/adapter {shape} {aim}"
            jobs.append(Job(f"{name}-kl{target}", f"ppo ppo-tiny {given}", (name,)))
    return jobs


def rank() -> list[Job]:
    """How much rank a policy's LoRA needs, at the same KL; with 352, tiny-gpt2's width, it can reach any weights."""
    shape = "model=RUNS/sft prompt_tokens=[2,8] max_new_tokens=48 eval_prompts=750"
    keys = f"{shape} kl_target=5 kl_horizon=2000 kl_stop=12"
    return [
        Job("sft", "sft sft-tiny"),
        *(
            Job(f"r{r}-s{seed}", f"ppo ppo-tiny {keys} seed={seed} lora.r={r} lora.alpha=32", ("sft",))
            for seed in range(3)
            for r in (1, 4, 16, 64, 352)
        ),
    ]


EXPERIMENTS: dict[str, Callable[[], list[Job]]] = {
    f.__name__: f for f in (summaries, explanations, continuations, frontier, overoptimization, rank)
}


@dataclass
class Machine:
    """Its places for jobs, a GPU each, and what runs there."""

    places: list[str]
    running: dict[str, tuple[subprocess.Popen[bytes], str]] = field(default_factory=dict)

    def start(self, job: Job, runs: Path) -> None:
        """Where a place is free."""
        place = self.places.pop(0)
        environment = os.environ | ({} if place == "cpu" else {"CUDA_VISIBLE_DEVICES": place})
        with (runs / f"{job.name}.log").open("ab") as log:
            arguments = [*PROGRAM, *job.arguments(runs)]
            process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.running[job.name] = process, place

    def ended(self) -> list[tuple[str, int]]:
        """Names and exit codes of the jobs that ended since; their places are free again."""
        found = [(name, code) for name, (process, _) in self.running.items() if (code := process.poll()) is not None]
        for name, _ in found:
            self.places.append(self.running.pop(name)[1])
        return found


def execute(jobs: list[Job], runs: Path, machine: Machine) -> bool:
    """Every job, each as soon as what it stands on is done. True if all are."""
    runs.mkdir(parents=True, exist_ok=True)
    done = {job.name for job in jobs if job.finished(runs)}
    waiting = [job for job in jobs if job.name not in done]
    began = time.monotonic()
    while waiting or machine.running:
        for job in [job for job in waiting if done.issuperset(job.after)][: len(machine.places)]:
            waiting.remove(job)
            machine.start(job, runs)
        if not machine.running:
            print(f"not run, since what they stand on failed: {', '.join(j.name for j in waiting)}", file=sys.stderr)
            return False
        time.sleep(0.2)
        for name, code in machine.ended():
            told = "done" if code == 0 else f"exit {code}, see {runs / name}.log"
            print(f"{time.monotonic() - began:6.0f} s  {name} {told}", file=sys.stderr)
            done |= {name} if code == 0 else set()
    return len(done) == len(jobs)


def rows(jobs: list[Job], runs: Path) -> list[dict[str, Any]]:
    """A row a group of seeds, and one for what they began with; a group's figures are those of its finished runs."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        if not job.makes_data and job.finished(runs):
            summary = json.loads((runs / job.name / "summary.json").read_text())
            groups.setdefault(re.sub(r"-s\d+$", "", job.name), []).append(summary)
    found = []
    for group, summaries_ in groups.items():
        figures = {name for name in summaries_[0]["metrics"] if FIGURES.match(name)}
        row: dict[str, Any] = {"experiment": runs.name, "group": group, "seeds": len(summaries_)}
        for name in sorted(figures):
            values = [summary["metrics"][name] for summary in summaries_]
            spread = summaries_[0].get("intervals", {}).get(name) if len(values) == 1 else [min(values), max(values)]
            row[name] = [round(number, 4) for number in (statistics.mean(values), *(spread or ()))]
        before = summaries_[0].get("baseline") or {}
        found.append(row | {"before": {n: round(v, 4) for n, v in sorted(before.items()) if n in figures}})
    return found


def gao_fits(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of runs named REWARD-klTARGET, a row a reward and score: d (alpha - beta ln d) through 3 or more gains.

    d is the square root of the KL in nats (Gao et al. 2023, eq. 2); alpha and beta by least squares, with their R^2.
    """
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in found:
        reward, target, _ = str(row["group"]).partition("-kl")
        for score in ("eval/judge", "eval/reward"):
            if not (target and score in row and row["eval/kl"][0] > 0):
                continue
            gain = row[score][0] - row["before"][score]
            points.setdefault((reward, score), []).append((math.sqrt(row["eval/kl"][0]), gain))
    fits = []
    for (reward, score), pairs in points.items():
        if len(pairs) < 3:
            continue
        d, gains = np.array(pairs).T
        columns = np.stack([d, -d * np.log(d)], axis=1)
        (alpha, beta), *_ = np.linalg.lstsq(columns, gains, rcond=None)
        left = gains - columns @ [alpha, beta]
        spread = (gains - gains.mean()) @ (gains - gains.mean())
        r2 = 1 - left @ left / spread if spread else 0.0
        best = max(pairs, key=lambda pair: pair[1])
        fits.append(
            {"fit": reward, "score": score, "points": len(pairs), "alpha": round(float(alpha), 4),
             "beta": round(float(beta), 4), "r2": round(float(r2), 4), "best_at_kl": round(best[0] ** 2, 2)}
        )
    return fits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--gpus", default="0", help="numbers of GPUs, or cpu")
    parser.add_argument("--per-gpu", type=int, default=4, help="jobs on a GPU at a time")
    parser.add_argument("--only", default="", help="jobs whose names contain one of these, and what they stand on")
    parser.add_argument("--dry-run", action="store_true", help="show the commands")
    given = parser.parse_args()
    jobs, runs = EXPERIMENTS[given.name](), Path("runs") / given.name
    if given.only:
        kept = {job.name for job in jobs if any(word in job.name for word in given.only.split(","))}
        for job in reversed(jobs):  # a job stands behind those that it needs
            kept |= set(job.after) if job.name in kept else set()
        jobs = [job for job in jobs if job.name in kept]
    if given.dry_run:
        print("\n".join("peftlab " + " ".join(job.arguments(runs)) for job in jobs))
        return 0
    complete = execute(jobs, runs, Machine(given.gpus.split(",") * given.per_gpu))
    found = rows(jobs, runs)
    for row in found:
        print(json.dumps(row))
    for row in gao_fits(found):
        print(json.dumps(row))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
