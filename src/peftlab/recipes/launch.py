"""From a verb and a config to a run: what `peftlab sft`, `classify`, `ppo` ... have in common."""

from __future__ import annotations

import contextlib
import shlex
import signal
from pathlib import Path
from typing import Any

from ..config import Config, load_config, to_toml
from ..errors import Interrupted, LabError, UserError
from ..report import render
from ..runs.launched import rank, world_size
from ..runs.progress import say, watched
from ..runs.rundir import RunDir, ended_runs, vacant
from ..training.arguments import TrainConfig
from . import load
from .several import joined, of_first, opened, require_same_job, require_shares
from .tasks.config import TaskConfig


def launch(
    verb: str, source: str | None, overrides: list[str], root: Path, name: str | None = None, resume: bool = False
) -> dict[str, Any]:
    """Resolve the config, open the run folder, train, render the report. Returns the summary.

    Raises Interrupted, with the command that continues the run, where a signal stopped it.
    """
    config, default = _resolve(verb, source, overrides)
    require_shares(config)
    with joined(config.device):
        require_same_job(verb, to_toml(config), name, resume)
        name = name or of_first(lambda: free_name(root, default, resume, config))
        if not (source or overrides or resume):
            say(f"{verb} by its defaults, as run {name}: `peftlab {verb} --dry-run` shows them; Ctrl+C stops it")
        try:
            return start(verb, config, root, name, resume)
        except Interrupted as error:
            words = [verb, *([source] if source else []), *overrides, "--run", name, "--resume"]
            raise stopped(error.signum, words) from None


def start(verb: str, config: Config, root: Path, name: str, resume: bool = False) -> dict[str, Any]:
    """Run a recipe with a config that is already resolved."""
    with opened(root, name, verb, to_toml(config), resume) as run:
        if run.finished:
            say(f"{name}: already done; nothing to resume")
        elif run.resumed:
            say(f"{name}: resuming this run")
        try:
            with watched(name, run.path):
                summary: dict[str, Any] = load(verb).run(config, run)
        except BaseException:
            with contextlib.suppress(LabError):  # on a full disk: the first error is the one to tell
                _report(run)
            raise
        _report(run)
        return summary


def _report(run: RunDir) -> None:
    if rank() == 0 and (run.path / "summary.json").is_file():
        render(run.path)


def stopped(signum: int, words: list[str]) -> Interrupted:
    """A stop by a signal, whose message ends with a line to type: `peftlab` and these words continue the run."""
    command = shlex.join(["peftlab", *words])
    many = f", launched in {world_size()} processes again," if world_size() > 1 else ""
    return Interrupted(signum, f"stopped by {signal.Signals(signum).name}; this{many} continues the run:\n  {command}")


def dry_run(verb: str, source: str | None, overrides: list[str]) -> dict[str, Any]:
    """The resolved config and the job's sizes; UserError where the processes cannot share them, as of a launch."""
    config, _ = _resolve(verb, source, overrides)
    require_shares(config)
    return {"config": config.model_dump(), **load(verb).plan(config)}


def _resolve(verb: str, source: str | None, overrides: list[str]) -> tuple[TrainConfig | TaskConfig, str]:
    """The config of a run, and the run's name where none is given."""
    kind: type[TrainConfig] | type[TaskConfig] = load(verb).CONFIG
    return load_config(kind, source, overrides), Path(source).stem if source else verb


def free_name(root: Path, name: str, resume: bool, config: Config) -> str:
    """`name`, or the first of name-2, name-3 ... that is vacant; for a resume the run of `config` to go on with."""
    if resume:
        return _to_resume(root, config)
    names = [name, *(f"{name}-{n}" for n in range(2, 1000))]
    return next(n for n in names if vacant(root / n))


def _to_resume(root: Path, config: Config) -> str:
    """The newest run of this very config, one that can go on before one that is done (a resume may be repeated).

    Where there is none, the newest of the recipe that can go on.
    """
    recipe, ours = type(config).model_fields["recipe"].default, to_toml(config)
    best = (False, False, "")
    for folder, status in ended_runs(root, recipe):
        same, going = (folder / "config.toml").read_text(encoding="utf-8") == ours, status != "done"
        if (same or going) and (same, going) >= best[:2]:
            best = (same, going, folder.name)
    if not best[2]:
        raise UserError(
            f"no run of {recipe} in {root} can be resumed: none has logged a figure or written a checkpoint; "
            "drop --resume to start one"
        )
    return best[2]
