"""Making room below runs/: checkpoints of runs that are done, or whole runs by how they ended.

Nothing goes that a living process works in, nor what a run that stays was trained on.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from .atomic import disk_errors
from .lock import locked
from .summary import outcome

ENDED = ("done", "stopped", "failed", "killed")
_DOOMED = ".pruned~"  # no run is called so


@dataclass(frozen=True)
class Item:
    """What may go: a run, or (`checkpoints`) only those of it. `users`: runs that stay and stand on it, so it stays."""

    run: str
    folder: Path
    status: str
    checkpoints: bool
    size: int
    users: tuple[str, ...] = ()

    @property
    def place(self) -> Path:
        return self.folder / "checkpoints" if self.checkpoints else self.folder


def plan(root: Path, keep: int = 0, statuses: Sequence[str] = ()) -> list[Item]:
    """What `prune` would take, oldest first, all but the newest `keep`; with `statuses` whole runs that ended so.

    Without them: the checkpoints of the runs that are done, which no resume needs. UserError for an unknown status.
    """
    if unknown := [status for status in statuses if status not in ENDED]:
        raise UserError(f"--status {unknown[0]}: give {', '.join(ENDED)}")
    if keep < 0:
        raise UserError(f"--keep {keep}: give 0 or more")
    folders = _folders(root)
    found = []
    for folder in folders:
        ended = outcome(folder)
        stage = (folder.parent / "config.toml").is_file()  # of a demo, which goes as a whole
        if ended["status"] in (statuses or ("done",)) and not (statuses and stage):
            item = Item(str(folder.relative_to(root)), folder, str(ended["status"]), not statuses, 0)
            if item.place.is_dir():
                found.append((str(ended["started"]), item))
    ordered = [item for _, item in sorted(found, key=lambda pair: pair[0])]
    return _with_users(ordered[: max(0, len(ordered) - keep)], folders, root)


def _with_users(items: list[Item], folders: Sequence[Path], root: Path) -> list[Item]:
    """The items with their size and users. One that stays for a user is itself a user of what it stands on."""
    named = {folder: _paths(folder) for folder in folders}
    users: dict[Path, tuple[str, ...]] = {}
    while True:
        going = [item.place for item in items if item.place not in users]
        staying = [folder for folder in folders if not any(_inside(folder, place) for place in going)]
        found = {item.place: _users(item, named, staying, root) for item in items}
        if users == (users := {place: names for place, names in found.items() if names}):
            return [replace(item, size=_size(item.place), users=users.get(item.place, ())) for item in items]


def _users(item: Item, named: dict[Path, set[Path]], staying: Sequence[Path], root: Path) -> tuple[str, ...]:
    """The runs that stay whose config names a path inside what would go."""
    place = item.place.resolve()
    users = (folder for folder in staying if any(_inside(path, place) for path in named[folder]))
    return tuple(str(folder.relative_to(root)) for folder in users if not _inside(folder, item.folder))


def remove(item: Item) -> None:
    """Delete it; UserError where a process works in the run. Renamed first: a kill must leave no run with holes."""
    with locked(item.folder), disk_errors(item.place):
        for leftover in item.place.parent.glob(f"{_DOOMED}*"):  # of a prune that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        doomed = item.place.with_name(f"{_DOOMED}{item.place.name}")
        item.place.rename(doomed)
        (doomed / "config.toml").unlink(missing_ok=True)  # what is left of a run is then none
        shutil.rmtree(doomed)


def _folders(root: Path) -> list[Path]:
    """Every run below `root`, and the stages of demos; links are left alone."""
    files = [*root.glob("*/config.toml"), *root.glob("*/*/config.toml")] if root.is_dir() else []
    return [file.parent for file in files if not (file.parent.is_symlink() or file.parent.parent.is_symlink())]


def _paths(folder: Path) -> set[Path]:
    """The places on this disk that a run's config may name: a model, a reward's parts, data."""
    with contextlib.suppress(OSError, ValueError):
        table = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        # A reward's parts stand between * and +, a path with one of these in quotes.
        found = (match.group(0) for text in _texts(table) for match in re.finditer(r"\"[^\"]*\"|'[^']*'|[^*+]+", text))
        parts = (part.strip().strip("\"'") for part in found)
        return {Path(part).resolve() for part in parts if "/" in part}
    return set()


def _texts(value: object) -> Iterator[str]:
    """Every string in a config."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _inside(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
