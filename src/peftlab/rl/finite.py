"""What stops a step before its update: a number that is not finite, named by its place."""

from __future__ import annotations

from torch import Tensor

from ..errors import LabError
from ..ops.finite import first_not_finite, not_finite
from .rollout import Rollout


def require_finite(step: int, rollout: Rollout, sites: dict[str, Tensor]) -> None:
    """LabError for NaN or infinity in `sites`, each (B,) or (B, C), as a row of the rollout and a token of it."""
    for site in not_finite(sites):
        (row, *token), value = first_not_finite(sites[site])
        place = f"completion {row}" + "".join(f", token {t}" for t in token)
        prompt = rollout.prompts.texts[row]
        raise LabError(f"step {step}: {site} is {value} at {place}, of prompt {prompt!r}; the weights were not updated")


def require_finite_weights(step: int, weights: dict[str, Tensor]) -> None:
    """LabError where an update left NaN or infinity: Adam may overflow on gradients that are finite."""
    for name in not_finite(weights):
        raise LabError(f"step {step}: its update made {name} NaN or infinite; lower lr")
