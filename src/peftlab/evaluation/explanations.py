"""How well a model explains the sentiment of held-out reviews: its answers by the rubric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.records import Prompt, PromptCompletion
from ..errors import UserError
from ..rewards.rubric import rubric_scores
from ..runs.progress import batch_starts
from ..sampling.sampler import Decoding, Sampler
from .intervals import bootstrap_mean

GREEDY = Decoding(max_new_tokens=64, temperature=0.0)


@dataclass(frozen=True)
class Explanations:
    """N answers, their `rubric_columns`, and whether EOS was sampled (N,)."""

    answers: list[str]
    scores: dict[str, np.ndarray]
    ended: np.ndarray

    def metrics(self) -> dict[str, float]:
        """The mean of each column: of rubric/all, the share of answers for which every part is 1."""
        return {name: float(values.mean()) for name, values in self._columns().items()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% bootstrap intervals over reviews."""
        return {name: bootstrap_mean(values) for name, values in self._columns().items()}

    def _columns(self) -> dict[str, np.ndarray]:
        return {**self.scores, "eval/eos_fraction": self.ended}


def rubric_columns(
    prompts: Sequence[str], answers: Sequence[str], records: Sequence[Prompt | PromptCompletion]
) -> dict[str, np.ndarray]:
    """Each part's scores of N answers (N,) by its metric's name, and rubric/all: 1 where every part is 1."""
    scores = {f"rubric/{name}": np.array(part) for name, part in rubric_scores(prompts, answers, records).items()}
    every = np.all([values == 1 for values in scores.values()], axis=0)
    return scores | {"rubric/all": every.astype(np.float64)}


def evaluate_explanations(
    sampler: Sampler,
    records: Sequence[Prompt | PromptCompletion],
    decoding: Decoding = GREEDY,
    batch_size: int = 32,
) -> Explanations:
    """One answer to each record's prompt, scored. Records need labels (imdb-explanations:test as prompts or as sft).

    Rows of similar length share a batch; answers are in the order of the records. Raises UserError where prompt and
    answer do not fit into the model's context: what is cut off could not be cited.
    """
    rows = sampler.tokenizer([r.prompt for r in records], add_special_tokens=False)["input_ids"]
    room = int(sampler.model.config.max_position_embeddings) - decoding.max_new_tokens
    long = next((r.id for r, ids in zip(records, rows, strict=True) if len(ids) > room), None)
    if long is not None:
        raise UserError(f"row {long}: its prompt leaves no room for {decoding.max_new_tokens} new tokens of context")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    answers, ended = [""] * len(rows), np.zeros(len(rows))
    for start in batch_starts(len(order), batch_size):
        batch = order[start : start + batch_size]
        samples = sampler.sample([rows[i] for i in batch], batch, decoding)
        ended[batch] = samples.ended.cpu().numpy()
        for i, text in zip(batch, sampler.texts(samples), strict=True):
            answers[i] = text
    return Explanations(answers, rubric_columns([record.prompt for record in records], answers, records), ended)
