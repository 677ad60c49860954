"""OpenAI's API on the lab's models: /v1/models, /v1/chat/completions, /v1/completions; beside it /v1/score, /health."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from ..data.records import Message
from ..errors import PeftlabError
from ..models.per_row import Blend
from ..sampling.continuous import Batch, Row
from ..sampling.sampler import Decoding
from .app import ApiError
from .delivery import deliver, refusals
from .log import facts
from .reply import Reply
from .schemas import Asked, ChatAsked, Form, ScoreAsked, TextAsked
from .worker import Job, Ticket, Worker


@dataclass(frozen=True)
class Speaker:
    """A model that writes text, by the name that requests call it. `render`: a conversation as the text it goes on
    from, or a PeftlabError. `decoding`: what a request gets that names nothing else."""

    name: str
    batch: Batch
    blend: Blend
    render: Callable[[Sequence[Message]], str]
    decoding: Decoding
    fingerprint: str
    about: str = ""

    @property
    def context(self) -> int:
        """Tokens of prompt and reply, at most."""
        return int(self.batch.base.model.config.max_position_embeddings)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        ids: list[int] = self.batch.sampler.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


@dataclass(frozen=True)
class Scorer:
    """A model that scores answers. `score`: prompts and completions to totals, and to the parts of each."""

    name: str
    score: Callable[[Sequence[str], Sequence[str]], tuple[Sequence[float], Mapping[str, Sequence[float]]]]
    about: str = ""


class Api:
    """Requests become tickets of `worker`. `timeout`: seconds from a request's arrival to its end."""

    def __init__(
        self, worker: Worker, speakers: Sequence[Speaker], scorers: Sequence[Scorer] = (), timeout: float = 120.0
    ) -> None:
        self.worker, self.timeout = worker, timeout
        self.served: dict[str, Speaker | Scorer] = {one.name: one for one in speakers}
        self.served |= {one.name: one for one in scorers}
        self._began = int(time.time())

    def speaker(self, name: str) -> Speaker:
        """The model of that name. Raises ApiError where there is none, or one that writes no text."""
        one = self._named(name)
        if isinstance(one, Scorer):
            raise ApiError(400, f"model {name!r}: scores text and writes none", "model")
        return one

    def models(self) -> list[dict[str, Any]]:
        """All models; `kind` is text or score."""
        return [self.told(name) for name in self.served]

    def told(self, name: str) -> dict[str, Any]:
        """A model as /v1/models shows it."""
        one = self._named(name)
        head = {"id": name, "object": "model", "created": self._began, "owned_by": "peftlab"}
        return {**head, "kind": "score" if isinstance(one, Scorer) else "text", "description": one.about}

    async def chat(self, asked: ChatAsked, request: Request) -> Response:
        """A reply to a conversation."""
        speaker, turns = self.speaker(asked.model), [Message(said.speaker, said.text) for said in asked.messages]
        try:
            text = await run_in_threadpool(speaker.render, turns)
        except PeftlabError as error:
            raise ApiError(400, str(error), "messages") from None
        return await self._answer(asked, request, speaker, [text], asked.max_completion_tokens or asked.max_tokens)

    async def complete(self, asked: TextAsked, request: Request) -> Response:
        """Texts that go on from prompts."""
        return await self._answer(asked, request, self.speaker(asked.model), asked.prompts, asked.max_tokens)

    async def score(self, asked: ScoreAsked, request: Request) -> dict[str, Any]:
        """The scores of completions, and their parts."""
        one, given = self._named(asked.model), asked.completions
        if isinstance(one, Speaker):
            raise ApiError(400, f"model {asked.model!r}: writes text and scores none", "model")
        facts(request).update(model=one.name, completions=len(given), texts={"prompt": asked.prompt})
        with refusals():
            scored = self.worker.call(lambda: one.score([asked.prompt] * len(given), given))
            totals, parts = await asyncio.wait_for(scored, self.timeout)
        rows = [{name: values[i] for name, values in parts.items()} for i in range(len(given))]
        data = [{"object": "score", "index": i, "score": totals[i], "parts": row} for i, row in enumerate(rows)]
        return {"object": "list", "model": one.name, "data": data}

    def _named(self, name: str) -> Speaker | Scorer:
        if name not in self.served:
            known = ", ".join(self.served)
            raise ApiError(404, f"model {name!r}: not served here; there is {known}", "model", "model_not_found")
        return self.served[name]

    async def _answer(
        self,
        asked: ChatAsked | TextAsked,
        request: Request,
        speaker: Speaker,
        prompts: Sequence[str | list[int]],
        most: int | None,
    ) -> Response:
        deadline = asyncio.get_running_loop().time() + self.timeout
        encoded = [await run_in_threadpool(speaker.encode, p) if isinstance(p, str) else p for p in prompts]
        ticket, tokens = self._ticket(asked, speaker, encoded, most), sum(map(len, encoded))
        facts(request).update(
            model=speaker.name,
            prompt_tokens=tokens,
            choices=len(ticket.jobs),
            stream=asked.stream,
            ticket=ticket,
            texts={"prompt": prompts},
        )
        form = Form(isinstance(asked, ChatAsked), speaker.name, speaker.fingerprint, asked.top is not None)
        with refusals():
            self.worker.submit(ticket)
        return await deliver(request, ticket, form, tokens, deadline, asked.stream, asked.usage_wanted)

    def _ticket(
        self, asked: ChatAsked | TextAsked, speaker: Speaker, prompts: Sequence[list[int]], most: int | None
    ) -> Ticket:
        """A row for each choice of each prompt; choice i draws from seed + i."""
        rows = len(prompts) * asked.n
        if rows > self.worker.capacity:
            raise ApiError(400, f"{rows} choices; this server takes {self.worker.capacity} at a time", "n")
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        ticket, sampler = Ticket(speaker.batch), speaker.batch.sampler
        for index in range(rows):
            ids = prompts[index // asked.n]
            decoding = _decoding(asked, speaker, ids, most)
            row = Row(ids, (seed + index) % 2**63, decoding, speaker.blend, asked.top)
            reply = Reply(sampler.text, asked.stops, sampler.eos_id, decoding.max_new_tokens)
            ticket.jobs.append(Job(row, reply, ticket, index))
        return ticket


def api_router(api: Api) -> APIRouter:
    """The routes of programs."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "running": api.worker.running, "waiting": api.worker.waiting}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": api.models()}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return api.told(name)

    router.add_api_route("/v1/chat/completions", api.chat, methods=["POST"], response_model=None)
    router.add_api_route("/v1/completions", api.complete, methods=["POST"], response_model=None)
    router.add_api_route("/v1/score", api.score, methods=["POST"], response_model=None)
    return router


def _decoding(asked: Asked, speaker: Speaker, ids: Sequence[int], most: int | None) -> Decoding:
    """What a request says of decoding, filled up with what its model brings. Raises ApiError for what has no room."""
    place = "messages" if isinstance(asked, ChatAsked) else "prompt"
    room, own = speaker.context - max(1, len(ids)), speaker.decoding
    if room < (most or 1):
        reply = f"a reply of {most} tokens" if most else "a reply"
        told = f"{len(ids)} tokens and {reply} exceed the context of {speaker.context}"
        raise ApiError(400, told, place, "context_length_exceeded")
    vocabulary = speaker.batch.base.model.config.vocab_size
    if any(token >= vocabulary for token in ids):
        raise ApiError(400, f"a token id is beyond the vocabulary of {vocabulary}", place)
    return Decoding(
        most or min(own.max_new_tokens, room),
        own.temperature if asked.temperature is None else asked.temperature,
        own.top_k if asked.top_k is None else asked.top_k,
        own.top_p if asked.top_p is None else asked.top_p,
    )
