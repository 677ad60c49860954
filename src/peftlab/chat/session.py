"""A conversation with a model: history, formatting, and replies as a stream of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..data.records import Message
from ..errors import UserError
from ..sampling.sampler import Decoding, Sampler
from ..sampling.spelling import Spelling
from .voices import Voice

# A model with a chat template is asked for facts and tasks: the card of SmolLM2-135M-Instruct samples at these values,
# and docs/chat.md shows what higher ones cost. One without a template writes on, and repeats itself at so low ones.
ANSWERS = Decoding(max_new_tokens=128, temperature=0.2, top_p=0.9)
GOES_ON = Decoding(max_new_tokens=128, temperature=0.7, top_p=0.95)


def default_decoding(voice: Voice) -> Decoding:
    """The persona's own, or what suits a model with a chat template or one without.

    Raises UserError for a persona whose replies are as long as the context.
    """
    if voice.persona is None:
        suits = ANSWERS if voice.template else GOES_ON
        return replace(suits, max_new_tokens=min(suits.max_new_tokens, voice.context // 2))
    decoding = Decoding(**voice.persona.decoding.model_dump())
    if decoding.max_new_tokens >= voice.context:
        raise UserError(
            f"persona {voice.persona.name}: decoding.max_new_tokens: {decoding.max_new_tokens} leaves no room in the "
            f"context of {voice.base}, {voice.context} tokens"
        )
    return decoding


@dataclass
class Session:
    """Turns so far, and who answers.

    A voice with a chat template is asked by it; one whose persona has a `prompt` is asked each question alone. Any
    other (GPT-2 class) has no notion of turns: the conversation is one text, and its reply continues what you wrote.
    """

    voice: Voice
    decoding: Decoding = GOES_ON
    system: str = ""
    seed: int = 0
    turns: list[Message] = field(default_factory=list)
    dropped: int = 0  # of the turns, the oldest that no longer fit
    cut: bool = False  # whether the last prompt had lost its beginning: one turn alone was too long

    @property
    def sampler(self) -> Sampler:
        """That of the voice."""
        return self.voice.sampler

    @property
    def context(self) -> int:
        """Tokens that the model can attend to."""
        return self.voice.context

    @property
    def acting(self) -> Decoding:
        """The decoding, with no more new tokens than this voice's context has room for."""
        return replace(self.decoding, max_new_tokens=min(self.decoding.max_new_tokens, self.context - 1))

    @property
    def used(self) -> int:
        """Tokens of the turns that the model is shown."""
        return len(self._format(self.turns[self.dropped :])) if self.turns else 0

    def speak_as(self, voice: Voice) -> None:
        """Let another voice go on with the conversation; a persona brings its system text and decoding."""
        if (voice.persona, bool(voice.template)) != (self.voice.persona, bool(self.voice.template)):
            self.decoding = default_decoding(voice)
        if voice.persona is not self.voice.persona:
            self.system = voice.persona.system if voice.persona else ""
        self.voice, self.dropped = voice, 0

    def reply(self, text: str) -> Iterator[str]:
        """Add the user's turn and stream the reply; what was streamed is kept, also when the caller stops early."""
        self.turns.append(Message("user", text))
        try:
            prompt = self.fit()
        except BaseException:  # a template that refuses the turns, or Ctrl+C: a turn without a reply is none
            self.turns.pop()
            raise
        said: list[str] = []
        try:
            for piece in self._stream(prompt):
                said.append(piece)
                yield piece
        finally:
            self.turns.append(Message("assistant", "".join(said)))

    def aside(self, voice: Voice, turns: Sequence[Message]) -> Iterator[str]:
        """Stream what another voice answers to these turns; the conversation stays as it is, seed included."""
        other = replace(self, turns=list(turns), dropped=0)
        other.speak_as(voice)
        return other._stream(other.fit())

    def fit(self) -> list[int]:
        """Token ids of the conversation; oldest turns are dropped until a whole reply fits into the context."""
        room = self.context - self.acting.max_new_tokens
        while True:
            shown = self.turns[self.dropped :]
            ids = self._format(shown)
            if len(ids) <= room or len(shown) == 1:
                self.cut = len(ids) > room
                return ids[-room:]
            self.dropped += 2 if len(shown) > 2 else 1

    def take_back(self) -> str | None:
        """Remove the last turn and its reply; returns what was asked, None where there is nothing."""
        if len(self.turns) < 2:
            return None
        asked, _ = self.turns[-2:]
        del self.turns[-2:]
        self.dropped = 0
        return asked.content

    def clear(self) -> None:
        """Forget every turn."""
        self.turns.clear()
        self.dropped = 0

    def _format(self, turns: Sequence[Message]) -> list[int]:
        tokenizer: Any = self.sampler.tokenizer
        text = self.voice.text([Message("system", self.system), *turns] if self.system else turns)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _stream(self, prompt: list[int]) -> Iterator[str]:
        self.voice.act()
        ids, mask = self.sampler.pad([prompt])
        self.seed += 1
        spelling = Spelling(self.sampler.text)
        for token, _ in self.sampler.decode(ids, mask, [self.seed], self.acting):
            if piece := spelling.add(int(token)):
                yield piece
        if rest := spelling.rest():
            yield rest


def transcript(turns: Sequence[Message], width: int = 72) -> list[str]:
    """One line a turn, for `/history`."""
    lines = (f"{turn.role}: {' '.join(turn.content.split())}" for turn in turns)
    return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
