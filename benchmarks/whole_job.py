"""A whole job of PPO by the lab's own command: 25,600 completions of 16 tokens, GPT-2 124M with random weights.

What TRL's gpt2-sentiment does, in 35 minutes by its own account: sampling, a sentiment classifier as reward, updates.
One JSON line: `seconds` is the whole command, from start to report, both evaluations on 64 prompts; `step_s` the median
step, rollout, scoring and update; `steps_s` all steps together.

    python benchmarks/whole_job.py --device cpu|cuda [--steps 100] [--prompts 256] [--epochs 4]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import torch
from transformers import AutoTokenizer
from work import TINY, random_model

PROGRAM = [sys.executable, "-c", "from peftlab.cli import main; main()"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=["tiny-gpt2", "gpt2-arch"], default="gpt2-arch")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=256, help="of a step")
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = given.model
        if model == "gpt2-arch":
            model = f"{folder}/gpt2-arch"
            random_model("gpt2-arch", torch.float32).save_pretrained(model)
            AutoTokenizer.from_pretrained(TINY).save_pretrained(model)
        keys = {
            "model": model, "device": given.device, "steps": given.steps, "prompts_per_step": given.prompts,
            "minibatch_size": given.prompts, "epochs": given.epochs, "max_new_tokens": 16, "eval_prompts": 64,
            "epoch_kl_stop": 1e9, "lr": 1e-5, "critic_lr": 1e-4, "lora.r": 16, "lora.alpha": 32,
        }
        began = time.monotonic()
        command = [*PROGRAM, "ppo", *(f"{key}={value}" for key, value in keys.items()), "--run", "whole-job"]
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
        seconds = time.monotonic() - began
        run = Path(folder) / "runs" / "whole-job"
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
    times = sorted(step["time/step_s"] for step in steps if "time/step_s" in step)
    step_s = times[len(times) // 2]
    row = {
        "what": "whole_job", "device": given.device, "model": given.model, "completions": given.steps * given.prompts,
        "tokens": 16 * given.steps * given.prompts, "epochs": given.epochs, "seconds": round(seconds, 1),
        "step_s": round(step_s, 4), "steps_s": round(sum(times), 1),
        "first_ratio_error": summary["metrics"]["invariant/first_ratio_error"],
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
