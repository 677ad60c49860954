"""What each process of tests/test_ranks.py runs: the jobs of a file of JSON, one after the other.

A job is {"verb", "pairs", "run", "port"}, with "resume", and with "stop": so many steps later the last process is asked
to stop.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch

from peftlab.recipes.launch import launch
from peftlab.runs.progress import Progress
from peftlab.runs.rundir import RunDir


def main() -> None:
    torch.set_num_threads(1)
    Progress.quiet = True
    last = int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"])
    for job in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(job["port"])
        asked = itertools.count(1)
        stop = job.get("stop") if last else None
        requested = property(lambda _, n=asked, s=stop: signal.SIGTERM if next(n) == s else None)
        with mock.patch.object(RunDir, "stop_requested", requested):
            try:
                launch(job["verb"], None, job["pairs"], Path("runs"), job["run"], job.get("resume", False))
            except Exception as error:  # a reward's own is not turned into one of the lab's
                print(f"{job['run']}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
