"""The page on which a person labels pairs. Every choice is on disk before its reply; a stale one changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import FileResponse

from ..data.labels import Journal
from .app import STATIC


class Turn(BaseModel):
    """`position`: the state of the journal that a tab shows."""

    model_config = ConfigDict(extra="forbid")
    position: int


class Said(Turn):
    """A choice for the pair `id`, made `seconds` after it was shown."""

    id: str
    choice: Literal["left", "right", "tie", "skip"]
    seconds: float = Field(ge=0, le=10**7, allow_inf_nan=False)


def label_router(
    journal: Journal, file: str, summary: Callable[[], dict[str, Any]], finish: Callable[[], None]
) -> APIRouter:
    """Routes below /label: the page, the state of the work, and what changes it.

    `file` is the name to show, `summary()` the counts so far, `finish()` ends the server. A reply never tells which
    answer of a pair is the chosen one.
    """
    router, lock = APIRouter(prefix="/label"), threading.Lock()

    def state() -> dict[str, Any]:
        pair = journal.current()
        told = None if pair is None else {"id": pair.record.id, "prompt": pair.record.prompt, **journal.sides(pair)}
        done, total = len(journal.choices), len(journal.pairs)
        return {
            "file": file, "position": journal.position, "done": done, "total": total, "pair": told,
            "summary": summary(),
        }

    def fresh(turn: Turn) -> None:
        if turn.position != journal.position:
            raise HTTPException(409, "another tab went on in the meantime; nothing was written")

    @router.get("")
    def page() -> FileResponse:
        return FileResponse(STATIC / "label.html")

    @router.get("/state")
    def show() -> dict[str, Any]:
        with lock:
            return state()

    @router.post("/choose")
    def choose(said: Said) -> dict[str, Any]:
        with lock:
            fresh(said)
            pair = journal.current()
            if pair is None or pair.record.id != said.id:
                raise HTTPException(409, "this is not the pair to label now; nothing was written")
            journal.choose(said.choice, said.seconds)
            return state()

    @router.post("/undo")
    def undo(turn: Turn) -> dict[str, Any]:
        with lock:
            fresh(turn)
            if not journal.undo():
                raise HTTPException(409, "there is nothing to take back")
            return state()

    @router.post("/finish")
    def end(turn: Turn) -> dict[str, Any]:
        with lock:
            fresh(turn)
            finish()
            return state()

    return router
