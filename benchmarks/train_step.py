"""Training throughput of `sft` and `classify` beside the usual Trainer script: the same model, LoRA and reviews.

One JSON line a row: `ours_s` and `peer_s` are seconds per 10,000 tokens that are not padding, medians of alternating
runs; `ours_gb` and `peer_gb` the most memory that was in use (on a GPU).
The usual script cuts each review at a length, pads it (sft: to that length; classify: to the longest of its batch) and
draws batches at random; the lab packs (sft) or batches by length (classify). `sft` has two or three peers: the script
as it is mostly found, batches of 4 x 128, one of 64 x 128, and one with the tokens of our batch where that is another.

Both sides log every ten steps, as a training of 500 steps or more does.

    python benchmarks/train_step.py --device cpu|cuda [--steps 9|33] [--rounds 5] [--no-peer]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

from peftlab.config import load_config
from peftlab.data.collate import collate_language
from peftlab.data.sources import load_records
from peftlab.models.adapters import adapter_parameters, attach
from peftlab.models.backbone import load_backbone
from peftlab.models.quick_layers import quicken_layers
from peftlab.recipes import classify, sft
from peftlab.runs.checkpoint import CheckpointStore
from peftlab.training.arguments import training_arguments
from peftlab.training.quick_passes import quick_passes
from peftlab.training.trainer import LabTrainer

UNIT = 10_000
WARM_UP = 3  # steps: the first is slow everywhere, and the second is captured where passes are


@dataclass
class Clock(TrainerCallback):
    """Seconds and tokens of the steps after WARM_UP."""

    device: str
    peak: int = 0
    tokens: list[int] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.device == "cuda":
            if state.global_step in (WARM_UP, args.max_steps):  # else the host may go on, as it does in a training
                torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        self.stamps.append(time.perf_counter())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def seconds(self) -> float:
        return UNIT * (self.stamps[-1] - self.stamps[WARM_UP - 1]) / sum(self.tokens[WARM_UP : len(self.stamps)])


def counting(collate: Callable[[Any], Any], clock: Clock, pad_id: int) -> Callable[[Any], Any]:
    """The collator, with each batch's tokens that are not padding noted."""

    def counted(rows: Any) -> Any:
        batch = collate(rows)
        clock.tokens.append(int((batch["input_ids"] != pad_id).sum()))
        return batch

    return counted


def ours(model: Any, config: Any, rows: Sequence[Any], collate: Callable[[Any], Any], pad_id: int, loss: Any) -> Clock:
    """One short training with the lab's trainer."""
    clock = Clock(next(model.parameters()).device.type)
    with tempfile.TemporaryDirectory() as folder:
        trainer = LabTrainer(
            model, arguments_of(config, rows), rows, [len(row["input_ids"]) for row in rows],
            counting(collate, clock, pad_id), CheckpointStore(Path(folder)), lambda metrics, step: None, lambda: None,
            loss,
        )
        trainer.stopper.progress.show = lambda *_: None  # type: ignore[method-assign]
        trainer.add_callback(clock)
        with nullcontext() if loss else quick_passes(model):
            trainer.fit(None)
    return clock


def usual(model: Any, config: Any, rows: Sequence[Any], collate: Callable[[Any], Any], pad_id: int) -> Clock:
    """One short training with transformers' Trainer as it comes."""
    clock = Clock(next(model.parameters()).device.type)
    arguments = arguments_of(config, rows)
    arguments.save_strategy = "no"
    trainer = Trainer(model, arguments, train_dataset=list(rows), data_collator=counting(collate, clock, pad_id))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    return clock


def arguments_of(config: Any, rows: Sequence[Any]) -> Any:
    """Those of a longer training: a log, for which the host waits, every ten steps."""
    arguments = training_arguments(config, len(rows))
    arguments.logging_steps = 10
    return arguments


def base_of(what: str, device: str) -> Any:
    """The model: what is bundled or pulled, and GPT-2's 124M with random weights on a GPU (speed is not in them)."""
    if what == "classify":
        return load_backbone("minilm-distilbert", "classifier", device=device)
    backbone = load_backbone("tiny-gpt2", device=device)
    if device == "cuda":
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(pad_token_id=backbone.tokenizer.pad_token_id)).requires_grad_(False)
        return type(backbone)("gpt2-124m-random", quicken_layers(model).to("cuda"), backbone.tokenizer, "")
    return backbone


def measure(what: str, device: str, steps: int, rounds: int, peers: bool) -> list[dict[str, Any]]:
    """The rows of one recipe."""
    module, shipped = (sft, "gpt2-imdb") if what == "sft" else (classify, "classify-distilbert")
    overrides = [f"device={device}", f"max_steps={steps}", "train_limit=2000", "lora.r=16", "lora.alpha=32"]
    overrides += ["lora.dropout=0"] + (["batch_size=8"] if device == "cpu" else [])
    config = load_config(module.CONFIG, shipped, overrides)
    backbone = base_of(what, device)
    tokenizer, pad_id = backbone.tokenizer, backbone.tokenizer.pad_token_id
    kind = "classifier" if what == "classify" else "causal"
    model = attach(backbone.model, config.lora, "policy", kind)
    for parameter in adapter_parameters(model, "policy").values():
        parameter.requires_grad_(True)
    records = load_records("imdb:train", what, 2000).records
    rows = module.rows_of(records, tokenizer, config)
    texts = [record.text for record in records]
    if what == "sft":
        loss, collate = None, lambda batch: collate_language(batch, pad_id)
        length, per_batch = 128, max(4, config.batch_size * config.max_length // 128)
        scripts = {f"Trainer, {batch} x 128 padded": batch for batch in sorted({4, 64, per_batch})}
        peer_collate: Any = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        encoded = tokenizer(texts, truncation=True, max_length=length, padding="max_length")
        peer_rows = [{"input_ids": i, "attention_mask": m} for i, m in zip(*encoded.values(), strict=True)]
    else:
        loss = lambda output, labels: torch.nn.functional.cross_entropy(output.logits.float(), labels)  # noqa: E731
        collate = lambda batch: classify._collate(batch, pad_id)  # noqa: E731
        scripts = {"Trainer, random batches": config.batch_size}
        peer_collate = DataCollatorWithPadding(tokenizer)
        encoded = tokenizer(texts, truncation=True, max_length=config.max_length)
        peer_rows = [
            {"input_ids": i, "attention_mask": m, "labels": r.label}
            for i, m, r in zip(encoded["input_ids"], encoded["attention_mask"], records, strict=True)
        ]
    mine, theirs = [], {name: [] for name in scripts} if peers else {}
    for _ in range(rounds):
        clock = ours(model, config, rows, collate, pad_id, loss)
        mine.append(clock)
        for name, batch in scripts.items() if peers else ():
            theirs[name].append(usual(model, config.with_(batch_size=batch), peer_rows, peer_collate, pad_id))
    row = {
        "what": f"{what}_step", "device": device, "dtype": "bfloat16" if device == "cuda" else "float32",
        "model": backbone.name, "batch": config.batch_size, "tokens": round(statistics.median(mine[0].tokens)),
        "ours_s": round(statistics.median(clock.seconds() for clock in mine), 4),
    }
    if not theirs:
        return [row]
    result = []
    for name, clocks in theirs.items():
        seconds = round(statistics.median(clock.seconds() for clock in clocks), 4)
        beside = {"peer": name, "peer_s": seconds, "ratio": round(seconds / row["ours_s"], 2)}
        memory = {"ours_gb": gigabytes(mine), "peer_gb": gigabytes(clocks)} if device == "cuda" else {}
        result.append(row | beside | memory)
    return result


def gigabytes(clocks: Sequence[Clock]) -> float:
    """The most memory of any run, in GB."""
    return round(max(clock.peak for clock in clocks) / 1e9, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="9; 33 on a GPU, whose pipeline takes some to fill")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true")
    given = parser.parse_args()
    steps = {"cpu": 9, "cuda": 33}[given.device] if given.steps is None else given.steps
    if steps <= WARM_UP:
        parser.error(f"--steps: {WARM_UP} warm up and are not counted; give more")
    for what in ("sft", "classify"):
        for row in measure(what, given.device, steps, given.rounds, not given.no_peer):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
