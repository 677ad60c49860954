"""What the API takes and gives: OpenAI's fields, as far as the lab has them. What it has not is refused by name."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .reply import Piece, Token

# Fields that change nothing about a reply, and those that do, with the values that leave it as it is.
IDLE = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "modalities": (["text"],),
}


Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Body(BaseModel):
    """A request's. JSON may spell half of a surrogate pair, which is no character: no tokenizer reads it."""

    @model_validator(mode="before")
    @classmethod
    def _characters(cls, given: Any) -> Any:
        try:
            json.dumps(given, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair, which is no character") from None
        return given


class Asked(Body):
    """What the two endpoints that write text share."""

    model_config = ConfigDict(extra="allow", frozen=True)
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[Text], Field(max_length=4)] | None = None
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _nothing_else(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name not in IDLE and value not in NEUTRAL.get(name, ()):
                raise ValueError(f"{name}: this server has no such parameter")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, stops))

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        options = (self.model_extra or {}).get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Said(BaseModel):
    """A message of a conversation; `developer` is another word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def speaker(self) -> str:
        """Its role in a `Message`."""
        return "system" if self.role == "developer" else self.role

    @property
    def text(self) -> str:
        """All of its content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: list[Said] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @property
    def top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class TextAsked(Asked):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)] = ""
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)

    @property
    def top(self) -> int | None:
        return self.logprobs


class ScoreAsked(Body):
    """POST /v1/score: completions of one prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    prompt: str = ""
    completion: str | Annotated[list[str], Field(min_length=1, max_length=64)]

    @property
    def completions(self) -> list[str]:
        return [self.completion] if isinstance(self.completion, str) else self.completion


class Form:
    """The reply to one request, in the shape of its endpoint."""

    def __init__(self, chat: bool, model: str, fingerprint: str, logprobs: bool) -> None:
        self.chat, self.logprobs = chat, logprobs
        identity = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.head: dict[str, Any] = {"id": identity, "created": int(time.time())}
        self.head |= {"model": model, "system_fingerprint": fingerprint}

    def whole(self, choices: Sequence[tuple[str, Sequence[Token], str]], usage: dict[str, Any]) -> dict[str, Any]:
        """All choices, (text, tokens, finish) each."""
        made = []
        for index, (text, tokens, finish) in enumerate(choices):
            told = self._logprobs(tokens, 0)
            body: dict[str, Any] = {"text": text}
            if self.chat:
                body = {"message": {"role": "assistant", "content": text, "refusal": None}}
            made.append({"index": index, **body, "logprobs": told, "finish_reason": finish})
        return {**self.head, "object": self._kind(), "choices": made, "usage": usage}

    def opening(self, index: int) -> dict[str, Any]:
        """The chunk of a chat's stream that begins a choice."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def piece(self, index: int, piece: Piece, offset: int) -> dict[str, Any]:
        """A chunk of a stream; `offset`: characters of the choice before it."""
        body: dict[str, Any] = {"text": piece.text}
        if self.chat:
            body = {"delta": {"content": piece.text} if piece.text or not piece.finish else {}}
        return self._chunk(index, body, self._logprobs(piece.tokens, offset), piece.finish)

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk that counts tokens."""
        return {**self.head, "object": self._kind(chunk=True), "choices": [], "usage": usage}

    def _chunk(self, index: int, body: dict[str, Any], told: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": index, **body, "logprobs": told, "finish_reason": finish}
        return {**self.head, "object": self._kind(chunk=True), "choices": [choice]}

    def _kind(self, chunk: bool = False) -> str:
        if not self.chat:
            return "text_completion"
        return "chat.completion.chunk" if chunk else "chat.completion"

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            content = [
                {**_told(token.text, token.logprob), "top_logprobs": [_told(text, value) for text, value in token.top]}
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(reversed(token.top)) for token in tokens],  # of equal texts the likeliest stays
            "text_offset": offsets,
        }


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    """Tokens of the prompts, and of all choices, their EOS counted."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _told(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}
