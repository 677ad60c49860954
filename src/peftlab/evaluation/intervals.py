"""Confidence intervals: bootstrap for any mean or metric, Wilson's for a share of cases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SEED = 0  # of every bootstrap: the same figures have the same interval


def bootstrap_mean(values: np.ndarray, groups: np.ndarray | None = None, draws: int = 2000) -> tuple[float, float]:
    """95% percentile interval of the mean. values (N,); `groups` (N,) resamples whole groups (clusters by prompt)."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(SEED)
    if groups is None:
        sums, sizes = values, np.ones_like(values)
    else:
        _, index = np.unique(groups, return_inverse=True)
        sums, sizes = np.bincount(index, values), np.bincount(index).astype(np.float64)
    picks = rng.integers(0, len(sums), (draws, len(sums)))
    low, high = np.percentile(sums[picks].sum(1) / sizes[picks].sum(1), [2.5, 97.5])
    return float(low), float(high)


def bootstrap_rows(metric: Callable[[np.ndarray], float], rows: int, draws: int = 500) -> tuple[float, float]:
    """95% percentile interval of any metric of a set of rows; `metric` takes row numbers (with repeats).

    Less the bias of resampling, mean of the draws - metric (Efron and Tibshirani 1993, chapter 10): a calibration
    error grows with every row that is drawn twice, and its plain percentiles can all lie above it.
    """
    rng = np.random.default_rng(SEED)
    found = np.array([metric(rng.integers(0, rows, rows)) for _ in range(draws)])
    low, high = np.percentile(found, [2.5, 97.5]) - (found.mean() - metric(np.arange(rows)))
    return float(low), float(high)


def wilson(hits: int, cases: int) -> tuple[float, float]:
    """95% interval of the share hits / cases (cases > 0), sound for few cases and for shares of 0 and 1.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    z = 1.959964  # the normal distribution's 97.5% quantile
    share, spread = hits / cases, z * z / cases
    middle = (share + spread / 2) / (1 + spread)
    half = z * np.sqrt(share * (1 - share) / cases + spread / (4 * cases)) / (1 + spread)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))
