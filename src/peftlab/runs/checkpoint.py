"""Checkpoints that a kill cannot spoil: staged, hashed, renamed, and verified before a resume trusts one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LabError
from .atomic import disk_fault, fsync_file, fsync_folder, write_json

MANIFEST = "manifest.json"
LOGS = "logs.json"  # in a checkpoint: the bytes that each log had when it was written
_STEP = re.compile(r"step-(\d{8,})")
_STAGING, _REPLACED = ".staging-", ".replaced-"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """Every file below `folder` by its relative name; the manifest itself and dot files are left out."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    return {name: path for name, path in names.items() if name != MANIFEST and not path.name.startswith(".")}


def _flush(folder: Path) -> None:
    """Makes all that lies below `folder` survive a power cut."""
    for path in folder.rglob("*"):
        (fsync_folder if path.is_dir() else fsync_file)(path)


def write_manifest(folder: Path) -> None:
    """Flushes every file below `folder`, then writes manifest.json: the sha256 and size of each."""
    _flush(folder)
    files = sorted(_files(folder).items())
    listed = {name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for name, path in files}
    write_json(folder / MANIFEST, {"schema_version": 1, "files": listed})


def verify_manifest(folder: Path) -> list[str]:
    """What keeps `folder` from being what its manifest says, one phrase each; empty when all is well.

    Only files found below `folder` are opened, so a manifest from a stranger cannot point anywhere else.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["schema_version"]
        listed = {
            str(name): (str(entry["sha256"]), int(entry["bytes"]))
            for name, entry in manifest["files"].items()
        }
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} is unreadable ({type(error).__name__})"]
    if version != 1:
        return [f"{MANIFEST} has schema_version {version!r}, not 1"]
    found = _files(folder)
    problems = [f"{name} is missing" for name in listed if name not in found]
    problems += [f"{name} is not in {MANIFEST}" for name in found if name not in listed]
    for name, (digest, size) in listed.items():
        if name in found:
            problems += _file_problems(name, found[name], digest, size)
    return sorted(problems)


def _file_problems(name: str, path: Path, digest: str, size: int) -> list[str]:
    try:
        if path.is_symlink() or not path.is_file():
            return [f"{name} is not a plain file"]
        if path.stat().st_size != size:
            return [f"{name} has {path.stat().st_size} bytes, not {size}"]
        if _sha256(path) != digest:
            return [f"{name} does not match its sha256"]
    except OSError as error:
        return [f"{name} is unreadable ({error.strerror})"]
    return []


@contextlib.contextmanager
def whole_folder(folder: Path, marker: str = MANIFEST) -> Iterator[Path]:
    """A temporary sibling that takes the place of `folder` when the block ends well, and is removed when it fails.

    A folder that is there already is replaced if it has the file `marker`; what else it may hold is not ours: LabError.
    """
    if folder.exists() and not (folder / marker).is_file() and any(folder.iterdir()):
        raise LabError(f"{folder} holds other files; write into a folder that is empty or not there")
    staging, replaced = (folder.with_name(f"{mark}{folder.name}") for mark in (_STAGING, _REPLACED))
    _put_back(replaced, folder)
    for leftover in (staging, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        _readable(staging)
        _flush(staging)
        if folder.exists():
            folder.rename(replaced)
        staging.rename(folder)
        fsync_folder(folder.parent)
    finally:
        _put_back(replaced, folder)
        for leftover in (staging, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def _readable(folder: Path) -> None:
    """Gives files the rights of the umask, as the folder itself has them: safetensors writes for the owner alone."""
    allowed = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        mode = path.stat().st_mode & 0o777
        if path.is_file() and not path.is_symlink() and mode | allowed != mode:
            with contextlib.suppress(OSError):  # a file system without rights of its own refuses
                path.chmod(mode | allowed)


def _put_back(replaced: Path, folder: Path) -> None:
    """What was moved away for a folder that then never came, by a kill or a failing disk between two renames."""
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was verified; `step` is the number of optimizer steps done when it was written."""

    step: int
    path: Path

    def log_sizes(self) -> dict[str, int] | None:
        """Bytes, by name, of the logs that its store knows, when it was written; None in one of an older version."""
        if not (self.path / LOGS).exists():
            return None
        sizes: dict[str, int] = json.loads((self.path / LOGS).read_text(encoding="utf-8"))
        return sizes


class CheckpointStore:
    """The checkpoints of one run, `folder/step-00000123`, the newest `keep` of them. One writer at a time.

    `logs`: the files that grow beside; each checkpoint notes how long they are, for a resume to cut them back to.
    """

    def __init__(self, folder: Path, keep: int = 2, logs: Sequence[Path] = ()) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.folder = folder
        self.keep = keep
        self.logs = logs

    def steps(self) -> list[int]:
        """The steps that have a folder, verified or not, in ascending order."""
        if not self.folder.is_dir():
            return []
        names = (_STEP.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match.group(1)) for match in names if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` stands, or would stand."""
        return self.folder / f"step-{step:08d}"

    @contextlib.contextmanager
    def stage(self, step: int) -> Iterator[Path]:
        """A temporary folder for the state of `step`, which becomes a checkpoint when the block ends well.

        Where the block or the disk fails, the folder is removed and earlier checkpoints are untouched.
        """
        staging = self.folder / f"{_STAGING}{step:08d}-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.clean()
            staging.mkdir()
            yield staging
            write_json(staging / LOGS, {log.name: log.stat().st_size for log in self.logs if log.exists()})
            write_manifest(staging)
            self._publish(staging, step)
        except Exception as error:
            fault = disk_fault(error)
            if fault is None:
                raise
            reason = fault.strerror or type(fault).__name__
            raise LabError(
                f"cannot write checkpoint {self.path(step)}: {reason}; earlier ones are intact"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                self.clean()
        self._prune(step)

    def newest_verified(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint whose files all match its manifest, and why each newer one was skipped."""
        skipped: list[str] = []
        for step in reversed(self.steps()):
            problems = verify_manifest(self.path(step))
            if not problems:
                return Checkpoint(step, self.path(step)), skipped
            skipped.append(f"{self.path(step).name}: {'; '.join(problems)}")
        return None, skipped

    def clean(self) -> None:
        """Removes what a killed writer left; a checkpoint caught in mid-replacement is put back."""
        if not self.folder.is_dir():
            return
        for path in list(self.folder.iterdir()):
            if path.name.startswith(_REPLACED):
                _put_back(path, self.folder / path.name.removeprefix(_REPLACED))
            if path.name.startswith((_STAGING, _REPLACED)):
                shutil.rmtree(path, ignore_errors=True)

    def _publish(self, staging: Path, step: int) -> None:
        target = self.path(step)
        replaced = self.folder / f"{_REPLACED}{target.name}"
        if target.exists():  # a resume from an older checkpoint reaches this step again
            target.rename(replaced)
        staging.rename(target)
        fsync_folder(self.folder)

    def _prune(self, step: int) -> None:
        """Drops all but the newest `keep`, and checkpoints past `step`: a resume left that future behind."""
        steps = self.steps()
        past = [other for other in steps if other <= step]
        for other in set(steps) - set(past[-self.keep :]):
            # Renamed first: a kill while deleting must not leave a step folder with holes.
            doomed = self.folder / f"{_STAGING}pruned-{other:08d}"
            with contextlib.suppress(OSError):
                self.path(other).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
