"""What keys a recipe's config has and which values they take, read off the source: to import a recipe takes seconds.

So a mistyped key or value is told at once. What takes code to judge, as keys that do not go together, is left to the
config's own class.
"""

from __future__ import annotations

import ast
import itertools
import shlex
from collections.abc import Sequence
from functools import cache, partial
from importlib.util import resolve_name
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, create_model

from ..config import Config, elsewhere, keys, load_config
from ..data import sources
from ..errors import UserError, did_you_mean
from ..models import catalog

MODELS = ("model", "judge")  # keys that name a model or an adapter
DATA = ("train_data", "eval_data", "ood_data", "prompts")
HOUSE = Path(__file__).resolve().parents[1]


def check_config(verb: str, source: str | None, overrides: list[str]) -> Config:
    """The errors of `load_config` with the verb's config that need nothing but its keys' annotations; no torch."""
    return load_config(declared(verb), source, overrides)


def check_names(config: Config) -> None:
    """UserError where a model or data of a config are not there, as far as neither torch nor the Hub is to tell."""
    for known, keys_of in ((catalog.require_known, MODELS), (sources.require_known, DATA)):
        for name in (getattr(config, key, "") for key in keys_of):
            if name:
                known(name)


def refuse_options(verb: str, words: Sequence[str], options: Sequence[str]) -> None:
    """UserError where one of the words after a verb that trains looks like an option, which none of `options` is.

    Where it is a key of the config, here or in another recipe, the message is the key=value to type instead.
    """
    for word, following in itertools.pairwise([*words, ""]):
        if not word.startswith("-"):
            continue
        name, equals, value = word.partition("=")
        key, known = name.lstrip("-").replace("-", "_"), declared_keys(verb)
        key = elsewhere(known).get(key, key)
        if key in known:
            if not equals:
                value = "VALUE" if not following or following.startswith("--") or "=" in following else following
            pair = shlex.quote(f"{key}={value}")
            raise UserError(f"no option {name}; a key of the config is given without dashes: {pair}")
        if inner := [one for one in known if one.startswith(f"{key}.")]:
            raise UserError(f"no option {name}; a table of the config, whose keys are given as in {inner[0]}=VALUE")
        remedy = did_you_mean(name, options, 0.75) or f"`peftlab {verb} --help` lists the options"
        raise UserError(f"no option {name}; {remedy}")


def declared_keys(verb: str) -> list[str]:
    """Every key of the config of a verb that trains, with dots for tables, as `config.keys` of its class gives them."""
    return keys(declared(verb))


@cache
def declared(verb: str) -> type[Config]:
    """The config of a verb that trains as its source declares it: names, types and bounds, without its validators."""
    return _made(_fields(f"{__package__}.{verb}", "CONFIG"))


def _made(fields: dict[str, Any]) -> type[Config]:
    made: type[Config] = create_model("Declared", __base__=Config, **fields)
    return made


def _fields(module: str, name: str) -> dict[str, Any]:
    """What `name` means in a module of ours: its keys, those of its bases first; none where it is no config."""
    place, node = _defined(module, name)
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
        return _fields(place, node.value.id)
    if not isinstance(node, ast.ClassDef):
        return {}
    found = {key: field for base in node.bases for key, field in _fields(place, ast.unparse(base)).items()}
    lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
    own = [line for line in lines if "ClassVar" not in ast.unparse(line.annotation)]
    return found | {ast.unparse(line.target): _field(place, line) for line in own}


def _field(module: str, line: ast.AnnAssign) -> tuple[Any, Any]:
    """Annotation and default of a key; (Any, None), which takes every value, where they name what is no constant."""
    value = line.value
    if inner := _fields(module, ast.unparse(line.annotation)):
        table, words = _made(inner), value.keywords if isinstance(value, ast.Call) else []
        return table, Field(default_factory=partial(table, **{str(w.arg): _value(module, w.value) for w in words}))
    if isinstance(value, ast.Call):  # what a key is for may be told by what is no constant
        value = ast.Call(value.func, value.args, [word for word in value.keywords if word.arg != "description"])
    try:
        return _value(module, line.annotation), _value(module, value) if value else ...
    except NameError:
        return Any, None


def _value(module: str, node: ast.expr) -> Any:
    """What an expression of our own source is worth, of builtins the types alone."""
    return eval(ast.unparse(node), {"__builtins__": {}}, _Names(module))


class _Names(dict[str, Any]):
    """What the names in a module mean, as far as annotations and their bounds take them: types and constants."""

    def __init__(self, module: str) -> None:
        super().__init__({kind.__name__: kind for kind in (bool, dict, float, int, list, str, tuple)})
        self |= {"Any": Any, "Field": Field, "Literal": Literal}
        self.module = module

    def __missing__(self, name: str) -> Any:
        place, node = _defined(self.module, name)
        if isinstance(node, ast.Assign):
            return _value(place, node.value)
        raise KeyError(name)


def _defined(module: str, name: str) -> tuple[str, ast.stmt | None]:
    """The statement that gives a name its meaning in a module of ours, and the module it stands in."""
    for node in _statements(module):
        if isinstance(node, ast.ImportFrom) and node.level and name in [alias.name for alias in node.names]:
            return _defined(resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0]), name)
        if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
            return module, node
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    return module, None


@cache
def _statements(module: str) -> list[ast.stmt]:
    file = HOUSE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []  # a package has none of its own
