"""Two processes of one machine, as a launcher starts them, and jobs of seconds for them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny

# An epoch has a short last batch, of fewer rows than there are processes where it has one row. Prompts are whole, so
# that the two processes pad to different widths. No dropout: each process would draw masks of its own.
SUPERVISED = ["batch_size=8", "max_steps=9", "lr=1e-3"]
POLICY = ["task=custom", "reward=rank_gate:count", "steps=4", "kl_target=1.0", "save_every=2"]
MORE = {
    "pretrain": [*SUPERVISED, "dropout=0"],
    "sft": [*SUPERVISED, "max_length=16", "train_limit=30", "batch_size=4"],
    "classify": [*SUPERVISED, "model={plain_encoder}"],
    "summarize": [*SUPERVISED, "accumulate=2"],
    "reward": [*SUPERVISED, "batch_size=6"],
    "dpo": [*SUPERVISED, "task=custom", "train_limit=17"],
    "ppo": [*POLICY, "critic=adapter", "prompts_per_step=10"],
    "rloo": [*POLICY, "prompts_per_step=4", "minibatch_size=6", "epochs=2"],
}
DROPPED = [*MORE["sft"], "lora.dropout=0.1"]  # the generators of both processes are in the checkpoint
SECONDS = 100

# Told to, it holds the run in the middle of a step until the file `go` is there, or fails in the second process.
GATE = '''
import os, time

calls = 0

def count(prompts, completions, records):
    global calls
    calls += 1
    if calls > 3 and os.environ.get("GATE"):
        open("waiting" + os.environ["RANK"], "w").close()
        end = time.monotonic() + 100
        while not os.path.exists("go") and time.monotonic() < end:
            time.sleep(0.01)
    return [float(c.count("e")) for c in completions]

def early(prompts, completions, records):
    if len(completions) == 2 and os.environ["RANK"] == "1":
        raise ValueError("no label")
    return [0.0] * len(completions)

def broken(prompts, completions, records):
    if len(completions) == 4 and os.environ["RANK"] == "1":
        raise ValueError("no reward today")
    return [0.0] * len(completions)
'''


def workshop(root: Path) -> dict[str, str]:
    """Models, data and the reward `rank_gate` in the folder `root`, by the names that MORE gives them."""
    shop = tiny.workshop(root) | {"root": str(root)}
    plain = tiny.encoder_folder(root / "plain-encoder")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"seq_classif_dropout": 0.0}))
    (root / "rank_gate.py").write_text(GATE)
    return shop | {"plain_encoder": str(plain)}


def pairs(shop: dict[str, str], verb: str, more: list[str] | None = None) -> list[str]:
    return tiny.overrides(shop, verb, *(pair.format(**shop) for pair in more or MORE[verb]))


def free_port() -> int:
    """Picked just before it is used: another program may take it meanwhile."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def group(number: int, **more: str) -> dict[str, str]:
    """The environment that torchrun gives a process."""
    told = {"MASTER_ADDR": "127.0.0.1", "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    return os.environ | {"OMP_NUM_THREADS": "1"} | told | more


def two(folder: Path, *words: str, **more: str) -> list[tuple[int, str, str]]:
    """`python WORDS` in two processes; of each the exit code and what it said."""
    more = {"MASTER_PORT": str(free_port())} | more
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(started(folder, *words, env=group(number, **more), stderr=subprocess.PIPE))
            for number in range(2)
        ]
        said = [process.communicate(timeout=SECONDS) for process in processes]
    return [(process.returncode, *words) for process, words in zip(processes, said, strict=True)]


@contextlib.contextmanager
def started(folder: Path, *words: str, **given: Any) -> Iterator[subprocess.Popen[str]]:
    """`python WORDS`, which does not outlive the block."""
    with subprocess.Popen([sys.executable, *words], cwd=folder, text=True, stdout=subprocess.PIPE, **given) as process:
        try:
            yield process
        finally:
            process.kill()


def launched(folder: Path, *words: str) -> tuple[int, str]:
    """`python WORDS` in two processes of torchrun: its exit code and all that was said."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run([*run, *words], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                          capture_output=True, timeout=SECONDS)
    return done.returncode, done.stdout + done.stderr
