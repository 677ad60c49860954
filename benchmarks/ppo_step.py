"""A step of PPO and one of RLOO beside TRL's: one model, LoRA, prompts and lengths, and a reward that costs nothing.

One JSON line a row. `ppo_update`: rollout, scoring and all epochs of PPO, beside TRL 1.12's; `pg_step`: the same of
RLOO, four completions a prompt and one optimizer step, beside TRL 1.16's RLOO and GRPO. `ours_s` and `peer_s` are
medians of steps that alternate, `ours_rollout_s` the part of ours that samples and scores; `ours_gb` and `peer_gb` the
most memory in use in any step: of tensors on a GPU, resident on a CPU, libraries included. `tokens` are the step's.
`ratio_error` is invariant/first_ratio_error of our dtype. The critic of ours is a head on the policy's states, our
default; TRL's is a model of its own. gpt2-arch and smollm2-arch are GPT-2 124M and SmolLM2 135M with random weights.

--peer has pip install what benchmarks/peers/*.txt pins and is not installed into .venv-peers, once. Where there is no
package index: --peer-site FOLDER, with the two TRLs unpacked in FOLDER/trl-1.12 and FOLDER/trl-1.16, and in FOLDER
itself the wheels that both lack (as `pip install --no-deps --target` leaves them). --ranks: ours in so many processes,
whose memory is added up.

    python benchmarks/ppo_step.py --device cpu|cuda [--peer] [--what ppo_update] [--model ...] [--rounds 5] [--epochs 4]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from beside import Peer, arguments, jobs_of, rows

ROWS = {
    "ppo_update": ("ppo", [Peer("trl_ppo", "trl-1.12", "ppo")]),
    "pg_step": ("rloo", [Peer("trl_pg", "trl-1.16", "rloo"), Peer("trl_pg", "trl-1.16", "grpo")]),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--what", nargs="+", choices=ROWS, default=list(ROWS))
    given = parser.parse_args()
    for what in given.what:
        algorithm, peers = ROWS[what]
        for job in jobs_of(given, algorithm):
            for row in rows(what, job, peers, given):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
