"""One folder a run, which holds all that the run was, did and found. Only recipes and cli use it.

run = RunDir.create(Path("runs"), "demo/ppo", "ppo", config_toml, resume=False)
with run.session():
    run.log({"reward/mean": 0.3}, step=1)
    run.finish(metrics, baseline)
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import Interrupted, LabError, PeftlabError, UserError, with_article
from . import environment as surroundings
from .atomic import (
    append_line,
    append_rows,
    disk_errors,
    full_disk,
    read_rows,
    write_bytes,
    write_json,
    write_rows,
    write_text,
)
from .checkpoint import Checkpoint, CheckpointStore
from .launched import peers, world_size
from .lock import LOCK, locked
from .memory import full_memory
from .metrics import metric
from .names import NAME
from .signals import StopSignals
from .summary import ended_runs, find_run, flat, list_runs, outcome, read_environment, read_summary

__all__ = ["RunDir", "check_name", "differences", "ended_runs", "find_run", "list_runs", "read_summary"]

LOGS = ("metrics.jsonl", "rollouts.jsonl")  # what a resume cuts back to its checkpoint


def check_name(name: str) -> str:
    """`name` itself if it may name a run, an adapter or a persona; UserError otherwise."""
    if not NAME.fullmatch(name) or name in (".", ".."):
        raise UserError(
            f"bad name {name!r}; use 1 to 64 letters, digits, dots, dashes or underscores, not . or .."
        )
    return name


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def differences(old_toml: str, new_toml: str, places: tuple[str, str] = ("there", "now")) -> list[str]:
    """The keys of two configurations that differ, each with both values and their `places`."""
    old, new = flat(tomllib.loads(old_toml)), flat(tomllib.loads(new_toml))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    before, now = places
    return [f"{key} ({old.get(key, 'absent')!r} {before}, {new.get(key, 'absent')!r} {now})" for key in keys]


def vacant(path: Path) -> bool:
    """Whether a run may begin in this folder: it is not there or empty, or nothing of what is there is worth keeping.

    A run counts as begun once config.toml, written last, is there; what a kill left before that is ours to replace, and
    what a run left that failed or was stopped before its first figure: once mended, the same command may run.
    """
    before = {LOCK, "environment.json"}
    early = before | {"config.toml", "events.jsonl", "summary.json", "report.html", "skipped.jsonl"}
    there = {entry.name for entry in path.iterdir() if ".tmp-" not in entry.name} if path.is_dir() else set()
    return there <= before or there <= early and outcome(path)["status"] in ("failed", "stopped")


def _failed(path: Path) -> bool:
    return bool(outcome(path)["status"] == "failed")


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


class RunDir:
    """A run's folder. Make one with `create`, work inside `session`, end with `finish`.

    `finished` is True where a resume met a run that is done: return `summary` and say so. `resumed` is True
    where earlier work may be there to continue; `new` where the folder was not there before.
    """

    def __init__(self, path: Path, name: str, recipe: str, *, resumed: bool, new: bool = False) -> None:
        self.path, self.name, self.recipe, self.resumed, self.new = path, name, recipe, resumed, new
        self.checkpoints = CheckpointStore(path / "checkpoints", logs=[path / name for name in LOGS])
        self.summary: dict[str, Any] | None = None
        if resumed and (path / "summary.json").exists():
            self.summary = read_summary(path)
        self._signals = StopSignals(self._resumes)
        self._began = time.monotonic()

    @classmethod
    def create(
        cls,
        root: Path,
        name: str,
        recipe: str,
        config_toml: str,
        *,
        resume: bool = False,
        environment: Mapping[str, Any] | None = None,
    ) -> RunDir:
        """The folder `root/name`, new or, with `resume`, taken up again.

        `name` is "run" or "demo/stage"; `config_toml` the resolved configuration; `environment` what the
        recipe adds to environment.json (device, dtype, model and its hash). UserError where the folder holds
        another run (but one that ended early, before its first figure, is replaced), where there is nothing to
        resume, or where recipe or configuration differ from the run to resume. A stage of a resumed demo that
        was not reached yet starts fresh.
        """
        parts = name.split("/")
        if len(parts) > 2:
            raise UserError(f"bad run name {name!r}; at most one folder below another, as in demo/ppo")
        path = root.joinpath(*map(check_name, parts))
        if resume and not path.is_dir() and len(parts) == 1:
            raise UserError(f"no run {name!r} in {root} to resume; drop --resume to start it")
        try:
            new = not path.exists() or os.listdir(path) == [LOCK]  # the lock alone is left of a refusal that was killed
            path.mkdir(parents=True, exist_ok=True)
            guard = contextlib.ExitStack()
            guard.enter_context(locked(path))
        except OSError as error:
            raise UserError(
                f"cannot use run folder {path}: {error.strerror}; choose another place or --run"
            ) from None
        with guard:
            begun = (path / "config.toml").is_file() and not vacant(path)
            if begun and resume:
                cls._check_same(path, name, recipe, config_toml)
            else:
                cls._begin(path, name, recipe, config_toml, environment or {})
            return cls(path, name, recipe, resumed=begun and resume, new=new)

    @staticmethod
    def _check_same(path: Path, name: str, recipe: str, config_toml: str) -> None:
        about = read_environment(path)
        before = about.get("recipe", "?")
        if before != recipe:
            raise UserError(f"run {name!r} is {with_article(before)} run, not {recipe}; choose another --run")
        began = about.get("processes", 1)
        if began != world_size():
            raise UserError(
                f"cannot resume run {name!r} in {_processes(world_size())}: it began in {began}; launch as many, or "
                "choose another --run"
            )
        differing = differences((path / "config.toml").read_text(encoding="utf-8"), config_toml)
        if differing:
            raise UserError(
                f"cannot resume run {name!r} with another configuration: {', '.join(differing)}; "
                f"use the values of {path / 'config.toml'} (give that file as the config), or another --run"
            )

    @staticmethod
    def _begin(path: Path, name: str, recipe: str, config_toml: str, extra: Mapping[str, Any]) -> None:
        if not vacant(path):
            raise UserError(
                f"run folder {path} is not empty; --resume continues that run, another --run starts anew"
                + ("; it failed: delete the folder to take its name again" if _failed(path) else "")
            )
        for log in ("events.jsonl", "skipped.jsonl"):  # of what ended here before its first figure
            (path / log).unlink(missing_ok=True)
        about = {
            "schema_version": 1,
            "run": name,
            "recipe": recipe,
            "started": _now(),
            **surroundings.collect(),
        }
        write_json(path / "environment.json", {**about, **extra, "data": {}})
        write_text(path / "config.toml", config_toml)

    @property
    def finished(self) -> bool:
        """Whether the run is done, so that nothing is left to resume."""
        return self.summary is not None and self.summary["status"] == "done"

    @property
    def stop_requested(self) -> int | None:
        """The number of the signal that asked the run to stop, None while it may go on."""
        return self._signals.requested

    def stepping(self) -> contextlib.AbstractContextManager[None]:
        """A block whose loop reads `stop_requested` after each step; around it a stop needs no loop, and loses nothing.

        Raises Interrupted, before it begins, where a stop was asked for already.
        """
        return self._signals.stepping()

    def wall_s(self) -> float:
        """Seconds since `create`, plus, after a resume, those of the earlier work that is kept."""
        return time.monotonic() - self._began

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Appends a row to metrics.jsonl. KeyError for an unregistered name; NaN and inf become null."""
        for name in metrics:
            metric(name)
        values = {name: None if value is None else float(value) for name, value in metrics.items()}
        append_line(
            self.path / "metrics.jsonl", {"step": int(step), "time": round(self.wall_s(), 3), **values}
        )

    def event(self, kind: str, **fields: Any) -> None:
        """Appends what happened, and when, to events.jsonl."""
        append_line(self.path / "events.jsonl", {"time": _now(), "kind": kind, **fields})

    def write_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replaces samples.jsonl, one row an evaluation prompt and side."""
        write_rows(self.path / "samples.jsonl", [dict(row) for row in rows])

    def append_rollouts(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends sampled rollouts, token by token, to rollouts.jsonl."""
        append_rows(self.path / "rollouts.jsonl", [dict(row) for row in rows])

    def cut_back(self, checkpoint: Checkpoint | None) -> None:
        """Drops what was logged after `checkpoint`, from which the run goes on, was written; None: all. The clock too.

        By length, since figures measured after the last step bear its number; by step where a checkpoint tells none.
        """
        sizes = checkpoint.log_sizes() if checkpoint else {}
        for file in filter(Path.exists, self.checkpoints.logs):
            if sizes is not None:
                write_bytes(file, file.read_bytes()[: sizes.get(file.name, 0)])
            elif checkpoint is not None:
                write_rows(file, [row for row in read_rows(file) if row.get("step", 0) <= checkpoint.step])
        kept = [row.get("time") or 0.0 for row in read_rows(self.path / "metrics.jsonl")]
        self._began -= max(kept, default=0.0)

    def record_data(self, name: str, sha256: str, rows: int) -> None:
        """Notes which data the run read, in environment.json; UserError where a resume meets other data."""
        self._record("data", name, {"sha256": sha256, "rows": rows}, f"data {name!r}")

    def record_model(self, what: str, sha256: str) -> None:
        """Notes what stands behind a key, as in "reward imdb-sentiment"; UserError where a resume meets another."""
        self._record("models", what, {"sha256": sha256}, what)

    def _record(self, table: str, name: str, facts: Mapping[str, Any], words: str) -> None:
        file = self.path / "environment.json"
        about = json.loads(file.read_text(encoding="utf-8"))
        known = about.setdefault(table, {}).get(name)
        if known and known["sha256"] != facts["sha256"]:
            raise UserError(
                f"{words} is not what run {self.name!r} began with (sha256 "
                f"{known['sha256'][:12]} then, {facts['sha256'][:12]} now); restore it, or start another --run"
            )
        about[table][name] = dict(facts)
        write_json(file, about)

    def record_skipped(self, data: str, rows: Iterable[tuple[str, str]]) -> None:
        """Replaces the bad rows, (place, reason) each, that skipped.jsonl tells of `data` ("train", "eval")."""
        file = self.path / "skipped.jsonl"
        skipped = [{"data": data, "row": place, "reason": reason} for place, reason in rows]
        write_rows(file, [*(row for row in read_rows(file) if row["data"] != data), *skipped])
        self.event("rows_skipped", data=data, rows=len(skipped))

    @contextlib.contextmanager
    def session(self) -> Iterator[RunDir]:
        """Holds the run's lock and heeds SIGINT and SIGTERM. However it ends, summary.json says how.

        But of a new run that a UserError refuses before its first figure nothing is left: it never began. A folder that
        was there before stays, and so does one whose skipped.jsonl tells of bad rows.
        """
        with locked(self.path), StopSignals(self._resumes) as self._signals:
            if not self.finished:
                self._open()
            try:
                with full_disk(self.path), full_memory(self.path / "config.toml"), peers():
                    yield self
                if self.summary is None:
                    raise LabError(f"recipe {self.recipe} ended without figures: it never called finish()")
            except BaseException as error:
                if self.summary is None:
                    self._end_early(error)
                    if isinstance(error, UserError) and self.new and self._bare():
                        self._withdraw()
                raise

    def _open(self) -> None:
        self.summary = None
        with disk_errors(self.path):
            (self.path / "summary.json").unlink(missing_ok=True)
            self.checkpoints.clean()
            for leftover in self.path.glob(".*.tmp-*"):
                leftover.unlink(missing_ok=True)
        for name in (*LOGS, "events.jsonl"):
            if (self.path / name).exists():  # a line that a kill tore must not swallow the next one
                write_rows(self.path / name, read_rows(self.path / name))
        self.event("resume" if self.resumed else "start", packages=surroundings.package_versions())

    def _resumes(self) -> str:
        """What --resume would do, by what is on disk now. A signal's handler asks: it must take no lock."""
        if steps := self.checkpoints.steps():
            return f"goes on after step {steps[-1]}"
        # Those of the members of an ensemble, and the stages of a demo, have folders of their own.
        inner = any(self.checkpoints.folder.glob("*/step-*")) or any(self.path.glob("*/config.toml"))
        return "goes on from what is done" if inner else "goes on from the start, since there is no checkpoint yet"

    def _end_early(self, error: BaseException) -> None:
        known = isinstance(error, PeftlabError)
        reason = str(error) if known else f"{type(error).__name__}: {error}".rstrip(": ")
        status = "stopped" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        last: dict[str, float] = {}
        for row in read_rows(self.path / "metrics.jsonl"):
            last.update({name: value for name, value in row.items() if name not in ("step", "time")})
        with contextlib.suppress(LabError):  # a full disk: the first error is the one to report
            stages = {file.parent.name: read_summary(file) for file in self.path.glob("*/summary.json")}
            self.finish(last, {}, status=status, reason=reason, stages=stages or None)

    def _bare(self) -> bool:
        """Whether nothing was done yet that anyone may want to read."""
        return vacant(self.path) and not (self.path / "skipped.jsonl").exists()

    def _withdraw(self) -> None:
        """Deletes the folder, so that what a kill or a failing disk leaves of it is vacant too.

        The summary outlives the config, and the lock all else: nobody may take the folder while files go from it.
        """
        last = {"config.toml": 1, "summary.json": 2, LOCK: 3}
        with contextlib.suppress(OSError):  # the first error is the one to report
            for file in sorted(self.path.iterdir(), key=lambda file: last.get(file.name, 0)):
                file.unlink()
            self.path.rmdir()

    def finish(
        self,
        metrics: Mapping[str, Any],
        baseline: Mapping[str, Any],
        intervals: Mapping[str, tuple[float, float]] | None = None,
        artifacts: Mapping[str, str | Path] | None = None,
        step_s: float | None = None,
        status: str = "done",
        reason: str | None = None,
        stages: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Writes summary.json and returns it.

        `baseline` holds the same names for the model before the job; `intervals` [low, high] a name;
        `artifacts` paths inside the run, absolute or relative to it; `step_s` median seconds of a step;
        `stages` a demo's summaries. A run that ends early is finished by `session`, with the last logged
        value of each metric.
        """
        for name in (*metrics, *baseline, *(intervals or {})):
            metric(name)
        summary: dict[str, Any] = {
            "schema_version": 1,
            "recipe": self.recipe,
            "run": self.name,
            "status": status,
            "reason": reason,
            "metrics": {name: None if value is None else float(value) for name, value in metrics.items()},
            "baseline": {name: None if value is None else float(value) for name, value in baseline.items()},
            "intervals": {name: [float(low), float(high)] for name, (low, high) in (intervals or {}).items()},
            "time": {"wall_s": round(self.wall_s(), 3), "step_s": step_s},
            "artifacts": {name: self._relative(path) for name, path in (artifacts or {}).items()},
        }
        if stages is not None:
            summary["stages"] = {name: dict(stage) for name, stage in stages.items()}
        self.event("finish", status=status, reason=reason)
        write_json(self.path / "summary.json", summary)
        self.summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        return self.summary

    def _relative(self, path: str | Path) -> str:
        place = Path(path)
        return (place.resolve().relative_to(self.path.resolve()) if place.is_absolute() else place).as_posix()
