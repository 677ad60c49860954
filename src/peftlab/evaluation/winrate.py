"""Which of two policies answers the better: win rates over pairs of answers to one prompt, with ties."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .intervals import bootstrap_mean

LENGTH_BAND = 0.1  # answers whose lengths differ by this share of the longer one at most are of one length


@dataclass(frozen=True)
class Scored:
    """K answers to each of P prompts: scores (P, K), of which the higher is better, and lengths (P, K) in tokens."""

    scores: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class WinRate:
    """Figures and 95% intervals by their names in the registry. Intervals resample prompts, with all their pairs."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def win_rate(ours: Scored, theirs: Scored, tie_margin: float = 0.0) -> WinRate:
    """How often an answer of ours scores above one of theirs to the same prompt; a tie counts one half.

    All K * K pairs of a prompt are compared: the mean over them is the win rate's U-statistic (Mann and Whitney 1947).
    Scores at most `tie_margin` apart tie. Swapping the sides gives 1 - the rate. The length-matched rate is of the
    pairs whose lengths differ by `LENGTH_BAND` at most; without such a pair it is left out.
    """
    gaps = ours.scores[:, :, None] - theirs.scores[:, None, :]
    tied = np.abs(gaps) <= tie_margin
    won = np.where(tied, 0.5, gaps > 0)
    prompts = np.broadcast_to(np.arange(len(gaps))[:, None, None], gaps.shape)
    one, other = ours.lengths[:, :, None], theirs.lengths[:, None, :]
    matched = np.abs(one - other) <= LENGTH_BAND * np.maximum(one, other)
    metrics = {
        "compare/win_rate": float(won.mean()),
        "compare/ties": float(tied.mean()),
        "compare/length_matched": float(matched.mean()),
    }
    intervals = {"compare/win_rate": bootstrap_mean(won.ravel(), prompts.ravel())}
    if matched.any():
        metrics["compare/win_rate_length_matched"] = float(won[matched].mean())
        intervals["compare/win_rate_length_matched"] = bootstrap_mean(won[matched], prompts[matched])
    return WinRate(metrics, intervals)
