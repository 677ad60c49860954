"""What keys a recipe's config has, read off the source: to import a recipe takes the seconds that torch takes.

So a mistyped key is told at once. Whatever else may be wrong with a config is left to its class.
"""

from __future__ import annotations

import ast
import itertools
import shlex
from collections.abc import Sequence
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

from ..config import ELSEWHERE, refuse_unknown
from ..errors import UserError, did_you_mean

HOUSE = Path(__file__).resolve().parents[1]


def check_keys(verb: str, source: str | None, overrides: list[str]) -> None:
    """UserError where there is no such config, where it is another verb's, or where a key is unknown; no torch."""
    refuse_unknown(declared_keys(verb), verb, source, overrides)


def refuse_options(verb: str, words: Sequence[str], options: Sequence[str]) -> None:
    """UserError where one of the words after a verb that trains looks like an option, which none of `options` is.

    Where it is a key of the config, here or in another recipe, the message is the key=value to type instead.
    """
    for word, following in itertools.pairwise([*words, ""]):
        if not word.startswith("-"):
            continue
        name, equals, value = word.partition("=")
        key, known = name.lstrip("-").replace("-", "_"), declared_keys(verb)
        key = key if key in known else ELSEWHERE.get(key, key)
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
    return _keys(f"{__package__}.{verb}", "CONFIG")


def _keys(module: str, name: str) -> list[str]:
    """The keys of what `name` means in a module of ours, those of its bases included; none where it is no config."""
    for node in _statements(module):
        if isinstance(node, ast.ImportFrom) and node.level and name in [alias.name for alias in node.names]:
            return _keys(resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0]), name)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and name in map(ast.unparse, node.targets):
            return _keys(module, node.value.id)
        if isinstance(node, ast.ClassDef) and node.name == name:
            found = [key for base in node.bases for key in _keys(module, ast.unparse(base))]
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
                    key = ast.unparse(line.target)
                    found += [f"{key}.{inner}" for inner in _keys(module, ast.unparse(line.annotation))] or [key]
            return list(dict.fromkeys(found))
    return []


@cache
def _statements(module: str) -> list[ast.stmt]:
    file = HOUSE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")).body
