"""A step of PPO (or RLOO) in one process and in several, each with a GPU, or a CPU thread, of its own.

One JSON line a row. `ranks` processes share the step's `batch` completions; `ours_s` are the median seconds of a step
after two that warm up, `ours_rollout_s` the part that samples and scores, `seconds_between` the fastest and the slowest
step, `ours_gb` the most memory of the first process. `scaling` is "strong" where the batch is that of one process, and
"weak" where it grows with them; `efficiency` is t(1) / (n * t(n)) for strong and t(1) / t(n) for weak scaling: 1 would
be n times as fast. Models and jobs are those of ppo_step.py; completions all have their full length.

    python benchmarks/ranks.py --device cpu|cuda [--ranks 1,2,4] [--algorithm ppo|rloo] [--model ...] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from beside import SIZES, WARM_UP, group
from lab import dtype_of, trainer_of
from work import SAMPLES, Job, peak_bytes, prompt_of

from peftlab.recipes.several import joined
from peftlab.rl.rollout import PromptBatch
from peftlab.runs.launched import rank

MODELS = {"cpu": ["tiny-gpt2"], "cuda": ["tiny-gpt2", "gpt2-arch"]}


def work(job: Job, rounds: int) -> None:
    """One of the processes; the first prints what it measured as a line of JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # all begin with the same adapter
    with joined(job.device):
        trainer = trainer_of(job)
        text, ids = prompt_of(job, trainer.roles.tokenizer)
        count = job.batch if job.algorithm == "ppo" else job.batch // SAMPLES
        prompts = PromptBatch([ids] * count, [text] * count, [None] * count)
        steps, rollouts = [], []
        for _ in range(WARM_UP + rounds):
            begun = time.perf_counter()
            _, stats, _ = trainer.step(prompts)
            if job.device == "cuda":
                torch.cuda.synchronize()
            steps.append(time.perf_counter() - begun)
            rollouts.append(stats["time/rollout_s"])
        if rank() == 0:
            counted = steps[WARM_UP:]
            found = {
                "dtype": dtype_of(trainer.roles), "ours_s": round(statistics.median(counted), 4),
                "ours_rollout_s": round(statistics.median(rollouts[WARM_UP:]), 4),
                "seconds_between": [round(min(counted), 4), round(max(counted), 4)],
                "ours_gb": round(peak_bytes(job.device == "cuda") / 1e9, 3),
            }
            print(json.dumps(found), flush=True)


def launch(job: Job, ranks: int, rounds: int) -> dict[str, Any]:
    """The job in so many processes of this host, as torchrun would start them; what the first one measured."""
    words = [sys.executable, __file__, "--work", json.dumps(asdict(job)), "--rounds", str(rounds)]
    processes: list[subprocess.Popen[str]] = []
    try:
        for own in group(ranks):
            processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | own))
        said = [process.communicate()[0] for process in processes]
    finally:  # Ctrl+C leaves none behind
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise SystemExit(f"ranks: of {ranks} processes one ended with an error; see above")
    return dict(json.loads(said[0].splitlines()[-1]))


def rows(job: Job, counts: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for one process; then for each number of processes a row of strong and one of weak scaling."""
    alone = None
    for ranks in counts:
        for scaling, batch in {"strong": job.batch, "weak": job.batch * ranks}.items():
            if ranks == 1 and scaling == "weak":
                continue
            found = launch(replace(job, batch=batch), ranks, rounds)
            alone = alone or found["ours_s"] * ranks  # where 1 is not among the numbers, the first counts as perfect
            perfect = alone / ranks if scaling == "strong" else alone
            yield {
                "what": f"{job.algorithm}_ranks", "device": job.device, "dtype": found.pop("dtype"), "model": job.model,
                "batch": batch, "tokens": batch * job.tokens, "epochs": job.epochs, "ranks": ranks, "scaling": scaling,
                **found, "efficiency": round(perfect / found["ours_s"], 3),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", default="1,2", help="numbers of processes, the first is what the others are held to")
    parser.add_argument("--algorithm", choices=["ppo", "rloo"], default="ppo")
    parser.add_argument("--model", nargs="+", choices=["tiny-gpt2", "gpt2-arch", "smollm2-arch"])
    parser.add_argument("--batch", type=int, help="completions of a step")
    parser.add_argument("--tokens", type=int, help="of a completion")
    parser.add_argument("--epochs", type=int, help="of PPO over a step's completions")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(Job(**json.loads(given.work)), given.rounds)
        return
    batch, tokens, epochs, prompt = SIZES[given.device]
    epochs = (given.epochs or epochs) if given.algorithm == "ppo" else 1
    for model in given.model or MODELS[given.device]:
        job = Job(given.algorithm, given.device, model, prompt, given.batch or batch, given.tokens or tokens, epochs)
        for row in rows(job, [int(count) for count in given.ranks.split(",")], given.rounds):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
