"""How long `peftlab data check` takes for 1,000 rows with 25 kinds of defect, the start of the program included.

Prints one JSON line: median seconds of five runs, rows, bad rows. Exit code 1 where a planted row is not reported.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = 1000
GOOD = '{"text": "A film of which one remembers the light, and the dog.", "label": 1}'
DEFECTS = [
    b'{"text": "broken',
    b'{"text": "a", "label": 1} and more',
    b"no JSON at all",
    b'["a", "list"]',
    b"null",
    b'\xef\xbb\xbf{"text": "a", "label": 1}',
    b'{"text": "a", "text": "b", "label": 1}',
    b'{"text": "caf\xe9", "label": 1}',
    b'{"text": "' + b"a" * 12_000_000 + b'", "label": 1}',
    b'{"label": 1}',
    b'{"text": "a"}',
    b'{"text": "", "label": 1}',
    b'{"text": " \\n\\t", "label": 1}',
    b'{"text": null, "label": 1}',
    b'{"text": NaN, "label": 1}',
    b'{"text": Infinity, "label": 1}',
    b'{"text": 7, "label": 1}',
    b'{"text": {"en": "a"}, "label": 1}',
    b'{"text": "a\\u0000b", "label": 1}',
    b'{"text": "\\u001b[31m", "label": 1}',
    b'{"text": "\\ud83d", "label": 1}',
    b'{"text": "a", "label": 2}',
    b'{"text": "a", "label": true}',
    b'{"text": "a", "label": "maybe"}',
    b'{"id": 1.5, "text": "a", "label": 1}',
]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        lines = [GOOD.encode()] * ROWS
        lines[20 : 20 + 30 * len(DEFECTS) : 30] = DEFECTS
        path.write_bytes(b"\n".join(lines) + b"\n")
        command = [sys.executable, "-m", "peftlab.cli", "data", "check", str(path), "--for", "classify"]
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            seconds.append(time.perf_counter() - began)
    bad = len(done.stdout.splitlines()) - 1
    median = round(statistics.median(seconds), 3)
    print(json.dumps({"what": "data_check", "device": "cpu", "rows": ROWS, "bad": bad, "seconds": median}))
    return int(done.returncode != 2 or bad != len(DEFECTS))


if __name__ == "__main__":
    sys.exit(main())
