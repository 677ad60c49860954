"""SIGKILL at random points of real runs: each is resumed, and must end as the run that nothing met.

    python benchmarks/faults.py --kills 200 --seed 0 [--recipe sft] [--programs 20] [--signal TERM]

Every recipe of the registry runs on random models of two layers and a handful of rows, with dropout where it has a
key. A run is killed at a moment drawn uniformly between the making of its folder and its end or, one time in three,
while it writes a checkpoint; one resumed run in four is killed again, which counts as a kill of its own. What must be
equal at the end: the sha256 of every file of the adapter (or model), and each logged figure that is not a time.

Most runs are children forked from this process, which has imported the libraries and computed nothing, so that there
is no pool of threads that a fork would lose; `--programs` of the kills meet a program started as a user does.
With `--signal` TERM or INT a run must end with exit 143 or 130, and how long that took is told.

    python benchmarks/faults.py --twins 20

Nothing is killed: so many times, in turn over the recipes, a second run must equal the first one of its seed.

One line a kill; the last line is JSON. Exit 0 only where every kill hit a run and every such run ended identical.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.0005
PATIENCE_S = 300.0  # far beyond any run here: one that takes as long hangs
DRAWS = 8  # of a kill that came when its run had ended
# A reward of the text alone: it needs no model that would have to be fetched.
REWARD = "def count_e(prompts, completions, records):\n    return [float(c.count('e')) for c in completions]\n"


class Child:
    """A forked process: `work` ends it with exit 0, SystemExit with its code, any other exception with 1."""

    def __init__(self, home: Path, log: Path, work: Callable[[], None]) -> None:
        sys.stdout.flush()
        self.log = log
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_live(home, log, work))

    def ended(self) -> bool:
        """Whether it has ended; `code` then says how, the negative number of a signal included."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def until(self, true: Callable[[], bool]) -> bool:
        """Waits until something is true, or the process has ended: whether it was before that."""
        limit = time.monotonic() + PATIENCE_S
        while not true():
            if self.ended():
                return False
            if time.monotonic() > limit:
                os.kill(self.pid, signal.SIGKILL)
                raise SystemExit(f"a run hangs; see {self.log}")
            time.sleep(POLL_S)
        return True

    def wait(self) -> int:
        """Its exit code."""
        self.until(self.ended)
        assert self.code is not None
        return self.code

    def kill(self, signum: int = signal.SIGKILL) -> float | None:
        """Seconds until a signal ended it; None where it had ended before, or came to its end all the same."""
        began = time.monotonic()
        if not self.ended():
            os.kill(self.pid, signum)
        # A shell tells both alike: 143 for a program that SIGTERM ends and for one that heeds it.
        return time.monotonic() - began if self.wait() in (-signum, 128 + signum) else None


def _live(home: Path, log: Path, work: Callable[[], None]) -> int:
    """The life of a child, its output in `log`."""
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(home)
        try:
            work()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@dataclass(frozen=True)
class Whole:
    """A run that nothing met: its seconds from its folder to its end, checkpoint writings, and what it left."""

    seconds: float
    writes: int
    write_seconds: float
    left: dict[str, str]


class Lab:
    """A folder with tiny models and data, in which runs start, die and are resumed."""

    def __init__(self, home: Path, signum: int = signal.SIGKILL) -> None:
        self.home, self.signum = home, signum
        (home / "few_rewards.py").write_text(REWARD)
        if Child(home, home / "workshop.log", lambda: _furnish(home)).wait():
            raise SystemExit(f"the models could not be made; see {home / 'workshop.log'}")
        self.shop: dict[str, str] = json.loads((home / "shop.json").read_text())

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.home / "runs" / name

    def words(self, verb: str, name: str, resume: bool = False) -> list[str]:
        """What follows `peftlab` on the command line: a job of several checkpoints, the last step not on one."""
        import tiny

        from peftlab.config import keys
        from peftlab.recipes import load

        known = keys(load(verb).CONFIG)
        rl = ["steps=5", "save_every=2", "reward=few_rewards:count_e"]
        pairs = rl if "steps" in known else ["max_steps=9", "save_every=2"]
        # Dropout draws from the generators that a resume must restore; recipes with a reference know none.
        pairs += ["lora.dropout=0.1"] if "lora.dropout" in known and verb not in ("ppo", "rloo", "dpo") else []
        pairs += [f"judge={self.judge()}"] if "judge" in known else []
        return [verb, *tiny.overrides(self.shop, verb, *pairs), "--run", name, *(["--resume"] if resume else [])]

    def judge(self) -> Path:
        """A classifier for the recipes that evaluate by one, trained when it is first asked for."""
        if not self.run("judge").exists() and self.start("classify", "judge").wait():
            raise SystemExit(f"the judge could not be trained; see {self.home / 'judge.log'}")
        return self.run("judge")

    def start(self, verb: str, name: str, resume: bool = False, program: bool = False) -> Child:
        """`peftlab VERB ...` in a child of this process or, by exec, as a program of its own."""
        words = self.words(verb, name, resume)
        return Child(self.home, self.home / f"{name}.log", lambda: _peftlab(words, program))

    def whole(self, verb: str) -> Whole:
        """The run of a recipe that nothing meets, with its measures."""
        run, child = self.run(verb), self.start(verb, verb)
        child.until(run.is_dir)
        began, spans = time.monotonic(), []
        while child.until(lambda: _writing(run)):
            from_ = time.monotonic()
            child.until(lambda: not _writing(run))
            spans.append(time.monotonic() - from_)
        if child.wait():
            raise SystemExit(f"{verb}: the run that nothing met failed; see {child.log}")
        return Whole(time.monotonic() - began, len(spans), sum(spans) / max(1, len(spans)), left(run))

    def kill(self, child: Child, run: Path, whole: Whole, draw: random.Random) -> str:
        """The signal at a drawn moment. Returns where that was; empty where the run came to its end."""
        aimed = draw.random() < 1 / 3
        point, write = draw.random(), draw.randrange(max(1, whole.writes))
        child.until(run.is_dir)
        began = time.monotonic()
        if aimed:
            for _ in range(write):
                child.until(lambda: _writing(run))
                child.until(lambda: not _writing(run))
            child.until(lambda: _writing(run))
            time.sleep(point * whole.write_seconds)
        else:
            child.until(lambda: time.monotonic() - began >= point * whole.seconds)
        after = time.monotonic() - began
        if (took := child.kill(self.signum)) is None:
            return ""
        if self.signum != signal.SIGKILL:
            return f"after {after:.2f} s, gone {took:.2f} s later"
        return f"after {after:.2f} s" + (", in a checkpoint" if _writing(run) else "")


def _peftlab(words: list[str], program: bool) -> None:
    if program:
        os.execv(sys.executable, [sys.executable, "-m", "peftlab.cli", *words])
    import torch

    from peftlab import cli

    torch.set_num_threads(1)
    sys.argv = ["peftlab", *words]
    cli.main()


def _furnish(home: Path) -> None:
    import tiny

    (home / "shop.json").write_text(json.dumps(tiny.workshop(home / "shop")))


def _writing(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    try:
        return any(name.startswith(".staging-") for name in os.listdir(run / "checkpoints"))
    except FileNotFoundError:
        return False


def left(run: Path) -> dict[str, str]:
    """What a run is for, by name: the sha256 of each file of its adapter or model, and the figures it logged.

    A model's card is left out: it tells how long the training took.
    """
    files = [path for part in ("adapter", "model") for path in (run / part).rglob("*") if path.is_file()]
    found = {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.suffix != ".md"}
    if not found:
        return {}
    for number, line in enumerate((run / "metrics.jsonl").read_text().splitlines()):
        figures = {name: value for name, value in json.loads(line).items() if not name.startswith("time")}
        found[f"metrics.jsonl:{number + 1}"] = json.dumps(figures, sort_keys=True)
    return found


@dataclass
class Tally:
    """What became of the kills."""

    kills: int
    hit: int = 0
    identical: int = 0
    different: int = 0
    unresumable: int = 0


def case(lab: Lab, verb: str, name: str, whole: Whole, draw: random.Random, program: bool, again: bool) -> list[str]:
    """A run that is killed, perhaps killed again, and resumed to its end: where each kill met it, then the verdict."""
    run = lab.run(name)
    for _ in range(DRAWS):
        shutil.rmtree(run, ignore_errors=True)
        if met := lab.kill(lab.start(verb, name, program=program), run, whole, draw):
            break
    else:
        return []
    places = [met]
    if again and (met := lab.kill(lab.start(verb, name, resume=True), run, whole, draw)):
        places.append(met)
    if lab.start(verb, name, resume=True).wait():
        return [*places, "unresumable"]
    return [*places, "identical" if left(run) == whole.left else "different"]


def campaign(lab: Lab, verbs: list[str], kills: int, seed: int, programs: int) -> Tally:
    """Kills in turn over the recipes, in a drawn order."""
    draw, tally = random.Random(seed), Tally(kills)
    wholes = {}
    for verb in verbs:
        wholes[verb] = lab.whole(verb)
        print(f"{verb}: {wholes[verb].seconds:.2f} s, {wholes[verb].writes} checkpoints", flush=True)
    order = _in_turn(verbs, draw)
    while tally.hit < kills:
        number, verb, program = tally.hit + 1, next(order), tally.hit < programs
        again = not program and number < kills and draw.random() < 1 / 4
        began = time.monotonic()
        *places, verdict = case(lab, verb, f"{verb}-{number}", wholes[verb], draw, program, again) or ["missed"]
        how = f"{verb}{' as a program' if program else ''}: killed {' and '.join(places)}: {verdict}"
        print(f"{number:4d}/{kills} {how} [{time.monotonic() - began:.1f} s]", flush=True)
        if not places:
            break
        tally.hit += len(places)
        setattr(tally, verdict, getattr(tally, verdict) + len(places))
        if verdict == "identical":
            shutil.rmtree(lab.run(f"{verb}-{number}"))
    return tally


def twins(lab: Lab, verbs: list[str], count: int, programs: int) -> Tally:
    """Runs of one seed beside the first of their recipe; the first `programs` are started as a user does."""
    tally, firsts = Tally(0), {verb: lab.whole(verb) for verb in verbs}
    for number, verb in enumerate(itertools.islice(itertools.cycle(verbs), count)):
        name = f"{verb}-{number}"
        lab.start(verb, name, program=number < programs).wait()
        verdict = "identical" if left(lab.run(name)) == firsts[verb].left else "different"
        print(f"{number + 1:4d}/{count} {verb}{' as a program' if number < programs else ''}: {verdict}", flush=True)
        setattr(tally, verdict, getattr(tally, verdict) + 1)
    return tally


def _in_turn(verbs: list[str], draw: random.Random) -> Iterator[str]:
    while True:
        yield from draw.sample(verbs, len(verbs))


def prepare() -> None:
    """Imports what runs need, and computes nothing: before any fork."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error"}
    sys.path.insert(0, str(ROOT / "tests"))
    for name in ("peftlab.cli", "tiny"):  # with the models' classes
        importlib.import_module(name)
    from peftlab.recipes import RECIPES, load

    for verb in RECIPES:
        load(verb)


def main() -> int:
    """Exit code 0 where all kills hit and all runs ended identical."""
    from peftlab.recipes import RECIPES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="may be given several times; default: all")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--twins", type=int, help="kill nothing: so many pairs of runs of one seed")
    parser.add_argument("--programs", type=int, help="kills of full program starts; default: one in ten")
    arguments = parser.parse_args()
    verbs = arguments.recipe or list(RECIPES)
    prepare()
    home = Path(tempfile.mkdtemp(prefix="peftlab-faults-"))
    wanted = arguments.twins or arguments.kills
    programs = wanted // 10 if arguments.programs is None else arguments.programs
    lab = Lab(home, signal.Signals[f"SIG{arguments.signal}"])
    if arguments.twins:
        tally = twins(lab, verbs, wanted, programs)
        good = tally.identical == wanted
    else:
        tally = campaign(lab, verbs, wanted, arguments.seed, programs)
        good = tally.identical == tally.hit == tally.kills
    if good:
        shutil.rmtree(home)
    else:
        print(f"what the runs left: {home}")
    print(json.dumps(asdict(tally)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
