"""Memory of PPO with a reward model, beside TRL 1.12's: bytes that each role holds, and the most that a step takes.

One JSON line a row. Ours is one base, on which policy, critic and reward model are LoRAs and heads, and a merged copy
that samples; `ours_bytes` and `peer_bytes` are the bytes of each role's own tensors, before the first step. `ours_gb`
and `peer_gb` are the most memory in use in any step: of tensors on a GPU, resident on a CPU, libraries included. The
rest is as in ppo_step.py, whose --peer-site this takes as well.

    python benchmarks/memory.py --device cpu|cuda [--peer] [--model ...] [--rounds 1]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from beside import Peer, arguments, jobs_of, rows


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=1)
    given = parser.parse_args()
    for job in jobs_of(given, "ppo", reward="model"):
        for row in rows("memory", job, [Peer("trl_ppo", "trl-1.12", "ppo")], given):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
