"""Where runs are, and what a name may be made of: that of a run, a persona, a part of a reward."""

from __future__ import annotations

import re
from pathlib import Path

RUNS = Path("runs")  # in the folder that a command is called in

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")  # to be matched whole
