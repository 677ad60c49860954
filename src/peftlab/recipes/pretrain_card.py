"""The model card of a pretraining: how to make this model again, and how good it is."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from typing import Any

import torch

# {noun} is what a row of the data is: a review, or just a text.
_WHAT = {
    "gpt2": (
        "A small GPT-2",
        "It writes what looks like a {noun}, and knows nothing: use it to study training, not to answer.",
        "GPT2LMHeadModel",
        "own EOS and pad tokens",
        "documents packed whole with EOS and kept apart",
        "EOS counted",
        "Samples (temperature 1, seeds 0 to 2, not picked)",
    ),
    "t5": (
        "A small T5",
        "It fills gaps in {noun}s and repeats their principal sentence, and knows nothing: it is a base to fine-tune.",
        "T5ForConditionalGeneration, gated GELU, tied embeddings",
        "pad, EOS, mask and 100 sentinels",
        "inputs and targets: a row of denoising for every block (span corruption, sparse and dense, and infilling in "
        "turn), and one of gap sentences for every {noun}; each epoch corrupts anew",
        "span corruption, sentinels and EOS counted",
        'Principal sentences (behind the prefix "summarize: ", greedy, the first three held-out {noun}s)',
    ),
}


@dataclass(frozen=True)
class Facts:
    """What the card reports. `metrics` are of the rounded weights; `tokens` are of one epoch; `device` trained it."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    tokens: int
    seconds: float
    parameters: int
    steps: int
    device: torch.device


def card(config: Any, facts: Facts, texts: list[str]) -> str:
    """The card as Markdown."""
    imdb = all(part.strip().startswith("imdb:") for part in config.train_data.split("+"))
    noun = "review" if imdb else "text"
    told = (said.replace("{noun}", noun) for said in _WHAT[config.architecture])
    name, use, architecture, special, rows, counted, heading = told
    data = f"the lab's blocks of IMDb reviews ({config.train_data})" if imdb else f"the texts of {config.train_data}"
    licence = f"{'MIT' if imdb else 'yours to choose'}; the {noun}s belong to their authors"
    keys = json.dumps(config.model_dump(exclude={"recipe", "device"}))
    quoted = "\n".join("> " + " ".join(text.split()) + "\n" for text in texts)
    each, unit = (" each in encoder and decoder", "rows") if config.architecture == "t5" else ("", "blocks")
    shape = f"width {config.width}, {config.layers} layers{each}, {config.heads} heads, context {config.max_length}"
    quality = f"{_figure(facts, 'eval/perplexity')} on {config.eval_data}, {counted}"
    if "eval/gap_perplexity" in facts.metrics:
        quality += f"; of a principal sentence, from its whole {noun}: {_figure(facts, 'eval/gap_perplexity')}"
    epochs = f"{config.epochs:g} epochs" + (f", the first {config.copy_epochs} of copies" if config.copy_epochs else "")
    return f"""# {name}{" for movie reviews" if imdb else ""}

Trained from scratch by `peftlab pretrain` on {data} and on nothing else. {use}

| | |
|---|---|
| architecture | {architecture}, {shape} |
| parameters | {facts.parameters:,} |
| tokenizer | byte-level BPE of {config.vocab_size}, trained on the same {noun}s; {special} |
| data | {facts.tokens:,} tokens an epoch, {rows}, {epochs} |
| steps, seed | {facts.steps} of {config.batch_size} {unit}, seed {config.seed} |
| hardware, time | {_hardware(facts.device)}, {facts.seconds:.0f} s of training |
| held-out perplexity | {quality} |
| weights | float16 safetensors; the perplexity above is of these rounded weights |
| licence | {licence} |

Command: `peftlab pretrain`, with {keys}

{heading}:

{quoted}"""


def _hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _figure(facts: Facts, name: str) -> str:
    low, high = facts.intervals[name]
    return f"{facts.metrics[name]:.2f} (95% interval {low:.2f} to {high:.2f})"
