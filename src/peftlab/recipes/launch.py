"""From a verb and a config to a run: what `peftlab sft`, `classify`, `ppo` ... have in common."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import Config, command_for, headlines, load_config, to_toml
from ..data.check import READS
from ..errors import Interrupted, LabError, UserError
from ..models.backbone import pick_device
from ..models.classifier import LABEL_NAMES, own_labels
from ..report import render
from ..runs.launched import rank, world_size
from ..runs.progress import Progress, say, watched
from ..runs.rundir import RunDir, differences, ended_runs, vacant
from ..runs.summary import done_since, outcome
from ..runs.typed import resuming, typed
from ..training.arguments import TrainConfig
from . import load
from .common import load_rows
from .several import joined, of_first, opened, require_same_job, require_shares
from .tasks.config import TaskConfig

FOR_GPU = "made for a GPU"  # as the first line of a shipped config says
SHORTER = {"max_steps": 100, "train_limit": 500, "steps": 10}  # the keys that shorten a job, and what one may try
EARLY = {"failed": "failed", "stopped": "was stopped", "killed": "was killed"}  # how a run ends that is not done


def launch(
    verb: str, source: str | None, overrides: list[str], root: Path, name: str | None = None, resume: bool = False
) -> dict[str, Any]:
    """Resolve the config, open the run folder, train, render the report. Returns the summary.

    Of a resume that met a run which was done before, it has `finished` too, since when.
    Raises Interrupted, with the command that continues the run, where a signal stopped it.
    """
    config, default = _resolve(verb, source, overrides)
    require_shares(config)
    with joined(config.device):
        require_same_job(verb, to_toml(config), name, resume)
        words = [verb, *([source] if source else []), *overrides]
        name = name or of_first(lambda: free_name(root, default, resume, config, words))
        if not (source or overrides or resume):
            say(f"{verb} by its defaults, as run {name}: `peftlab {verb} --dry-run` shows them; Ctrl+C stops it")
        if not resume and (told := slow_here(verb, source, config, overrides)):
            say(told)
        if resume and rank() == 0 and (root / name / "config.toml").is_file() and vacant(root / name):
            say(f"{name}: has nothing to resume, {_ended_bare(outcome(root / name))}; this starts it anew")
        since = done_since(root / name) if resume else None
        try:
            return start(verb, config, root, name, resume) | ({"finished": since} if since else {})
        except Interrupted as error:
            raise stopped(error.signum, [*words, "--run", name], anew=vacant(root / name)) from None


def start(verb: str, config: Config, root: Path, name: str, resume: bool = False) -> dict[str, Any]:
    """Run a recipe with a config that is already resolved."""
    with opened(root, name, verb, to_toml(config), resume) as run:
        if run.finished:
            say(already_done(run))
        elif run.resumed:
            say(f"{name}: resuming this run")
        try:
            with watched(name, run.path):
                summary: dict[str, Any] = load(verb).run(config, run)
        except BaseException:
            with contextlib.suppress(LabError, UserError):  # on a full disk: the first error is the one to tell
                _report(run)
            raise
        _report(run)
        return summary


def already_done(run: RunDir) -> str:
    """What a resume says of a run that is done. A demo goes on from its stage to the next."""
    remedy = "" if "/" in run.name else "; nothing to resume, more steps take a new --run NAME"
    return f"{run.name}: already done, since {done_since(run.path)}{remedy}"


def slow_here(verb: str, source: str | None, config: Config, overrides: list[str]) -> str:
    """What to say before a job that takes long on this machine, with what makes it shorter; else nothing.

    That is a config made for a GPU, or the defaults on all their data, where the device is a CPU and none of the keys
    that shorten the job was given.
    """
    fields = type(config).model_fields
    limits = {key: value for key, value in SHORTER.items() if key in fields}
    given = {override.partition("=")[0].strip() for override in overrides}
    told, data = headlines(), getattr(config, "train_data", "")
    large = FOR_GPU in told.get(source or "", "")
    whole = source is None and "train_limit" in fields and data == fields["train_data"].default and ":" in data
    if not (large or whole) or given & limits.keys() or pick_device(getattr(config, "device", "auto")).type != "cpu":
        return ""
    names = [
        name for name, line in told.items() if FOR_GPU not in line and command_for(name).startswith(f"peftlab {verb} ")
    ]
    smaller = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} smaller; " if names else ""
    why = f"{source} is {FOR_GPU}" if large else f"{verb} without a config trains on all of {data}"
    keys = " or ".join(f"{key}={value}" for key, value in limits.items())
    return f"{why}, and may take hours on a CPU: {smaller}{keys} makes it shorter"


def _report(run: RunDir) -> None:
    if rank() == 0 and (run.path / "summary.json").is_file():
        render(run.path)


def stopped(signum: int, words: list[str], anew: bool = False) -> Interrupted:
    """A stop by a signal, whose message ends with a line to type: `peftlab` and these words continue the run.

    Or start it `anew`, where it had not come to its first figure.
    """
    how, words = ("starts it anew", words) if anew else ("continues the run", [*words, "--resume"])
    many = f", launched in {world_size()} processes again," if world_size() > 1 else ""
    name = signal.Signals(signum).name
    return Interrupted(signum, f"stopped by {name}; this{many} {how}:\n  {typed(*words)}")


def dry_run(verb: str, source: str | None, overrides: list[str]) -> dict[str, Any]:
    """The resolved config and the job's sizes; UserError where the processes cannot share them, as of a launch."""
    config, _ = _resolve(verb, source, overrides)
    require_shares(config)
    plan = load(verb).plan(config)
    if isinstance(config, TrainConfig):  # which the run refuses, too, where training leaves nothing of them
        rows: Any = config
        load_rows(rows, "eval", READS.get(verb, verb), own_labels(getattr(config, "labels", LABEL_NAMES)))
    return {"config": config.model_dump(), **plan}


def _resolve(verb: str, source: str | None, overrides: list[str]) -> tuple[TrainConfig | TaskConfig, str]:
    """The config of a run, and the run's name where none is given."""
    kind: type[TrainConfig] | type[TaskConfig] = load(verb).CONFIG
    return load_config(kind, source, overrides), Path(source).stem if source else verb


def free_name(root: Path, name: str, resume: bool, config: Config, words: Sequence[str] = ()) -> str:
    """`name`, or the first of name-2, name-3 ... that is vacant, which is said; for a resume the run of `config`.

    `words` are what was typed behind `peftlab`, without options.
    """
    if resume:
        return _to_resume(root, config, words)
    names = [name, *(f"{name}-{n}" for n in range(2, 1000))]
    free = next(n for n in names if vacant(root / n))
    if free != name and not Progress.quiet:
        say(
            f"there is a run {name} already, so this one is {free}; --resume goes on with one that was stopped, "
            "--run gives a name of your own"
        )
    return free


def _to_resume(root: Path, config: Config, words: Sequence[str]) -> str:
    """The newest run of this very config, one that can go on before one that is done (a resume may be repeated).

    UserError where there is none: why the newest of this config cannot go on, else the newest of the recipe that can.
    """
    recipe, ours = type(config).model_fields["recipe"].default, to_toml(config)
    found = ended_runs(root, recipe)
    texts = {folder: (folder / "config.toml").read_text(encoding="utf-8") for folder, _ in found}
    going = [folder for folder, status in found if status != "done"]
    same = [folder for folder, text in texts.items() if text == ours]
    if same:
        return next((folder for folder in reversed(going) if folder in same), same[-1]).name
    # By their folders, which may have other names than the runs began with.
    alike = [outcome(file.parent) | {"run": file.parent.name} for file in root.glob("*/config.toml")]
    alike = sorted((run for run in alike if run["recipe"] == recipe), key=lambda run: str(run["started"]))
    for run in reversed(alike):
        if run["status"] in EARLY and (root / run["run"] / "config.toml").read_text(encoding="utf-8") == ours:
            raise UserError(_nothing_left(root, run, words))
    if going:
        last = going[-1]
        raise UserError(
            f"no run of {recipe} in {root} has this configuration; drop --resume to start one. "
            f"Run {last.name} can go on with its own, which differs in {', '.join(differences(texts[last], ours))}:\n"
            f"  {resuming(last, recipe)}"
        )
    busy = [run["run"] for run in alike if run["status"] == "running"]
    why = f"{', '.join(busy)} is still running" if busy else "none was stopped after its first figure or checkpoint"
    raise UserError(f"no run of {recipe} in {root} can be resumed: {why}; drop --resume to start one")


def _nothing_left(root: Path, run: Mapping[str, Any], words: Sequence[str]) -> str:
    """Why a run that ended before its first figure cannot be resumed, and what starts it anew."""
    command = typed(*words, *(["--run", run["run"]] if vacant(root / run["run"]) else []))
    return (
        f"no run of {run['recipe']} in {root} can be resumed: {run['run']} has nothing to go on from, "
        f"{_ended_bare(run)}; drop --resume to start it anew:\n  {command}"
    )


def _ended_bare(run: Mapping[str, Any]) -> str:
    """How a run ended that left nothing to go on from; of the reason the first line."""
    told = str(run["reason"]).partition("\n")[0]
    return f"it {EARLY[run['status']]} before its first figure" + (f" ({told})" if run["status"] == "failed" else "")
