"""Runs on disks that are too small, each in its way, and on one that turns read-only; each then resumed on a large one.

    python benchmarks/full_disk.py [--disks 20]

Each disk is a tmpfs, mounted where the run's folder will be, in a mount namespace of our own: this needs Linux, and
`unshare -rm` allowed; elsewhere it does nothing. One line a disk; the last line is JSON. Exit 0 where each fault was
told in one line, spared the checkpoints before it, and the resumed run ended as the one that nothing met.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from faults import Lab, Whole, left, prepare

from peftlab.runs.checkpoint import CheckpointStore

PAGE = 4096
ROOMY = "16m"
INSIDE = "PEFTLAB_FULL_DISK"  # set in the namespace's process


def can_mount() -> bool:
    """Whether this machine lets us mount a disk that nobody else sees."""
    trial = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
    return bool(shutil.which("unshare")) and subprocess.run(trial, capture_output=True).returncode == 0


def mount(*words: str) -> None:
    """As the program of that name."""
    subprocess.run(["mount", *words], check=True)


def told(log: Path) -> list[str]:
    """What a run said that is no line of progress."""
    return [line for line in log.read_text().splitlines() if "Traceback" in line or line.startswith("peftlab:")]


def disk(lab: Lab, whole: Whole, name: str, size: int) -> dict[str, bool]:
    """What held of a run on a disk of `size` bytes; 0: on one that turns read-only after the checkpoint of step 4."""
    run, log = lab.run(name), lab.home / f"{name}.log"
    run.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size or ROOMY}", "none", str(run))
    child = lab.start("sft", name)
    if size == 0:
        child.until((run / "checkpoints" / "step-00000004").is_dir)
        child.kill()
        mount("-o", "remount,ro", str(run))
        log.unlink()
        child = lab.start("sft", name, resume=True)
    code, lines = child.wait(), told(log)
    _, skipped = CheckpointStore(run / "checkpoints").newest_verified()
    # What the kill left on the read-only disk, no one could remove.
    half = size > 0 and any(path.name.startswith(".staging") for path in run.rglob("*"))
    mount("-o", f"remount,rw,size={ROOMY}", str(run))
    resumed = lab.start("sft", name, resume=True).wait()
    held = {
        "one_line": code in (1, 2) and len(lines) == 1,
        "intact": not skipped and not half,
        "identical": resumed == 0 and left(run) == whole.left,
    }
    print(f"{f'{size} bytes' if size else 'read-only'}: exit {code}; {' | '.join(lines)}; {held}", flush=True)
    subprocess.run(["umount", "-l", str(run)], check=True)
    return held


def main() -> int:
    """Exit code 0 where all held on each disk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--disks", type=int, default=20, help="the last one is read-only")
    disks = parser.parse_args().disks
    if not os.environ.get(INSIDE):
        if not can_mount():
            print("no disk can be mounted here", file=sys.stderr)
            return 0
        os.execvpe("unshare", ["unshare", "-rm", sys.executable, *sys.argv], {**os.environ, INSIDE: "1"})
    prepare()
    with tempfile.TemporaryDirectory(prefix="peftlab-disks-") as home:
        lab = Lab(Path(home))
        whole = lab.whole("sft")
        files = [path for path in lab.run("sft").rglob("*") if path.is_file()]
        pages = sum(-(-path.stat().st_size // PAGE) for path in files)
        # From a disk that holds a file or two to one that lacks a few pages.
        sizes = [PAGE * (2 + (pages - 4) * number // disks) for number in range(disks - 1)]
        found = [disk(lab, whole, f"sft-{number}", size) for number, size in enumerate([*sizes, 0])]
    tally = {what: sum(held[what] for held in found) for what in ("one_line", "intact", "identical")}
    print(json.dumps({"disks": disks, **tally}))
    return 0 if set(tally.values()) == {disks} else 1


if __name__ == "__main__":
    sys.exit(main())
