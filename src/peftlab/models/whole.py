"""Reward models that are no adapters of ours: whole models with a head of one output, of a folder or the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .backbone import Backbone, load_backbone
from .catalog import resolve
from .classifier import classify_texts, longest_text
from .reward_model import RewardModel
from .stacks import Stack


@dataclass(frozen=True)
class WholeReward:
    """R(prompt, answer) as the one output of a sequence-classification model on prompt + answer, in its own unit.

    Special tokens are those that its tokenizer adds, and `ending`: the EOS of a reward model that the lab exported.
    Of what exceeds `max_length` tokens it reads opening and ending.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    max_length: int
    ending: str = ""
    temperature: float = 1.0  # of the logit that the difference of two scores is

    @classmethod
    def load(cls, name: str, device: str = "auto") -> WholeReward:
        """By folder or Hub id, of catalog's kind reward. Raises UserError where it lacks a weight, its head's too."""
        backbone = load_backbone(name, "classifier", device=device, num_labels=None)
        facts = getattr(backbone.model.config, "peftlab", None)
        ending = str(facts.get("ending", "")) if isinstance(facts, Mapping) else ""  # a stranger's may be anything
        return cls(name, backbone.model, backbone.tokenizer, longest_text(backbone), ending)

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
        """(N,) float32 on the CPU, in the order given."""
        texts = [prompt + said + self.ending for prompt, said in zip(prompts, completions, strict=True)]
        return classify_texts(self.model, self.tokenizer, texts, self.max_length)[:, 0]

    raw = scores


def load_reward(
    name: str, device: str = "auto", ground: tuple[Backbone, Stack] | None = None
) -> RewardModel | WholeReward:
    """A reward model by name: a whole one, or an adapter, which may join the `ground`; see `RewardModel.load`."""
    return WholeReward.load(name, device) if resolve(name).kind == "reward" else RewardModel.load(name, device, ground)
