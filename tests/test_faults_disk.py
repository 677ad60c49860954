"""A disk that fails: at every write, flush and rename of a checkpoint, full at many sizes, read-only, or gone."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import itertools
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import peftlab
from safetensors.torch import save_file

from peftlab.errors import LabError
from peftlab.recipes.launch import launch
from peftlab.runs import checkpoint as checkpoints
from peftlab.runs.checkpoint import CheckpointStore, verify_manifest, whole_folder, write_manifest
from peftlab.runs.rundir import RunDir

pytestmark = pytest.mark.usefixtures("one_thread")


class Written:
    """An open file whose writes go through the layer."""

    def __init__(self, file: Any, meet: Callable[[], None]) -> None:
        self.file, self.meet = file, meet

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def write(self, data: Any) -> Any:
        self.meet()
        return self.file.write(data)


@contextlib.contextmanager
def layer(meet: Callable[[], None]) -> Iterator[None]:
    """Calls `meet` before each operation that changes the disk, by Python's own means."""

    def before(real: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            meet()
            return real(*args, **kwargs)

        return wrapped

    def opening(real: Any) -> Any:
        def wrapped(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode[0] not in "wax":
                return real(file, mode, *args, **kwargs)
            meet()
            return Written(real(file, mode, *args, **kwargs), meet)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "rename", "replace", "mkdir", "write"):
            patch.setattr(os, name, before(getattr(os, name)))
        patch.setattr(io, "open", opening(io.open))
        patch.setattr(builtins, "open", opening(builtins.open))
        yield


def save(store: CheckpointStore, step: int, number: float) -> None:
    """A checkpoint with a file by each of the writers that the recipes use."""
    with store.stage(step) as folder:
        torch.save({"number": number}, folder / "state.pt")
        save_file({"number": torch.tensor([number])}, folder / "trained.safetensors")
        (folder / "inner").mkdir()
        (folder / "inner" / "state.json").write_text(json.dumps(number))


def numbers(folder: Path) -> set[float]:
    return {torch.load(folder / "state.pt")["number"], json.loads((folder / "inner" / "state.json").read_text())}


def assert_sound(store: CheckpointStore, before: dict[int, float], step: int, failed: bool) -> None:
    """A whole checkpoint that is the one before or the new one; then the store works as ever."""
    found, skipped = store.newest_verified()
    assert [name.partition(":")[0] for name in skipped] in ([], [store.path(SPOILT).name])
    assert sorted(path.name for path in store.folder.iterdir()) == [store.path(s).name for s in store.steps()]
    (number,) = numbers(found.path)
    assert number in ({before.get(found.step), 2.0} if failed else {2.0})
    save(store, step, 3.0)
    assert numbers(store.newest_verified()[0].path) == {3.0}


SPOILT = 9  # a step that no longer verifies, and so was passed over
# Steps that are there, then the one that is written: beside another, in its place, with one to prune, or before one.
HISTORIES = [((5,), 7), ((7,), 7), ((5, 6, 7), 8), ((5, SPOILT), 7)]


def history_of(folder: Path, steps: tuple[int, ...]) -> CheckpointStore:
    store = CheckpointStore(folder, keep=3)
    for step in steps:
        save(store, step, float(step))
    if SPOILT in steps:
        (store.path(SPOILT) / "state.pt").write_bytes(b"")
    return store


@pytest.mark.parametrize(("history", "step"), HISTORIES)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_at_any_operation_leaves_a_whole_checkpoint(tmp_path, history, step, number):
    for k in itertools.count(1):
        store = history_of(tmp_path / str(k), history)
        counted = itertools.count(1)

        def meet(k=k, counted=counted):
            if next(counted) == k:
                raise OSError(number, os.strerror(number))

        failed = False
        with layer(meet):
            try:
                save(store, step, 2.0)
            except LabError as error:
                failed = True
                assert os.strerror(number) in str(error) and "\n" not in str(error)
        assert_sound(store, {old: float(old) for old in history}, step, failed)
        shutil.rmtree(store.folder)
        if next(counted) <= k:  # all operations of a save were met
            break
    assert k > 15


@pytest.mark.parametrize(("history", "step"), HISTORIES)
def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(tmp_path, history, step):
    for k in itertools.count(1):
        store = history_of(tmp_path / str(k), history)
        counted = itertools.count(1)

        def meet(k=k, counted=counted):
            if next(counted) == k:
                os.kill(os.getpid(), signal.SIGKILL)

        pid = os.fork()
        if pid == 0:
            with layer(meet):
                save(store, step, 2.0)
            os._exit(0)
        killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
        store.clean()  # what every run does first
        assert_sound(store, {old: float(old) for old in history}, step, killed)
        shutil.rmtree(store.folder)
        if not killed:
            break
    assert k > 15


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "adapter"

    def write(text: str) -> None:
        with whole_folder(folder) as place:
            (place / "weights").write_text(text)
            write_manifest(place)

    write("old")
    for k in itertools.count(1):
        counted = itertools.count(1)

        def meet(k=k, counted=counted):
            if next(counted) == k:
                raise OSError(errno.ENOSPC, "No space left on device")

        with layer(meet), contextlib.suppress(OSError, LabError):
            write("new")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
        assert verify_manifest(folder) == [] and (folder / "weights").read_text() in ("old", "new")
        if next(counted) <= k:
            break
    assert (folder / "weights").read_text() == "new"
    folder.rename(tmp_path / ".replaced-adapter")  # as a kill between the two renames leaves it
    with contextlib.suppress(ZeroDivisionError), whole_folder(folder):
        1 / 0  # noqa: B018
    assert (folder / "weights").read_text() == "new"
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("keep me")
    with pytest.raises(LabError, match="holds other files"), whole_folder(tmp_path / "letters"):
        pass
    assert (tmp_path / "letters" / "mine.txt").read_text() == "keep me"


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("disk")
    shop = tiny.workshop(root) | {"root": str(root)}
    (root / "disk_rewards.py").write_text(
        "def count_e(prompts, completions, records):\n    return [float(c.count('e')) for c in completions]\n"
    )
    launch("classify", None, tiny.overrides(shop, "classify"), root, "judge")
    return shop


def words(shop: dict[str, str], verb: str, run: str) -> str:
    rl = ["steps=3", "reward=disk_rewards:count_e", f"judge={shop['root']}/judge"]
    pairs = rl if verb == "ppo" else ["max_steps=3"]
    return shlex.join([verb, *tiny.overrides(shop, verb, "save_every=1", *pairs), "--run", run])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.7, 0.99])
@pytest.mark.parametrize("verb", ["sft", "ppo"])
def test_a_file_that_may_not_grow_stops_the_run_and_spares_its_checkpoints(shop, monkeypatch, verb, share):
    """A limit of the kernel's on the size of files, from the third checkpoint on: each library meets it in its way."""
    monkeypatch.chdir(shop["root"])
    run, stage = Path("runs") / f"{verb}-{share}", CheckpointStore.stage

    @contextlib.contextmanager
    def limited(self, step):
        if step == 3:
            largest = max(path.stat().st_size for path in self.path(2).rglob("*") if path.is_file())
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), resource.RLIM_INFINITY))
        with stage(self, step) as folder:
            yield folder

    try:
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointStore, "stage", limited)
            ended = peftlab(words(shop, verb, run.name))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith(f"peftlab: cannot write checkpoint {run}/checkpoints/step-00000003: ")
    store = RunDir(run, run.name, verb, resumed=False).checkpoints
    found, skipped = store.newest_verified()
    assert (found.step, skipped, store.steps()) == (2, [], [1, 2])
    assert not (run / "adapter").exists()
    resumed = peftlab(words(shop, verb, run.name) + " --resume")
    assert resumed.code == 0, resumed.err


def test_a_base_that_vanished_is_one_line_and_its_run_goes_on_once_it_is_back(shop, monkeypatch):
    monkeypatch.chdir(shop["root"])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_manifest", full)
        assert peftlab(words(shop, "sft", "vanished")).code == 1
    base = Path(shop["gpt2"])
    base.rename(base.with_name("elsewhere"))
    gone = peftlab(words(shop, "sft", "vanished") + " --resume")
    assert gone.code == 2
    *_, message = gone.err.splitlines()
    assert message.startswith("peftlab: model") and str(base) in message and "no such folder" in message
    base.with_name("elsewhere").rename(base)
    assert peftlab(words(shop, "sft", "vanished") + " --resume").code == 0


def full(folder: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_disks_that_fill_up_and_one_that_turns_read_only():
    program = Path(__file__).parent.parent / "benchmarks" / "full_disk.py"
    done = subprocess.run([sys.executable, str(program), "--disks", "4"], capture_output=True, text=True, timeout=600)
    if "no disk can be mounted" in done.stderr:
        pytest.skip("no disk can be mounted here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"disks": 4, "one_line": 4, "intact": 4, "identical": 4}
