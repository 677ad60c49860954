"""Controllers of the KL coefficient."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FixedKL:
    """The coefficient never changes."""

    coef: float

    def update(self, kl: float, episodes: int) -> None:
        """`kl`: nats per completion of this step; `episodes`: completions in it."""


@dataclass
class AdaptiveKL:
    """Proportional controller in log space (Ziegler et al. 2019, sec. 2.2): the error is clipped to +-0.2.

    coef <- coef * (1 + clip(kl / target - 1, +-0.2) * min(episodes / horizon, 1)). `target`: nats per completion;
    `horizon`: completions over which a full error moves the coefficient by e^0.2. A step of more completions counts
    as one horizon: past it the factor would overshoot, and be negative in the end.
    """

    coef: float
    target: float
    horizon: float

    def update(self, kl: float, episodes: int) -> None:
        """`kl`: nats per completion of this step; `episodes`: completions in it."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * min(episodes / self.horizon, 1.0)
