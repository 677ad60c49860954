"""`--persona auto`: a classifier picks who answers, and tells by which words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ..errors import UserError
from ..models.classifier import TextClassifier
from ..models.personas import persona_files

DEFAULT = "persona-router"
WORDS = 48  # the most that are looked at one by one
SHOWN = 2
WEIGHS = 0.02  # a word that changes the probability by less tells nothing


@dataclass(frozen=True)
class Choice:
    """Who answers, how probable the classifier holds it, and the words without which it would be less so."""

    persona: str
    probability: float
    words: tuple[str, ...]

    def told(self) -> str:
        """One line for a person."""
        why = f"for {' and '.join(map(repr, self.words))}" if self.words else "no single word decides"
        return f"{self.persona}, p {self.probability:.2f}: {why}"


class Router:
    """A classifier whose classes are personas."""

    def __init__(self, classifier: TextClassifier) -> None:
        """Raises UserError where a class is no persona."""
        if missing := [label for label in classifier.labels if label not in persona_files()]:
            raise UserError(
                f"router {classifier.name}: its classes {', '.join(missing)} are no personas; "
                "train one whose labels are names that `peftlab personas list` shows"
            )
        self.classifier = classifier

    @classmethod
    def load(cls, name: str = DEFAULT, device: str = "auto") -> Self:
        """A `classify` adapter by name or folder."""
        return cls(TextClassifier.load(name, device=device))

    def pick(self, text: str) -> Choice:
        """The persona for a turn. Each of its words is left out once: what lowers the probability most is why."""
        words = text.split()[:WORDS]
        without = [" ".join([*words[:i], *words[i + 1 :]]) for i in range(len(words))] if len(words) > 1 else []
        table = self.classifier.probabilities([text, *without])
        best = int(table[0].argmax())
        drops = (table[0, best] - table[1:, best]).tolist()
        ranked = sorted(range(len(drops)), key=lambda i: -drops[i])
        why = tuple(_bare(words[i]) for i in ranked[:SHOWN] if drops[i] > WEIGHS)
        return Choice(self.classifier.labels[best], float(table[0, best]), why)


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'()") or word
