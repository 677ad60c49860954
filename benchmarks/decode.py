"""Decoding of the lab beside transformers' `generate`: the same prompts, lengths, weights and dtype, in one process.

One JSON line a row: `ours_s` and `peer_s` are medians of alternating runs, `ours_gb` and `peer_gb` the most memory in
use, weights of both copies included (on a GPU); `warm_s` is our first two runs, graphs captured, and `refresh_s` what
merging an updated LoRA takes. `ratio_error` is the largest |exp(log p of the policy's full forward - log p of sampling)
- 1| over the tokens of one run: invariant/first_ratio_error, with a LoRA that acts. Peers: `generate` with the LoRA
attached ("live"), and on merged weights. Random weights where a name says so: speed is not in them.

    python benchmarks/decode.py --device cpu|cuda [--peer [live] [merged]] [--rounds 5] [--models ...] [--dtypes ...]
                                [--batches ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftlab.models.adapters import Lora
from peftlab.models.backbone import Backbone, load_backbone
from peftlab.models.roles import Roles
from peftlab.ops.logprobs import token_logprobs
from peftlab.sampling.sampler import Decoding, Sampler, Samples

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from work import random_model

RANDOM = {"gpt2-124m-random": "gpt2-arch", "smollm2-135m-random": "smollm2-arch"}
MODELS = {"cpu": ["tiny-gpt2"], "cuda": ["tiny-gpt2", *RANDOM]}
DTYPES = {"cpu": ["float32"], "cuda": ["bfloat16", "tf32", "float32"]}
BATCHES = {"cpu": [64], "cuda": [64, 256]}
# prompt tokens, new tokens
LENGTHS = {"cpu": (8, 24), "cuda": (32, 64)}
PEERS = ["live", "merged"]


@dataclass
class Timed:
    """A program, the seconds of its runs, and the most memory in use in GB."""

    run: Callable[[], Any]
    device: str
    seconds: list[float] = field(default_factory=list)
    gigabytes: float = 0.0

    def warm(self, runs: int) -> float:
        """Run it untimed; returns the seconds that took."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(runs):
            self.time()
        if self.device == "cuda":
            self.gigabytes = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        total = sum(self.seconds)
        self.seconds.clear()
        return total

    def time(self) -> None:
        begin = time.perf_counter()
        self.run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - begin)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def base_of(name: str, device: str, dtype: str) -> Backbone:
    """The model, frozen, with a tokenizer that only says which token pads and which one ends."""
    backbone = load_backbone("tiny-gpt2", device=device, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    if name == "tiny-gpt2":
        return backbone
    model = random_model(RANDOM[name], backbone.model.dtype).to(device).requires_grad_(False).eval()
    return Backbone(name, model, backbone.tokenizer, "")


@torch.no_grad()
def ratio_error(roles: Roles, samples: Samples) -> float:
    """The largest |ratio - 1| over counted tokens, 64 rows at a time."""
    width, worst = samples.completion_ids.shape[1], 0.0
    for rows in torch.arange(len(samples.ids)).split(64):
        logits = roles.policy(samples.ids[rows], samples.mask[rows], width)
        again = token_logprobs(logits, samples.completion_ids[rows])
        errors = torch.expm1(again - samples.logprobs[rows]).abs() * samples.completion_mask[rows]
        worst = max(worst, float(errors.max()))
    return worst


def measure(name: str, device: str, dtype: str, batch: int, rounds: int, peers: list[str]) -> list[dict[str, Any]]:
    """The rows of one model, dtype and batch."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.manual_seed(0)
    prompt, new = LENGTHS[device]
    roles = Roles(base_of(name, device, dtype), Lora(r=16, alpha=32), critic="none")
    with torch.no_grad():
        for key, parameter in roles.policy_parameters().items():
            if "lora_B" in key:
                parameter.normal_(0, 0.01)
    roles.refresh()
    sampler = Sampler(roles.twin, roles.tokenizer)
    sampler.eos_id = None  # as many tokens as the peer, which is told to make no end
    vocabulary = roles.twin.config.vocab_size
    ids = torch.randint(5, vocabulary - 5, (batch, prompt), generator=torch.Generator().manual_seed(0))
    prompts, seeds, on_device = ids.tolist(), list(range(batch)), ids.to(device)
    options = {"do_sample": True, "top_k": 0, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    options["use_cache"] = True  # tiny-gpt2's generation_config.json says otherwise

    @torch.inference_mode()
    def generate(model: Any) -> Any:
        return model.generate(input_ids=on_device, attention_mask=torch.ones_like(on_device), **options)

    models = {"live": roles.model, "merged": roles.twin}
    theirs = {peer: Timed(lambda model=models[peer]: generate(model), device) for peer in peers}
    for timed in theirs.values():
        timed.warm(1)
    mine = Timed(lambda: sampler.sample(prompts, seeds, Decoding(new)), device)
    warm_s = mine.warm(2)  # a kind of step is called first, then captured
    error = ratio_error(roles, sampler.sample(prompts, seeds, Decoding(new)))
    refresh = Timed(roles.refresh, device)
    for _ in range(rounds):
        for timed in [mine, refresh, *theirs.values()]:
            timed.time()
    row = {
        "what": "decode", "device": device, "machine": machine(device), "dtype": dtype, "model": name, "batch": batch,
        "tokens": batch * new, "ours_s": round(mine.median, 4), "ours_tok_s": round(batch * new / mine.median),
        "warm_s": round(warm_s, 2), "refresh_s": round(refresh.median, 4), "ratio_error": float(f"{error:.1e}"),
    }  # fmt: skip
    if device == "cuda":
        row["ours_gb"] = mine.gigabytes
    rows = []
    for peer, timed in theirs.items():
        beside = {"peer": f"transformers generate, {peer} LoRA", "peer_s": round(timed.median, 4)}
        beside |= {"peer_tok_s": round(batch * new / timed.median), "ratio": round(timed.median / mine.median, 2)}
        rows.append(row | beside | ({"peer_gb": timed.gigabytes} if device == "cuda" else {}))
    return rows or [row]


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peer", nargs="*", choices=PEERS, help="transformers' generate beside ours (no name: both)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS["cuda"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES["cuda"])
    parser.add_argument("--batches", nargs="+", type=int)
    given = parser.parse_args()
    peers = [] if given.peer is None else given.peer or PEERS
    for name in given.models or MODELS[given.device]:
        for dtype in given.dtypes or DTYPES[given.device]:
            for batch in given.batches or BATCHES[given.device]:
                for row in measure(name, given.device, dtype, batch, given.rounds, peers):
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
