"""A conversation with a model: history, formatting, and replies as a stream of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..data.records import Message
from ..sampling.sampler import Decoding, Sampler

# A small model wanders off at a higher temperature.
DEFAULT = Decoding(max_new_tokens=128, temperature=0.7, top_p=0.95)


@dataclass
class Session:
    """Turns so far, and the model that answers.

    A model with a chat template is asked by it. One without (GPT-2 class) has no notion of turns: the conversation is
    one text, and its reply continues what you wrote.
    """

    sampler: Sampler
    decoding: Decoding = DEFAULT
    system: str = ""
    seed: int = 0
    turns: list[Message] = field(default_factory=list)
    dropped: int = 0

    @property
    def context(self) -> int:
        """Tokens that the model can attend to."""
        return int(self.sampler.model.config.max_position_embeddings)

    def reply(self, text: str) -> Iterator[str]:
        """Add the user's turn and stream the reply; what was streamed is kept, also when the caller stops early."""
        self.turns.append(Message("user", text))
        prompt = self.fit()
        said: list[str] = []
        try:
            for piece in self._stream(prompt):
                said.append(piece)
                yield piece
        finally:
            self.turns.append(Message("assistant", "".join(said)))

    def fit(self) -> list[int]:
        """Token ids of the conversation; oldest turns are dropped until a whole reply fits into the context."""
        room = self.context - self.decoding.max_new_tokens
        while True:
            ids = self._format(self.turns)
            if len(ids) <= room or len(self.turns) == 1:
                return ids[-room:]
            count = 2 if len(self.turns) > 2 else 1
            del self.turns[:count]
            self.dropped += count

    def clear(self) -> None:
        """Forget every turn."""
        self.turns.clear()
        self.dropped = 0

    def _format(self, turns: list[Message]) -> list[int]:
        tokenizer: Any = self.sampler.tokenizer
        if tokenizer.chat_template:
            messages = [{"role": "system", "content": self.system}] if self.system else []
            messages += [{"role": turn.role, "content": turn.content} for turn in turns]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = self.system
            for turn in turns:
                # A reply carries its own leading space; a user's turn starts a new line.
                text += turn.content if turn.role == "assistant" or not text else "\n" + turn.content
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _stream(self, prompt: list[int]) -> Iterator[str]:
        ids, mask = self.sampler.pad([prompt])
        self.seed += 1
        tokens: list[int] = []
        shown = ""
        for token, _ in self.sampler.decode(ids, mask, [self.seed], self.decoding):
            tokens.append(int(token))
            text = self.sampler.text(tokens)
            # A character of several tokens decodes to U+FFFD until it is whole.
            if text.startswith(shown) and not text.endswith("\ufffd") and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
        rest = self.sampler.text(tokens)
        if rest.startswith(shown) and len(rest) > len(shown):
            yield rest[len(shown) :]


def transcript(turns: list[Message], width: int = 72) -> list[str]:
    """One line a turn, for `/history`."""
    lines = (f"{turn.role}: {' '.join(turn.content.split())}" for turn in turns)
    return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
