"""Checkpoints: whole or absent, and only a verified one is resumed from."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlab.errors import LabError
from peftlab.runs.checkpoint import MANIFEST, CheckpointStore, verify_manifest, write_manifest


def save(store, step, text="weights"):
    with store.stage(step) as folder:
        (folder / "state.bin").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "tokenizer.json").write_text("{}")


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_the_newest_are_kept_and_verified(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.newest_verified() == (None, [])
    for step in (5, 10, 123):
        save(store, step)
    assert names(store) == ["step-00000010", "step-00000123"]
    newest, skipped = store.newest_verified()
    assert (newest.step, newest.path.name, skipped) == (123, "step-00000123", [])
    listed = json.loads((newest.path / MANIFEST).read_text())["files"]
    assert listed.keys() == {"state.bin", "inner/tokenizer.json", "logs.json"}


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_a_failed_stage_leaves_nothing_and_harms_nothing(tmp_path, error):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    expected = LabError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), store.stage(2) as folder:
        (folder / "state.bin").write_text("half")
        raise error
    assert names(store) == ["step-00000001"]
    assert store.newest_verified()[0].step == 1


def test_what_a_kill_leaves_is_cleaned_or_put_back(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2)
    (tmp_path / ".staging-00000003-99").mkdir()
    (tmp_path / ".staging-00000003-99" / "state.bin").write_text("half")
    (tmp_path / "step-00000002").rename(tmp_path / ".replaced-step-00000002")  # killed between two renames
    store.clean()
    assert names(store) == ["step-00000001", "step-00000002"]
    assert store.newest_verified()[0].step == 2


def test_a_spoilt_checkpoint_is_skipped_with_its_reason(tmp_path):
    store = CheckpointStore(tmp_path, keep=5)
    for step in range(1, 6):
        save(store, step)
    (tmp_path / "step-00000005" / MANIFEST).unlink()
    (tmp_path / "step-00000004" / "state.bin").write_text("WEIGHTS")
    (tmp_path / "step-00000003" / "inner" / "tokenizer.json").unlink()
    (tmp_path / "step-00000002" / "state.bin").write_text("more than there was")
    newest, skipped = store.newest_verified()
    assert newest.step == 1
    assert skipped == [
        "step-00000005: manifest.json is missing",
        "step-00000004: state.bin does not match its sha256",
        "step-00000003: inner/tokenizer.json is missing",
        "step-00000002: state.bin has 19 bytes, not 7",
    ]


def test_a_resume_leaves_the_abandoned_future_behind(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 50)
    save(store, 100)
    (tmp_path / "step-00000100" / "state.bin").write_text("spoilt!")
    save(store, 60)
    assert names(store) == ["step-00000050", "step-00000060"]


def test_a_step_that_is_reached_again_is_replaced(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1, "first")
    save(store, 1, "second")
    assert (store.newest_verified()[0].path / "state.bin").read_text() == "second"
    assert names(store) == ["step-00000001"]


def test_manifests_of_strangers_open_nothing_outside(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights").write_text("w")
    write_manifest(adapter)
    manifest = json.loads((adapter / MANIFEST).read_text())
    manifest["files"]["../secret"] = manifest["files"]["weights"]
    (adapter / MANIFEST).write_text(json.dumps(manifest))
    assert verify_manifest(adapter) == ["../secret is missing"]
    write_manifest(adapter)
    (adapter / "weights").unlink()
    (adapter / "weights").symlink_to(secret)
    assert verify_manifest(adapter) == ["weights is not a plain file"]


def test_unlisted_files_are_named_and_dot_files_are_let_be(tmp_path):
    (tmp_path / "weights").write_text("w")
    write_manifest(tmp_path)
    (tmp_path / ".DS_Store").write_text("x")
    assert verify_manifest(tmp_path) == []
    (tmp_path / "extra.bin").write_text("x")
    assert verify_manifest(tmp_path) == ["extra.bin is not in manifest.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"schema_version": 2, "files": {}}',
        '{"schema_version": 1, "files": []}',
        '{"schema_version": 1, "files": {"w": 3}}',
        '{"schema_version": 1, "files": {"w": {"sha256": 1}}}',
        "\x00",
        "[" * 100_000,
    ],
)
def test_malformed_manifests_are_problems_not_tracebacks(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    assert len(verify_manifest(tmp_path)) == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    (folder / "weights").write_bytes(bytes(range(64)))
    write_manifest(folder)
    return folder


@given(position=st.integers(0, 63), bit=st.integers(0, 7))
def test_any_flipped_bit_is_seen(saved, tmp_path_factory, position, bit):
    copy = tmp_path_factory.mktemp("copy") / "adapter"
    shutil.copytree(saved, copy)
    data = bytearray((copy / "weights").read_bytes())
    data[position] ^= 1 << bit
    (copy / "weights").write_bytes(data)
    assert verify_manifest(copy) == ["weights does not match its sha256"]
