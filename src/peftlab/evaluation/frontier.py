"""What reward a KL can buy: best-of-n and the exponentially tilted reference, both from samples of the reference.

Of P prompts the reference answered each N times. `chosen_by` (P, N) is the score that picks among the answers,
`measured` (P, N) the one whose mean is told; they are one array where a score is judged by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .intervals import bootstrap_mean

# Curves end where they would rest on fewer samples a prompt: best-of-n at n = N / 4, the tilt where its weights are
# worth 4.
LEAST_SAMPLES = 4
TILTS = 24  # points of the tilted curve, before it ends


@dataclass(frozen=True)
class Place:
    """One point: mean KL from the reference in nats a completion, mean score, the score's 95% interval over prompts.

    `at` says which point of its curve it is: n of best-of-n, 1 / beta of the tilt.
    """

    at: float
    kl: float
    value: float
    interval: tuple[float, float]


def best_of_n(chosen_by: np.ndarray, measured: np.ndarray, n: int) -> np.ndarray:
    """(P,): expected `measured` of the answer that scores highest of n; unbiased, 1 <= n <= N.

    The mean over all subsets of n of the N answers: the i-th lowest is the best of C(i - 1, n - 1) of the C(N, n).
    """
    count = chosen_by.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"best of {n} needs as many samples a prompt; there are {count}")
    shares = np.array([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)])
    order = np.argsort(chosen_by, axis=1, kind="stable")
    return np.asarray(np.take_along_axis(measured, order, 1) @ shares)


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from its reference, ln n - (n - 1) / n: exact where scores never tie, else an upper bound.

    Stiennon et al. 2020, appendix G.3; the bound: Beirami et al. 2024.
    """
    return math.log(n) - (n - 1) / n


def tilted(chosen_by: np.ndarray, measured: np.ndarray, inverse_beta: float) -> tuple[np.ndarray, np.ndarray]:
    """(values, KLs), both (P,), of q(y) exp(r(y) / beta) / Z, by self-normalised importance weights of N samples of q.

    No policy of that KL from q has a higher mean r: it maximises E[r] - beta KL, with KL = E[r] / beta - log Z. The
    estimate is that of the sample itself, whose KL cannot pass ln N.
    """
    scaled = chosen_by * inverse_beta
    weights = np.exp(scaled - scaled.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    relative = np.log(weights * weights.shape[1], where=weights > 0, out=np.zeros_like(weights))
    return (weights * measured).sum(1), (weights * relative).sum(1)


def best_of_n_curve(chosen_by: np.ndarray, measured: np.ndarray) -> list[Place]:
    """n = 1, 2, 4 ... up to N / `LEAST_SAMPLES`."""
    places, n = [], 1
    while n == 1 or n * LEAST_SAMPLES <= chosen_by.shape[1]:
        values = best_of_n(chosen_by, measured, n)
        places.append(Place(n, best_of_n_kl(n), float(values.mean()), bootstrap_mean(values)))
        n *= 2
    return places


def tilted_curve(chosen_by: np.ndarray, measured: np.ndarray) -> list[Place]:
    """From the reference itself (1 / beta = 0) on, while the weights are worth `LEAST_SAMPLES` samples or more.

    What N weights of a KL are worth is N exp(-KL): the perplexity of the weights.
    """
    spread = float((chosen_by - chosen_by.mean(1, keepdims=True)).std())
    most = math.log(max(1.0, chosen_by.shape[1] / LEAST_SAMPLES))
    places: list[Place] = []
    for strength in [0.0, *np.geomspace(0.1, 20.0, TILTS)] if spread > 0 else [0.0]:
        inverse_beta = float(strength / spread) if strength else 0.0
        values, kl = tilted(chosen_by, measured, inverse_beta)
        if places and kl.mean() > most:
            break
        places.append(Place(inverse_beta, float(kl.mean()), float(values.mean()), bootstrap_mean(values)))
    return places
