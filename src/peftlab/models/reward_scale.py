"""How the outputs of a reward model's members become one score, and one calibrated probability of a pair."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError

Combine = Literal["mean", "min", "mean-std"]
Affine = tuple[float, float]  # gain and bias: x -> gain * x + bias


@dataclass(frozen=True)
class Scale:
    """From the members' own logits to one calibrated score.

    `members` brings each member's logits to one scale before they are combined into `raw`. Then score = gain * raw +
    bias, and the probability that a is preferred to b is sigmoid((raw_a - raw_b) / temperature).

    Combining by "mean-std" takes `std_weight` times the members' standard deviation off their mean, by "min" keeps the
    least: both distrust an answer on which the members differ (Coste et al. 2023).
    """

    members: tuple[Affine, ...] = ((1.0, 0.0),)
    combine: Combine = "mean"
    std_weight: float = 1.0
    gain: float = 1.0
    bias: float = 0.0
    temperature: float = 1.0

    @classmethod
    def fitted(cls, logits: Tensor, combine: Combine = "mean", std_weight: float = 1.0) -> Scale:
        """Scores of mean 0 and variance 1 over the answers of these logits (N, M); temperature 1.

        A single member's raw scores are its logits.
        """
        alone = logits.shape[1] == 1
        members = tuple((1.0, 0.0) if alone else _standard(column) for column in logits.unbind(1))
        scale = cls(members, combine, std_weight)
        gain, bias = _standard(scale.raw(logits))
        return replace(scale, gain=gain, bias=bias)

    def raw(self, logits: Tensor) -> Tensor:
        """(N, M) -> (N,)."""
        own = torch.stack([gain * x + bias for x, (gain, bias) in zip(logits.unbind(1), self.members, strict=True)], 1)
        if self.combine == "min":
            return own.amin(1)
        spread = own.std(1, correction=0) if self.combine == "mean-std" else 0.0
        return own.mean(1) - self.std_weight * spread

    def scores(self, logits: Tensor) -> Tensor:
        """(N, M) -> (N,)."""
        return self.gain * self.raw(logits) + self.bias

    def facts(self) -> dict[str, Any]:
        """What stack.json keeps."""
        return dict(vars(self))

    @classmethod
    def of(cls, name: str, facts: Mapping[str, Any]) -> Scale:
        """Read back from stack.json; UserError naming the model and the fact that is no such thing."""
        try:
            members = tuple((float(gain), float(bias)) for gain, bias in facts["members"])
            numbers = {key: float(facts[key]) for key in ("std_weight", "gain", "bias", "temperature")}
            scale = cls(members, facts["combine"], **numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{name}: stack.json does not say how to scale a reward ({error!r}); restore it") from None
        finite = all(map(math.isfinite, [*numbers.values(), *(x for pair in members for x in pair)]))
        if not (members and finite and scale.temperature > 0 and scale.combine in get_args(Combine)):
            raise UserError(f"{name}: stack.json says {scale}, which scales no reward; restore it")
        return scale


def _standard(values: Tensor) -> Affine:
    """Gain and bias that give these values mean 0 and variance 1."""
    gain = 1.0 / max(float(values.double().std()), 1e-6)
    return gain, -gain * float(values.double().mean())
