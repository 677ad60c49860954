"""The page at /: talk with a model, compare two, see how sure each token was, and keep which answer is better."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse

from ..data.records import Message
from .api import Api
from .app import STATIC
from .schemas import Body, Said


class Keeper(Protocol):
    """Keeps choices; see recipes/served_preferences.py."""

    def add(self, prompt: str, answers: dict[str, str], choice: str, seconds: float, **more: Any) -> int: ...


class Answer(BaseModel):
    """One of two, and whose it is."""

    model_config = ConfigDict(extra="forbid")
    model: str
    text: str


class Preferred(Body):
    """Which answer to a conversation is better; `seconds` after both were there."""

    model_config = ConfigDict(extra="forbid")
    messages: list[Said] = Field(min_length=1)
    left: Answer
    right: Answer
    choice: Literal["left", "right", "tie"]
    seconds: float = Field(ge=0, le=10**7, allow_inf_nan=False)


def page_router(api: Api, keeper: Keeper) -> APIRouter:
    """The page, what it shows of the server, and where its choices go."""
    router = APIRouter()

    @router.get("/")
    def page() -> FileResponse:
        return FileResponse(STATIC / "lab.html")

    @router.get("/lab/models")
    async def models() -> dict[str, Any]:
        return {"models": api.models()}

    @router.post("/lab/preference")
    async def preference(said: Preferred) -> dict[str, Any]:
        turns = [Message(message.speaker, message.text) for message in said.messages]
        sides = {"left": said.left, "right": said.right}

        def keep() -> int:
            # The prompt as the models read it; where they read it each in its own way, what was asked.
            asked = {api.speaker(side.model).render(turns) for side in sides.values()}
            prompt = asked.pop() if len(asked) == 1 else turns[-1].content
            texts = {name: side.text for name, side in sides.items()}
            names = {name: side.model for name, side in sides.items()}
            return keeper.add(prompt, texts, said.choice, said.seconds, shown=names)

        return {"kept": await run_in_threadpool(keep)}

    return router
