"""Summaries by an encoder-decoder, and how close they come to references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..data.collate import collate_seq2seq
from ..data.records import SummaryPair
from ..data.spans import PREFIX
from ..data.tokenize import Row, encode, sentences
from ..errors import UserError
from ..runs.progress import batch_starts
from .rouge import Rouge, rouge

# The most that a format may ask for: it comes with an adapter or a model, from anyone. Beams take memory at once; the
# lengths are far above any document and any summary, so that what has no end ends.
MOST = {"max_length": 1_000_000, "max_summary": 32_768, "beams": 64}


# No run of so many tokens twice in a summary, as T5 and BART are run for summaries: without it a small model's beams
# may say one word until the end.
NO_REPEAT = 3


@dataclass(frozen=True)
class SummaryFormat:
    """How documents are read and summaries written; lengths in tokens, the EOS included. An adapter keeps its own."""

    task_prefix: str = PREFIX  # what the bundled tiny-t5 and Raffel et al. 2020 learned with
    max_length: int = 512
    max_summary: int = 64
    beams: int = 4

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> SummaryFormat:
        """The format among an adapter's extra facts; defaults for what is not there.

        UserError for a value of another type, for numbers below 1, and for those above `MOST`.
        """
        known = {field.name: facts[field.name] for field in fields(cls) if field.name in facts}
        for name, value in known.items():
            wanted = type(getattr(cls, name))
            if type(value) is not wanted or (wanted is int and not 1 <= value <= MOST[name]):
                fits = f"a number from 1 to {MOST[name]}" if wanted is int else "a text"
                raise UserError(
                    f"{name}: {value!r} is no way to write summaries, which takes {fits}; "
                    "restore the adapter or the model, or train again"
                )
        return cls(**known)

    def facts(self) -> dict[str, Any]:
        """What `of` reads."""
        return asdict(self)

    def rows(self, pairs: Sequence[SummaryPair], tokenizer: Any) -> list[Row]:
        """input_ids and labels of each pair. A summary that is cut gets no EOS, since nothing ends there."""
        inputs = self.inputs([pair.document for pair in pairs], tokenizer)
        answers = [[*ids, tokenizer.eos_token_id] for ids in encode([pair.summary for pair in pairs], tokenizer)]
        return [
            {"input_ids": ids, "labels": answer[: self.max_summary]}
            for ids, answer in zip(inputs, answers, strict=True)
        ]

    def inputs(self, documents: Sequence[str], tokenizer: Any) -> list[list[int]]:
        """Token ids of documents behind the task's prefix, cut, with EOS."""
        rows = encode([self.task_prefix + document for document in documents], tokenizer)
        return [[*row[: self.max_length - 1], tokenizer.eos_token_id] for row in rows]


@torch.no_grad()
def summarize(
    model: Any, tokenizer: Any, documents: Sequence[str], form: SummaryFormat, batch_size: int = 32
) -> list[str]:
    """A summary of each document by beam search (greedy with one beam), in order; similar lengths share a batch."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        num_beams=form.beams,
        no_repeat_ngram_size=NO_REPEAT,
        max_new_tokens=form.max_summary,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id,
    )
    rows = form.inputs(documents, tokenizer)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    texts = [""] * len(rows)
    for start in batch_starts(len(order), batch_size):
        picked = order[start : start + batch_size]
        batch = collate_seq2seq([{"input_ids": rows[row], "labels": []} for row in picked], tokenizer.pad_token_id)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings).tolist()
        for row, tokens in zip(picked, written, strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            texts[row] = text.strip()
    model.train(was_training)
    return texts


def leads(documents: Sequence[str]) -> list[str]:
    """The first sentence of each document: the baseline lead-1."""
    return [(sentences(document) or [""])[0] for document in documents]


def score_summaries(texts: Sequence[str], pairs: Sequence[SummaryPair]) -> Rouge:
    """ROUGE of each text against its pair's summary."""
    return rouge(texts, [pair.summary for pair in pairs])


def lead_metrics(pairs: Sequence[SummaryPair]) -> dict[str, float]:
    """ROUGE x 100 of the baseline lead-1 on these documents."""
    scored = score_summaries(leads([pair.document for pair in pairs]), pairs)
    return {name.replace("eval/", "compare/"): value for name, value in scored.metrics.items()}
