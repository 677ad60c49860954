"""Files that are either whole or absent, whatever happens to the process or the disk.

JSON is written as ASCII: a lone surrogate cannot break it, and a terminal that prints a run's file raw meets
no control character. Numbers that are not finite become null, since JSON has no NaN.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import LabError


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError about `path` into a LabError of one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise LabError(f"cannot write {path}: {reason}; nothing was left half-written") from error


def disk_fault(error: BaseException) -> OSError | None:
    """The OSError that `error` is, or that a library tells of in words of its own; None for any other error.

    safetensors writes the number into its message; torch's archive writer tells only that it could not go on.
    """
    if isinstance(error, OSError):
        return error
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"\(os error (\d+)\)", str(error))):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    torch_writer = r"PytorchStreamWriter|unexpected pos|open file failed|iostream error"
    if isinstance(error, RuntimeError) and re.search(torch_writer, str(error)):
        return OSError(errno.EIO, "the disk is full or fails")
    return None


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Turns a full, failing or read-only disk that the block meets below `folder` into a LabError of one line.

    Any other OSError passes: a file that is not there is no fault of the disk.
    """
    try:
        yield
    except Exception as error:
        fault = disk_fault(error)
        if fault is None or fault.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        raise LabError(f"cannot write {fault.filename or f'in {folder}'}: {fault.strerror}") from error


def fsync_folder(folder: Path) -> None:
    """Makes renames and new names inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Makes the bytes of `path`, written by any library, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: non-finite floats become None, paths strings, other scalars floats."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    number = float(value)
    return number if math.isfinite(number) else None


def dumps(value: Any, indent: int | None = None) -> str:
    """Valid JSON in ASCII; see `plain` for what becomes of numbers that JSON cannot hold."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in one step."""
    write_bytes(path, text.encode("utf-8", errors="replace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` in one step: temporary sibling, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as indented JSON, in one step."""
    write_text(path, dumps(value, indent=2) + "\n")


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Replaces `path` by one JSON line a row, in one step."""
    write_text(path, "".join(dumps(row) + "\n" for row in rows))


def append_rows(path: Path, rows: Iterable[Any]) -> None:
    """Appends one JSON line a row and fsyncs; where the disk is full the file keeps its former length."""
    data = "".join(dumps(row) + "\n" for row in rows).encode("ascii")
    with disk_errors(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            length = os.fstat(handle).st_size
            try:
                while data:
                    data = data[os.write(handle, data) :]
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, length)
                raise
        finally:
            os.close(handle)


def append_line(path: Path, row: Any) -> None:
    """Appends one JSON line and fsyncs."""
    append_rows(path, [row])


def grown(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects that a file of lines has from byte `start` on, and where those begin that are yet to come.

    What follows the last line's end is still being written. An absent file is empty; one that a resume has cut is read
    from its beginning.
    """
    try:
        with path.open("rb") as log:
            start = start if start <= log.seek(0, os.SEEK_END) else 0
            log.seek(start)
            whole = log.read().rpartition(b"\n")[0]
    except OSError:
        return [], start
    return [json.loads(line) for line in whole.splitlines()], start + len(whole) + bool(whole)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; a line that a kill tore is left out, an absent file is empty."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row
