"""Runs the sides of a benchmark of RL in turn, each in a process of its own, and makes its rows."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from work import PASS, SAMPLES, Job

HERE = Path(__file__).resolve().parent
BUILT = HERE.parents[1] / ".venv-peers"
MODELS = {"cpu": ["tiny-gpt2"], "cuda": ["smollm2-arch", "gpt2-arch"]}
# completions of a step, their tokens, epochs of PPO, tokens of a prompt
SIZES = {"cpu": (64, 24, 2, 8), "cuda": (256, 64, 4, 16)}
WARM_UP = 2  # steps that no row counts


@dataclass(frozen=True)
class Peer:
    """A program of this folder, the requirements that it runs on, and what it trains by."""

    program: str
    site: str
    algorithm: str


def arguments(about: str | None) -> argparse.ArgumentParser:
    """What every benchmark of RL can be told."""
    import torch

    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", choices=["tiny-gpt2", "gpt2-arch", "smollm2-arch"])
    parser.add_argument("--peer", action="store_true", help="run TRL beside ours; pip fetches it into .venv-peers")
    parser.add_argument("--peer-site", type=Path, metavar="FOLDER", help="the same, with TRL from unpacked wheels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="of PPO; 2 on a CPU, else 4")
    parser.add_argument("--batch", type=int, help="completions of a step; 64 on a CPU, else 256")
    parser.add_argument("--tokens", type=int, help="of a completion; 24 on a CPU, else 64")
    parser.add_argument("--pass-tokens", type=int, default=0, help="of our passes, at most; 0: as suits the device")
    parser.add_argument("--ranks", type=int, default=1, help="processes of ours, of one thread each on a CPU")
    parser.add_argument("--gradients", choices=["float32", "bfloat16"], default="float32", help="ours, on a CPU")
    return parser


def jobs_of(given: argparse.Namespace, algorithm: str, reward: str = "function") -> Iterator[Job]:
    """A job for each model."""
    batch, tokens, epochs, prompt = SIZES[given.device]
    batch, tokens = given.batch or batch, given.tokens or tokens
    if batch % SAMPLES or batch > PASS and batch % PASS:
        raise SystemExit(f"--batch {batch}: give a multiple of {SAMPLES}, above {PASS} one of {PASS}")
    epochs = (given.epochs or epochs) if algorithm == "ppo" else 1
    for model in given.model or MODELS[given.device]:
        ours = given.pass_tokens, given.gradients
        yield Job(algorithm, given.device, model, prompt, batch, tokens, epochs, reward, *ours)


def group(ranks: int) -> list[dict[str, str]]:
    """What each of so many processes of this host finds in its environment, as torchrun would start them."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    return [shared | {"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(ranks)]


class Side:
    """One side's processes. Every answer of the first is kept; `about` is the first one, of what it built."""

    def __init__(self, program: str, job: Job, path: Sequence[Path] = (), ranks: int = 1) -> None:
        self.program = program
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the process
        quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
        first = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | quiet | {"PYTHONPATH": os.pathsep.join(first)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / f"{program}.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self.errors, text=True, env=env | own,
            )
            for own in group(ranks)
        ]
        self.answers: list[dict[str, Any]] = []
        self.about = self._ask(json.dumps(asdict(job)))
        print(f"{program}: built", file=sys.stderr)

    def step(self) -> None:
        self.answers.append(self._ask(""))
        print(f"{self.program}: step {len(self.answers)}, {self.answers[-1]['seconds']:.2f} s", file=sys.stderr)

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin
            process.stdin.close()
        for process in self.processes:
            process.wait()

    def seconds(self, what: str = "seconds") -> float:
        return round(statistics.median(answer[what] for answer in self.answers[WARM_UP:]), 4)

    def row(self, whose: str) -> dict[str, Any]:
        """This side's figures; the most memory of any step, the first ones included."""
        gigabytes = round(max(answer["gb"] for answer in self.answers), 3)
        held = {f"{whose}_bytes": self.about["bytes"]} if "bytes" in self.about else {}
        return {f"{whose}_s": self.seconds(), f"{whose}_gb": gigabytes, **held}

    def _ask(self, line: str) -> dict[str, Any]:
        """The first process's answer, with the memory of all."""
        for process in self.processes:
            assert process.stdin
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass
        answers = [self._answer(process) for process in self.processes]
        return answers[0] | {"gb": sum(answer["gb"] for answer in answers)}

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout
        answer = process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            said = "".join(self.errors.readlines()[-20:])
            raise SystemExit(f"{said}{self.program}: ended with exit code {process.wait()}")
        return dict(json.loads(answer))


def rows(what: str, job: Job, peers: Sequence[Peer], given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a peer, or one without any; sides take turns step by step."""
    ours, theirs = Side("lab", job, ranks=given.ranks), []
    if given.peer or given.peer_site:
        for peer in peers:
            path = path_of(peer.site, given.peer_site)
            theirs.append(Side(peer.program, replace(job, algorithm=peer.algorithm), path))
    for _ in range(WARM_UP + given.rounds):
        for side in [ours, *theirs]:
            side.step()
    row = {
        "what": what, "device": job.device, "dtype": ours.about["dtype"], "model": job.model, "batch": job.batch,
        "tokens": job.batch * job.tokens, "epochs": job.epochs, "ranks": given.ranks, **ours.row("ours"),
        "ours_rollout_s": ours.seconds("rollout_s"), "ratio_error": float(f"{ours.answers[0]['ratio_error']:.1e}"),
    }
    found = [row] if not theirs else []
    for side in theirs:
        ratio = round(side.seconds() / ours.seconds(), 2)
        found.append(row | {"peer": side.about["name"], "ratio": ratio, **side.row("peer")})
    for side in [ours, *theirs]:
        side.close()
    return found


def path_of(name: str, given: Path | None) -> list[Path]:
    """What comes before the installed packages in a peer's process: a folder that was given, or the one pip fills."""
    if given is not None:
        if not given.is_dir():
            raise SystemExit(f"--peer-site {given}: no such folder")
        return [given.resolve() / name, given.resolve()]
    site = BUILT / name
    pins = [line for line in (HERE / f"{name}.txt").read_text().splitlines() if "==" in line]
    installed = {plain(d.name): d.version for d in metadata.distributions(path=[*sys.path, str(site)])}
    missing = [pin for pin in pins if installed.get(plain(pin.partition("==")[0])) != pin.partition("==")[2]]
    if missing:
        print(f"{name}: pip installs {' '.join(missing)} into {site}", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(site)]
        if subprocess.run([*pip, *missing], stdout=sys.stderr).returncode:
            raise SystemExit(f"{name}: pip could not install it; without an index, give --peer-site FOLDER")
    return [site]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
