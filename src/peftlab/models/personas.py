"""Personas: a name for who answers: a base, adapters on it, a system text and how tokens are chosen. No torch.

It lives beside the catalog, not in chat/: chat and web both speak as personas, and do not import each other. Files are
TOML, NAME.toml in ./personas, in $PEFTLAB_HOME/personas, or shipped; the first folder that has a name gives it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..config import Config, load_config, to_toml, validated
from ..data.pull import cache_home
from ..errors import UserError, did_you_mean
from ..runs.atomic import write_text
from ..runs.names import NAME

SHIPPED = Path(__file__).parent.parent / "personas"
AUTO = "auto"  # not a persona: a classifier picks one by what is asked
RESERVED = (AUTO, "off", ".", "..")
TEXT = "{text}"


class PersonaDecoding(Config):
    """How its tokens are chosen; the fields of sampling's `Decoding`."""

    max_new_tokens: int = Field(default=96, ge=1)
    temperature: float = Field(default=0.7, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)


class Persona(Config):
    """Every key of a persona's file."""

    name: str = Field(description="the file's own, without .toml")
    description: str = Field("", description="one line, for lists")
    base: str = Field(description="the model that its adapters stand on: a name, a folder or a Hub id")
    adapter: str = Field("", description="an adapter, which brings what lies under it; empty: the bare base")
    mix: dict[str, float] = Field({}, description="in the place of `adapter`: plain LoRA adapters and their weights")
    system: str = Field("", description="system text; stands first in every conversation")
    prompt: str = Field("", description="puts each question alone, {text} being what was typed; empty: a conversation")
    reward: str = Field("", description="what /score shows, as in a config of ppo; empty: the chat's own")
    want: Literal["positive", "negative"] = Field("positive", description="what sentiment classifiers in it look for")
    decoding: PersonaDecoding = PersonaDecoding()

    @property
    def weights(self) -> dict[str, float]:
        """Adapter -> weight; empty for the bare base."""
        return dict(self.mix) if self.mix else {self.adapter: 1.0} if self.adapter else {}

    @field_validator("name")
    @classmethod
    def _a_name(cls, name: str) -> str:
        if not NAME.fullmatch(name) or name in RESERVED:
            raise ValueError(f"a name is 1 to 64 letters, digits, '.', '_' or '-', and none of {', '.join(RESERVED)}")
        return name

    @field_validator("base")
    @classmethod
    def _a_base(cls, base: str) -> str:
        if not base.strip():
            raise ValueError("give a model, for example tiny-gpt2 or smollm2-135m")
        return base

    @field_validator("prompt")
    @classmethod
    def _has_a_place(cls, prompt: str) -> str:
        if prompt and prompt.count(TEXT) != 1:
            raise ValueError(f"give {TEXT} once, where what was typed goes")
        return prompt

    @model_validator(mode="after")
    def _one_voice(self) -> Self:
        if self.adapter and self.mix:
            raise ValueError("adapter and mix: give one of them; a mix of one adapter is `adapter`")
        if self.prompt and self.system:
            raise ValueError("system: does nothing where `prompt` puts each question alone; write it into `prompt`")
        return self


def places() -> list[Path]:
    """The folders that personas are looked for in, nearest first."""
    return [Path("personas"), cache_home() / "personas", SHIPPED]


def persona_files() -> dict[str, Path]:
    """Name -> file of every persona that a name reaches, sorted; nothing is read."""
    found: dict[str, Path] = {}
    for place in reversed(places()):
        found |= {path.stem: path for path in place.glob("*.toml")}
    return dict(sorted(found.items()))


def load_persona(name: str) -> Persona:
    """The persona of a name, or of a file that ends in .toml.

    Raises UserError naming the file, the key and the nearest known one. That its models exist is not looked at here.
    """
    path = Path(name)
    if not (path.suffix == ".toml" and path.is_file()):
        files = persona_files()
        if name not in files:
            hint = did_you_mean(name, files) or f"there are {', '.join(files)}"
            raise UserError(f"persona {name!r}: no such persona; {hint}")
        path = files[name]
    persona = load_config(Persona, str(path))
    if persona.name != path.stem:
        raise UserError(f"{path}: name: {persona.name!r}, but its file is called {path.name}; they must agree")
    return persona


def as_file(persona: Persona) -> str:
    """The persona as a file would say it: what is not left out, and its decoding whole."""
    said = persona.model_dump(exclude_defaults=True) | {"decoding": persona.decoding.model_dump()}
    return to_toml(said)


def mix_weights(pairs: Iterable[str]) -> dict[str, float]:
    """Each NAME=WEIGHT in a mapping. Raises UserError for anything else, and for a name given twice."""
    weights: dict[str, float] = {}
    for pair in pairs:
        name, _, number = pair.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = float("nan")
        if not name or not abs(weight) < 1e3:
            raise UserError(f"mix: {pair!r}: give NAME=WEIGHT, for example a=0.7 b=0.3")
        if name in weights:
            raise UserError(f"mix: {name} is given twice")
        weights[name] = weight
    if not weights:
        raise UserError("mix: give NAME=WEIGHT pairs, for example a=0.7 b=0.3")
    return weights


def new_persona(name: str, base: str, adapters: list[str], system: str, description: str, home: bool) -> Path:
    """Write a persona's file to ./personas, or into the home folder; returns its path.

    `adapters`: one stack's name, or NAME=WEIGHT of each in a mix. Raises UserError where a value is wrong, or the file
    is there already.
    """
    said: dict[str, Any] = {"name": name, "description": description, "base": base}
    if adapters and all("=" in adapter for adapter in adapters):
        said["mix"] = mix_weights(adapters)
    elif len(adapters) == 1:
        said["adapter"] = adapters[0]
    elif adapters:
        raise UserError(f"--adapter: {', '.join(adapters)}: give one, or each as NAME=WEIGHT")
    persona = validated(Persona, said | {"system": system}, f"persona {name!r}")
    path = places()[1 if home else 0] / f"{name}.toml"
    if path.exists():
        raise UserError(f"{path}: is there already; edit it, or give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, as_file(persona))
    return path
