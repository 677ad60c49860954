"""Readable config files: TOML plus `key=value` overrides become frozen, typed, strict models.

Knows the machinery and no job: each recipe declares its own `Config` subclass next to its code.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import UserError, did_you_mean

SHIPPED = Path(__file__).parent / "configs"
DATA = (".jsonl", ".csv", ".parquet")  # what no config ends in, but a newcomer may give in its place


class Config(BaseModel):
    """Base of every config: immutable; unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def with_(self, **changes: Any) -> Self:
        """A validated copy with some keys changed; a dict value changes a table key by key."""
        data = self.model_dump()
        for key, value in changes.items():
            data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data[key], dict) else value
        return type(self).model_validate(data)


C = TypeVar("C", bound=Config)


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every config that comes with the package."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def headlines() -> dict[str, str]:
    """Name -> the first line of every shipped config: what it trains, and "made for a GPU" where it is."""
    return {
        name: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        for name, path in shipped_configs().items()
    }


def command_for(run: str) -> str:
    """The command that makes the run of this name, where a shipped config is called alike; else nothing."""
    path = shipped_configs().get(run)
    return f"peftlab {tomllib.loads(path.read_text(encoding='utf-8'))['recipe']} {run}" if path else ""


def is_config(source: str) -> bool:
    """Whether this looks like a config: a TOML file, there or not, or a shipped name."""
    return source.lower().endswith(".toml") or source in shipped_configs()


def recipe_in(source: str) -> str:
    """The recipe that a config says it is for; empty where it says none. UserError where it cannot be read."""
    return str(_read(Config, None, source, ())[0].get("recipe", ""))


def load_config(cls: type[C], source: str | None, overrides: Sequence[str] = ()) -> C:
    """Read `source` (a TOML file, or a shipped name; None = the defaults) and apply `key=value` overrides.

    Raises UserError naming the file or the override, the key, and the nearest known key.
    """
    recipe = cls.model_fields["recipe"].default if "recipe" in cls.model_fields else None
    data, origin = _read(cls, recipe, source, overrides)
    return validated(cls, data, origin)


def validated(cls: type[C], data: Mapping[str, Any], origin: str) -> C:
    """`data` as a config. Raises UserError naming `origin`, each wrong key and the nearest known one."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(_explain(cls, e) for e in error.errors())) from None


def to_toml(config: Config | Mapping[str, Any]) -> str:
    """The resolved config, or its `model_dump`, as TOML that `load_config` reads back to an equal model."""
    tables: list[str] = []
    lines = _lines(config.model_dump(exclude_none=True) if isinstance(config, Config) else config, tables)
    return "\n".join(lines + tables) + "\n"


def keys(cls: type[Config], prefix: str = "") -> list[str]:
    """Every key of a config class, with dots for tables."""
    names: list[str] = []
    for name, field in cls.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Config):
            names += keys(inner, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _read(
    cls: type[Config], recipe: str | None, source: str | None, overrides: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """What a file and the overrides say, not yet looked at, and where most of it is from."""
    data: dict[str, Any] = {}
    origin = "the command line"
    if source is not None:
        path = _find(source)
        origin = str(path) if path.parent != SHIPPED else source
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{origin}: not valid TOML: {error}") from None
    if recipe is not None and data.get("recipe", recipe) != recipe:
        raise UserError(f"{origin}: this config is for `peftlab {data['recipe']}`, not for `peftlab {recipe}`")
    for override in overrides:
        _apply(cls, data, override)
    return data, origin


def _find(source: str) -> Path:
    path = Path(source)
    if path.suffix.lower() in DATA:
        raise UserError(f"config {source}: is data, not a config; a job takes it by a key, as in train_data={source}")
    if path.is_file():
        return path
    shipped = shipped_configs()
    if source in shipped:
        return shipped[source]
    hint = did_you_mean(source, shipped) or f"shipped configs: {', '.join(shipped)}"
    raise UserError(f"config {source}: no such file and no shipped config of that name; {hint}")


def _apply(cls: type[Config], data: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise UserError(f"override {override!r}: expected key=value, for example lr=1e-4 or lora.r=8")
    kind: Any = cls
    *tables, last = name.strip().split(".")
    for table in tables:
        kind = _kind(kind, table)
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise UserError(f"override {override!r}: {table} is not a table")
    data[last] = _names(text.strip(), _kind(kind, last))


def _kind(cls: Any, key: str) -> Any:
    """The annotation of a config's key; None where it has no such key, or is no config."""
    known = isinstance(cls, type) and issubclass(cls, Config) and key in cls.model_fields
    return cls.model_fields[key].annotation if known else None


def _names(text: str, kind: Any) -> Any:
    """An override's value; where the key takes a list of strings, a,b,c and [a, b, c] are one too."""
    value = _value(text)
    choices = [c for part in get_args(kind) if get_origin(part) is Literal for c in get_args(part)]
    if (kind != list[str] and list[str] not in get_args(kind)) or isinstance(value, list) or value in choices:
        return value
    inside = value if isinstance(value, str) else text
    if inside.startswith("[") and inside.endswith("]"):
        inside = inside[1:-1]
    items = [part.strip() for part in inside.split(",")] if inside.strip() else []
    return [item if isinstance(item := _value(part), str) else part for part in items]


def _value(text: str) -> Any:
    """An override's value by TOML's rules; what is no TOML value is a string (so quotes are optional)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# Where pydantic says the same twice.
PLAIN = {"float_parsing": "a number", "int_parsing": "an integer", "bool_parsing": "true or false"}


def _explain(cls: type[Config], error: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return _unknown(key, keys(cls))
    if error["type"] == "model_type":
        inner = next(name for name in keys(cls) if name.startswith(f"{key}."))
        return f"{key}: is a table; set a key of it, as in {inner}={error['input']!r}"
    if error["type"] in PLAIN:
        return f"{key}: is to be {PLAIN[error['type']]}, not {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}, not {error['input']!r}" if key else message


# What a key goes by in another recipe, in transformers, PEFT or TRL (docs/from-trl.md), where its spelling is no help.
_CALLED = {
    "steps": "max_steps total_episodes", "max_steps": "steps", "lr": "learning_rate", "train_data": "data",
    "prompts_per_step": "batch_size per_device_train_batch_size", "warmup_fraction": "warmup_ratio",
    "batch_size": "prompts_per_step per_device_train_batch_size", "minibatch_size": "num_mini_batches",
    "accumulate": "gradient_accumulation_steps", "epochs": "num_train_epochs num_ppo_epochs num_iterations",
    "model": "model_name_or_path sft_model_path", "reward": "reward_model_path reward_weights",
    "max_new_tokens": "response_length max_completion_length", "eos_penalty": "missing_eos_penalty",
    "kl_coef": "beta", "kl_target": "target_kl", "clip": "cliprange epsilon",
    "value_clip": "cliprange_value", "value_coef": "vf_coef",
    "samples_per_prompt": "num_generations k", "scale_by_std": "scale_rewards", "length_normaliser": "loss_type",
    "loss": "loss_type", "centre": "center_rewards_coefficient", "columns": "dataset_text_field",
    "lora.alpha": "lora_alpha", "lora.targets": "target_modules", "lora.dropout": "lora_dropout", "lora.r": "r",
    "lora.rslora": "use_rslora", "lora.dora": "use_dora",
}  # fmt: skip


def elsewhere(known: Iterable[str]) -> dict[str, str]:
    """What some of the keys `known` go by elsewhere, and the key; no name that is a key here too."""
    known = set(known)
    return {name: key for key, names in _CALLED.items() if key in known for name in names.split() if name not in known}


def _unknown(key: str, known: Sequence[str]) -> str:
    called = elsewhere(known)
    if near := get_close_matches(key, [*called, *known], 1, 0.6):
        return f"unknown key {key}; did you mean {called.get(near[0], near[0])}?"
    return f"unknown key {key}; known keys: {', '.join(known)}"


def _lines(table: Mapping[str, Any], tables: list[str], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in table.items():
        if isinstance(value, Mapping) and not prefix:
            tables += ["", f"[{key}]", *_lines(value, tables, f"{key}.")]
        else:
            lines.append(f"{_key(key)} = {_literal(value)}")
    return lines


def _key(key: str) -> str:
    """A key as TOML spells it: in quotes, where it holds more than letters, digits, _ and -."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _literal(key)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = "".join(
            {'"': '\\"', "\\": "\\\\"}.get(c, c) if c.isprintable() or ord(c) > 0x9F else f"\\u{ord(c):04x}"
            for c in value
        )
        return f'"{escaped}"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_literal(v)}" for k, v in value.items()) + " }"
    if isinstance(value, Iterable):
        return "[" + ", ".join(_literal(v) for v in value) + "]"
    return repr(value)
