"""A chat at the terminal: the voices that a command line names, and where turns come from."""

from __future__ import annotations

from ..chat.keyboard import keyboard
from ..chat.router import Router
from ..chat.session import Session, default_decoding
from ..chat.terminal import Terminal
from ..chat.voices import Cast
from ..data.pull import cache_home
from ..errors import UserError
from ..models.catalog import resolve
from ..models.mix import check_member
from ..models.personas import AUTO, load_persona

DEFAULT = "smollm2-135m"


def open_chat(
    stack: str | None, persona: str | None, system: str, seed: int, device: str, reward: str, router: str
) -> Terminal:
    """A chat with a persona, or with a model or adapter; one named beside a persona is loaded, ready for /adapter."""
    cast = Cast(device)
    picked = Router.load(router, device) if persona == AUTO else None
    if picked is not None:
        persona = picked.classifier.labels[0]  # until the first turn
    if stack and persona:
        cast.stack(stack)
    voice = cast.persona(persona) if persona else cast.stack(stack or DEFAULT)
    told = system or (voice.persona.system if voice.persona else "")
    session = Session(voice, default_decoding(voice), told, seed)
    read = keyboard(cache_home() / "chat-history", lambda line: terminal.words(line))
    terminal = Terminal(session, read, cast=cast, reward=reward, router=picked or router)
    return terminal


def check_persona(name: str) -> str:
    """Why a persona cannot speak; empty where it can. Adapters are hashed and compared; no weights load."""
    try:
        persona = load_persona(name)
        if resolve(persona.base).kind != "causal":
            raise UserError(f"base: {persona.base} is no causal language model")
        for adapter in persona.weights:
            check_member(persona.base, adapter, mixed=bool(persona.mix))
    except UserError as error:
        return str(error)
    return ""
