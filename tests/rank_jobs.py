"""What each process of tests/test_ranks.py runs: the jobs of a file of JSON, one after the other.

A job is {"verb", "pairs", "run"}, with "resume", with "stop": so many steps later the last process is asked to stop,
and with "last": further pairs of the last process. The processes meet in a file, not at a port that another program may
take meanwhile.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from peftlab.recipes.launch import launch
from peftlab.runs.progress import Progress
from peftlab.runs.rundir import RunDir


def main() -> None:
    torch.set_num_threads(1)
    Progress.quiet = True
    last = int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"])
    meet, told = dist.init_process_group, Path(sys.argv[1])
    for number, job in enumerate(json.loads(told.read_text())):
        place = {"init_method": told.with_name(f"meet{number}").as_uri()}
        place |= {name: int(os.environ[name.upper()]) for name in ("rank", "world_size")}
        asked = itertools.count(1)
        stop = job.get("stop") if last else None
        requested = property(lambda _, n=asked, s=stop: signal.SIGTERM if next(n) == s else None)
        patched = mock.patch.object(dist, "init_process_group", functools.partial(meet, **place))
        pairs = job["pairs"] + (job.get("last", []) if last else [])
        with mock.patch.object(RunDir, "stop_requested", requested), patched:
            try:
                launch(job["verb"], None, pairs, Path("runs"), job["run"], job.get("resume", False))
            except Exception as error:  # a reward's own is not turned into one of the lab's
                print(f"{job['run']}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
