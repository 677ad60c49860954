"""rollouts.jsonl: what it holds, read in one pass, and single rows of it. A file may be long; few rows are kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runs.atomic import read_rows
from .read import Row, as_number

FILE = "rollouts.jsonl"
MEASURES = ("advantage", "kl", "reward")  # what tokens can be coloured by
COLUMNS = ("logprob", "ref_logprob", "kl", "value", "reward", "advantage")
FULL = 0.9  # the share of all tokens that colours short of its full strength: one outlier does not pale the rest
FLOOR = 1e-3  # what colours fully is no less: below it stands float noise, such as the KL of the first step


@dataclass(frozen=True)
class Recorded:
    """The file without its tokens.

    rows        (step, prompt_id) of each row, in the file's order
    scales      measure -> the size of a number that colours fully; only measures that some token has
    distinct_2  (step, distinct-2 over the step's recorded completions)
    """

    rows: list[tuple[int, str]]
    scales: dict[str, float]
    distinct_2: list[tuple[float, float]]

    @property
    def steps(self) -> list[int]:
        """The recorded steps, ascending."""
        return sorted({step for step, _ in self.rows})

    def prompts(self, step: int) -> dict[str, list[int]]:
        """The prompts of a step in the order of the file: id -> which rows answer it."""
        found: dict[str, list[int]] = {}
        for at, (its_step, prompt_id) in enumerate(self.rows):
            if its_step == step:
                found.setdefault(prompt_id, []).append(at)
        return found

    def steps_of(self, prompt_id: str) -> list[int]:
        """The steps in which a prompt was recorded, ascending."""
        return sorted({step for step, its_id in self.rows if its_id == prompt_id})


def read_recorded(run_path: Path) -> Recorded:
    """Of the run folder `run_path`; empty where it recorded nothing."""
    rows: list[tuple[int, str]] = []
    sizes: dict[str, list[float]] = {}
    texts: dict[int, list[str]] = {}
    for row in read_rows(run_path / FILE):
        step = int(as_number(row.get("step")) or 0)
        rows.append((step, str(row.get("prompt_id", ""))))
        texts.setdefault(step, []).append(str(row.get("completion", "")))
        for token in tokens_of(row):
            for measure in MEASURES:
                value = as_number(token.get(measure))
                if value is not None:
                    sizes.setdefault(measure, []).append(abs(value))
    return Recorded(
        rows,
        {measure: max(FLOOR, _quantile(sizes[measure], FULL)) for measure in MEASURES if measure in sizes},
        [(float(step), share) for step, said in sorted(texts.items()) if (share := distinct_2(said)) is not None],
    )


def rows_at(run_path: Path, wanted: Collection[int]) -> list[Row]:
    """The rows of these places in the file, in its order."""
    return [row for at, row in enumerate(read_rows(run_path / FILE)) if at in wanted]


def tokens_of(row: Row) -> list[Row]:
    """The tokens of a row; none where the row holds something else."""
    listed = row.get("tokens")
    return [token for token in listed if isinstance(token, dict)] if isinstance(listed, list) else []


def parts_of(row: Row) -> dict[str, float | None]:
    """The parts of a row's reward, unweighted."""
    parts = row.get("score_parts")
    return {str(name): as_number(value) for name, value in parts.items()} if isinstance(parts, dict) else {}


def distinct_2(texts: Sequence[str]) -> float | None:
    """Different pairs of neighbouring words over all such pairs, as eval/distinct_2; None where there is no pair."""
    pairs = [pair for words in (text.lower().split() for text in texts) for pair in zip(words, words[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else None


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]
