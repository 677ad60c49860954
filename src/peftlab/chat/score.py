"""What a reward says of a reply, part by part, while one talks."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.records import Prompt
from ..rewards.parts import Reward
from ..rewards.spec import reward_of

DEFAULT = "imdb-sentiment"


@dataclass(frozen=True)
class Scorer:
    """A reward as `peftlab ppo` spells it. A classifier's part is its log-odds in nats, or as p(NAME) its probability,
    not normalised as in a run."""

    spec: str
    want: str
    reward: Reward

    @classmethod
    def load(cls, spec: str, want: str, device: str = "auto") -> Scorer:
        """Raises UserError where the line names no reward."""
        return cls(spec, want, reward_of(spec, want, device=device))

    def told(self, asked: str, reply: str) -> str:
        """`reward +1.42 = imdb-sentiment +1.42, wants positive`, a weight before a part where it has one.

        Raises LabError where a part cannot score a conversation: rubric:label asks for a gold label.
        """
        total, parts = self.reward([asked], [reply], [Prompt("chat", asked)])
        weights = {part.name: part.weight for part in self.reward.parts}
        terms = [
            f"{'' if weights.get(name, 1.0) == 1 else f'{weights[name]:g} x '}{name} {float(value[0]):+.2f}"
            for name, value in parts.items()
        ]
        return f"reward {float(total[0]):+.2f} = {' + '.join(terms)}, wants {self.want}"
