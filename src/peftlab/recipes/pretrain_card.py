"""The model card of a pretraining: how to make this model again, and how good it is."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from typing import Any

import torch

_WHAT = {
    "gpt2": (
        "A small GPT-2",
        "It writes English that looks like a review, and knows nothing: use it to study training, not to answer.",
        "GPT2LMHeadModel",
        "own EOS and pad tokens",
        "documents packed whole with EOS and kept apart",
        "EOS counted",
        "Samples (temperature 1, seeds 0 to 2, not picked)",
    ),
    "t5": (
        "A small T5",
        "It fills gaps in reviews and repeats their principal sentence, and knows nothing: it is a base to fine-tune.",
        "T5ForConditionalGeneration, gated GELU, tied embeddings",
        "pad, EOS, mask and 100 sentinels",
        "inputs and targets: a row of span corruption for every block, and one of gap sentences for every review; each "
        "epoch corrupts anew",
        "span corruption, sentinels and EOS counted",
        'Principal sentences (behind the prefix "summarize: ", greedy, the first three held-out reviews)',
    ),
}


@dataclass(frozen=True)
class Facts:
    """What the card reports. `metrics` are of the rounded weights; `tokens` are of one epoch."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    tokens: int
    seconds: float
    parameters: int
    steps: int


def card(config: Any, facts: Facts, texts: list[str]) -> str:
    """The card as Markdown."""
    name, use, architecture, special, rows, counted, heading = _WHAT[config.architecture]
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    keys = json.dumps(config.model_dump(exclude={"recipe", "device"}))
    quoted = "\n".join("> " + " ".join(text.split()) + "\n" for text in texts)
    each, unit = (" each in encoder and decoder", "rows") if config.architecture == "t5" else ("", "blocks")
    shape = f"width {config.width}, {config.layers} layers{each}, {config.heads} heads, context {config.max_length}"
    quality = f"{_figure(facts, 'eval/perplexity')} on {config.eval_data}, {counted}"
    if "eval/gap_perplexity" in facts.metrics:
        quality += f"; of a principal sentence, from its whole review: {_figure(facts, 'eval/gap_perplexity')}"
    return f"""# {name} for movie reviews

Trained from scratch by `peftlab pretrain` on the lab's training block of IMDb reviews ({config.train_data}) and on
nothing else. {use}

| | |
|---|---|
| architecture | {architecture}, {shape} |
| parameters | {facts.parameters:,} |
| tokenizer | byte-level BPE of {config.vocab_size}, trained on the same reviews; {special} |
| data | {facts.tokens:,} tokens an epoch, {rows}, {config.epochs:g} epochs |
| steps, seed | {facts.steps} of {config.batch_size} {unit}, seed {config.seed} |
| hardware, time | {hardware}, {facts.seconds:.0f} s of training |
| held-out perplexity | {quality} |
| weights | float16 safetensors; the perplexity above is of these rounded weights |
| licence | MIT; the reviews belong to their authors |

Command: `peftlab pretrain`, with {keys}

{heading}:

{quoted}"""


def _figure(facts: Facts, name: str) -> str:
    low, high = facts.intervals[name]
    return f"{facts.metrics[name]:.2f} (95% interval {low:.2f} to {high:.2f})"
