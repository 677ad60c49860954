"""What a name may be made of: that of a run, a persona, a part of a reward."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")  # to be matched whole
