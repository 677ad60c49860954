"""The chat's `/adapter` and `/mix`: what it takes to make another adapter act, and what adapters cost each token.

One JSON line a model: `switch_ms` and `mix_ms` are medians over switches among two loaded LoRAs (random weights of rank
16 on all linear layers: speed is not in them), `most_ms` the slowest of all; `off_ms`, `one_ms` and `two_ms` are
milliseconds a token of a reply, batch 1, while none, one and both act; `merged_ms` is the same with one merged.

    python benchmarks/chat_switch.py [--models tiny-gpt2 smollm2-135m] [--device cpu|cuda] [--rounds 50]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from peftlab.chat.voices import Cast
from peftlab.models.adapter_files import load_stack, save_adapter
from peftlab.models.adapters import Lora, attach
from peftlab.models.backbone import load_backbone
from peftlab.models.stacks import Stack
from peftlab.sampling.sampler import Decoding, Sampler

TOKENS = 32


def random_adapter(base: str, folder: Path, seed: int) -> str:
    """A LoRA of rank 16 whose deltas are small and not 0."""
    backbone = load_backbone(base, device="cpu")
    model = attach(backbone.model, Lora(r=16, alpha=32), "policy", base=base)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 1e-3)
    return str(save_adapter(model, "policy", folder, Stack("causal", base, backbone.fingerprint)))


def milliseconds(work: Callable[[], object], device: str) -> float:
    """Of one call, what it started on the device included."""
    begun = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) * 1e3


def measure(base: str, device: str, rounds: int) -> dict[str, object]:
    """One row."""
    with tempfile.TemporaryDirectory() as place:
        one, two = (random_adapter(base, Path(place) / str(seed), seed) for seed in (1, 2))
        cast = Cast(device)
        mixer = cast.stack(one).mixer
        assert mixer is not None
        mixer.mix({one: 1.0, two: 1.0})
        merged = load_stack(one, device=device)[0]
    samplers = {"live": Sampler(mixer.model, mixer.tokenizer), "merged": Sampler(merged.model, merged.tokenizer)}
    turns = itertools.cycle([one, two])
    switches = [milliseconds(lambda: cast.stack(next(turns)).act(), device) for _ in range(rounds)]
    mixes = [milliseconds(partial(mixer.use, {one: i / rounds, two: 0.5}), device) for i in range(rounds)]

    def token(sampler: str, weights: dict[str, float]) -> float:
        mixer.use(weights)
        reply = partial(samplers[sampler].sample, [[5, 6, 7]], [0], Decoding(TOKENS))
        reply()
        return statistics.median(milliseconds(reply, device) / TOKENS for _ in range(5))

    row: dict[str, object] = {
        "what": "chat_switch",
        "device": device,
        "dtype": "float32",
        "model": base,
        "batch": 1,
        "tokens": TOKENS,
        "switch_ms": statistics.median(switches),
        "mix_ms": statistics.median(mixes),
        "most_ms": max(switches + mixes),
        "off_ms": token("live", {}),
        "one_ms": token("live", {one: 1.0}),
        "two_ms": token("live", {one: 0.5, two: 0.5}),
        "merged_ms": token("merged", {}),
    }
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-gpt2", "smollm2-135m"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    for model in options.models:
        print(json.dumps(measure(model, options.device, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
