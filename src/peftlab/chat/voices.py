"""Who may answer: names of models, adapters, mixes and personas become voices, on bases that they share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.records import Message
from ..errors import UserError
from ..models.catalog import named, resolve
from ..models.mix import Mixer, check_member
from ..models.personas import TEXT, Persona, load_persona, mix_weights, persona_files
from ..models.stacks import read_stack
from ..sampling.sampler import Sampler

OFF = "off"


@dataclass(frozen=True)
class Voice:
    """A sampler, and the adapters that act in it while this voice speaks, by weight; none is the bare base.

    `template` is the chat template it is asked by, None for a model that only goes on with a text.
    """

    label: str
    sampler: Sampler
    mixer: Mixer | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    template: str | None = None
    persona: Persona | None = None

    @classmethod
    def of(cls, sampler: Sampler, label: str = "model") -> Voice:
        """A sampler's model as it is."""
        return cls(label, sampler, template=sampler.tokenizer.chat_template)

    def act(self) -> None:
        """Make its adapters those that act; a mixer serves one voice at a time."""
        if self.mixer is not None:
            self.mixer.use(self.weights)

    def asked(self, text: str) -> str:
        """A user's turn as a reward reads it before the reply: what the model continues, or a line of its own."""
        if self.persona is not None and self.persona.prompt:
            return self.persona.prompt.replace(TEXT, text)
        return text + "\n" if self.template else text

    def text(self, turns: Sequence[Message]) -> str:
        """What its reply to these turns goes on from; a system text is the first of them.

        By the persona's prompt, which puts the last question alone, by the chat template, or as one text. Raises
        UserError where the template does not take these turns.
        """
        if self.persona is not None and self.persona.prompt:
            questions = (turn.content for turn in reversed(turns) if turn.role == "user")
            return self.asked(next(questions, turns[-1].content))
        if not self.template:
            text = ""
            for turn in turns:  # a reply carries its own leading space; a user's turn starts a new line
                text += turn.content if turn.role == "assistant" or not text else "\n" + turn.content
            return text
        from jinja2 import TemplateError

        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        options: dict[str, Any] = {"chat_template": self.template, "tokenize": False, "add_generation_prompt": True}
        try:
            return str(self.sampler.tokenizer.apply_chat_template(messages, **options))
        except TemplateError as error:
            raise UserError(f"the model's chat template does not take these turns: {error}") from None

    @property
    def context(self) -> int:
        """Tokens that its model can attend to."""
        return int(self.sampler.model.config.max_position_embeddings)

    @property
    def base(self) -> str:
        """The name of its base."""
        return self.mixer.name if self.mixer else self.label


class Cast:
    """All that is in memory: bases, and on each the adapters that were named so far."""

    def __init__(self, device: str = "auto") -> None:
        self.device = device
        self._bases: dict[str, tuple[Mixer, Sampler]] = {}

    def stack(self, name: str) -> Voice:
        """A model or an adapter by name or folder; one that is loaded is not looked for on disk again."""
        for mixer, sampler in self._bases.values():
            if name in mixer.loaded:
                return Voice(name, sampler, mixer, {name: 1.0}, mixer.loaded[name].template)
        entry = resolve(name)
        base = read_stack(Path(entry.path)).base if entry.kind == "adapter" else name
        if name not in self._bases and base not in self._bases:
            mixer = Mixer.open(name, self.device)
            self._bases[name if not mixer.shared else base] = (mixer, Sampler(mixer.model, mixer.tokenizer))
        mixer, sampler = self._bases[name if name in self._bases else base]
        if entry.kind != "adapter" or not mixer.shared:
            return Voice(name, sampler, mixer, {}, mixer.template)
        return Voice(name, sampler, mixer, {name: 1.0}, mixer.load(name).template)

    def mix(self, near: Voice, weights: Mapping[str, float]) -> Voice:
        """A weighted sum of plain LoRA stacks on the base of `near`; UserError naming what cannot be mixed."""
        if near.mixer is None:
            raise UserError("mix: this model shares its base with no adapter")
        near.mixer.mix(weights)
        first = near.mixer.load(max(weights, key=lambda name: abs(weights[name])))
        label = "mix " + " ".join(f"{name}={weight:g}" for name, weight in weights.items())
        return Voice(label, near.sampler, near.mixer, dict(weights), first.template)

    def persona(self, given: str | Persona) -> Voice:
        """A persona by name, or one that is loaded."""
        persona = load_persona(given) if isinstance(given, str) else given
        try:
            for name in persona.weights:
                check_member(persona.base, name, bool(persona.mix))
            spoken = self.stack(persona.adapter or persona.base)
            if persona.mix:
                spoken = self.mix(spoken, persona.mix)
        except UserError as error:
            raise UserError(f"persona {persona.name}: {error}") from None
        return Voice(persona.name, spoken.sampler, spoken.mixer, spoken.weights, spoken.template, persona)

    def find(self, name: str, near: Voice) -> Voice:
        """What a name means beside `near`: off (its bare base), an adapter that is loaded, a persona, a stack."""
        if name == OFF:
            return self.off(near)
        in_use = near.mixer is not None and name in near.mixer.loaded
        return self.persona(name) if not in_use and name in persona_files() else self.stack(named(name))

    def off(self, near: Voice) -> Voice:
        """The bare base of `near`."""
        if near.mixer is None or not near.mixer.shared:
            raise UserError(f"off: {near.label} is merged with its base; open the base itself")
        return Voice(near.mixer.name, near.sampler, near.mixer, {}, near.mixer.template)


def weights_of(text: str) -> dict[str, float]:
    """`a=0.7 b=0.3` as a mapping; UserError for anything else."""
    return mix_weights(re.sub(r"\s*=\s*", "=", text).split())
