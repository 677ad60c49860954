"""What keys a recipe's config has, read off the source: to import a recipe takes the seconds that torch takes.

So a mistyped key is told at once. Whatever else may be wrong with a config is left to its class.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

from ..config import refuse_unknown

HOUSE = Path(__file__).resolve().parents[1]


def check_keys(verb: str, source: str | None, overrides: list[str]) -> None:
    """UserError where there is no such config, where it is another verb's, or where a key is unknown; no torch."""
    refuse_unknown(declared_keys(verb), verb, source, overrides)


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
