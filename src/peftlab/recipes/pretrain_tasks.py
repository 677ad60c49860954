"""What each architecture of `peftlab pretrain` learns from, how it is measured, and what its card shows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..data.collate import collate_language, collate_seq2seq
from ..data.spans import PREFIX, SPANS, Gap, Views, blocks, gaps
from ..data.tokenize import Row, document_ids, labelled, pack
from ..errors import UserError
from ..evaluation.perplexity import row_nlls
from ..evaluation.targets import target_nlls
from ..sampling.sampler import Decoding, Sampler
from ..training.arguments import TrainConfig, total_steps
from ..training.sampler import pair_length, row_length

CARD_PROMPTS = ("This movie is", "I watched this because", "The acting")


class Task(Protocol):
    """`rows` for the trainer: passes over `epoch_rows` rows of `epoch_tokens` tokens and these `lengths`."""

    rows: Sequence[Row]
    lengths: list[int]
    epoch_rows: int
    epoch_tokens: int

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Rows as one batch."""
        ...

    def measure(self, model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Metric -> nats and tokens of each held-out row; the metric is their perplexity."""
        ...

    def samples(self, model: Any) -> list[str]:
        """Three texts for the card, not picked."""
        ...


class LanguageModelling(Task):
    """Predict the next token of whole reviews, packed into blocks."""

    def __init__(self, train: list[str], test: list[str], tokenizer: Any, length: int) -> None:
        self.tokenizer = tokenizer
        self.rows = labelled(pack(document_ids(train, tokenizer), length))
        self.held_out = pack(document_ids(test, tokenizer), length)
        self.lengths = [row_length(row) for row in self.rows]
        self.epoch_rows, self.epoch_tokens = len(self.rows), sum(self.lengths)

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return collate_language(rows, self.tokenizer.pad_token_id)

    def measure(self, model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {"eval/perplexity": row_nlls(model, self.held_out, self.tokenizer.pad_token_id)}

    def samples(self, model: Any) -> list[str]:
        """One sample a prompt, seeds 0, 1, 2."""
        sampler = Sampler(model.eval(), self.tokenizer)
        context = model.config.n_positions
        # A small context is shared: half for the prompt at most, the rest for what follows.
        prompts = [self.tokenizer(p, add_special_tokens=False)["input_ids"][: context // 2] for p in CARD_PROMPTS]
        new = min(48, context - max(map(len, prompts)))
        drawn = sampler.sample(prompts, range(len(prompts)), Decoding(max_new_tokens=new))
        return [sampler.text(p) + c for p, c in zip(prompts, sampler.texts(drawn), strict=True)]


class Denoising(Task):
    """Restore corrupted blocks, and say the principal sentence of a text: every epoch has one row of each.

    An epoch is a pass that corrupts anew (data/spans.py), so that none repeats another. The first `copies` are copies.
    """

    def __init__(
        self, train: list[str], test: list[str], tokenizer: Any, length: int, config: TrainConfig, copies: int = 0
    ) -> None:
        self.tokenizer = tokenizer
        parts = blocks(train, tokenizer, length), gaps(train, tokenizer, length)
        self.epoch_rows = len(parts[0]) + len(parts[1])
        if not self.epoch_rows:
            raise UserError("train_data: no text has two tokens, so there is nothing to hide")
        # As many passes as steps: no run has more epochs, on however many GPUs, and a pass costs no memory.
        passes = max(copies + 1, total_steps(config, self.epoch_rows))
        rows = Views(*parts, tokenizer, config.seed, passes, copies=copies)
        self.rows, self.lengths = rows, rows.lengths()
        first = copies * self.epoch_rows
        self.epoch_tokens = sum(pair_length(rows[first + row]) for row in range(self.epoch_rows))
        # The held-out corruption has a seed of its own: the figure compares runs of different seeds.
        held_out = Views(blocks(test, tokenizer, length), [], tokenizer, 0, 1, [SPANS])
        self.held_out = list(held_out)
        self.gaps: list[Gap] = gaps(test, tokenizer, length)

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return collate_seq2seq(rows, self.tokenizer.pad_token_id)

    def measure(self, model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        rows = {"eval/perplexity": self.held_out, "eval/gap_perplexity": [gap.row(None) for gap in self.gaps]}
        return {name: target_nlls(model, some, self.tokenizer.pad_token_id) for name, some in rows.items() if some}

    def samples(self, model: Any) -> list[str]:
        """The principal sentences, greedy, of the first three held-out reviews that have one, behind their openings."""
        found = []
        for gap in self.gaps[:3]:
            batch = self.collate([gap.row(None)])
            ids = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            gist = model.eval().generate(**ids, max_new_tokens=64, do_sample=False, num_beams=1)[0]
            review, said = (
                self.tokenizer.decode(some, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                for some in (batch["input_ids"][0], gist)
            )
            found.append(f"{review.removeprefix(PREFIX)[:160]} ... → {said}")
        return found
