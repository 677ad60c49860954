"""The house rules of DESIGN.md and README.md, read off the source: arrows, keys that count, docstrings, the tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import peftlab
from peftlab.config import keys, load_config, shipped_configs
from peftlab.recipes import RECIPES, load

ROOT = Path(__file__).resolve().parent.parent
HOUSE = Path(peftlab.__file__).parent
# Each storey may use those after it; the packages that share one do not know each other.
STOREYS = [{"cli"}, {"recipes"}, {"training", "rl", "evaluation", "chat", "web"}, {"rewards"}, {"sampling"}, {"models"}]
STOREYS += [{"data"}, {"ops"}]
STOREY = {package: level for level, packages in enumerate(STOREYS) for package in packages}
ANYWHERE = {"errors", "config", "runs"}  # what every storey may use; `report` is for recipes and cli
RUN_FOLDER = {"runs.rundir", "runs.summary", "runs.lock", "runs.signals", "report"}
DOCUMENTED = {"ops", "rl", "sampling", "rewards", "models"}


def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file; the package itself is "__init__"."""
    names = {}
    for path in sorted(HOUSE.rglob("*.py")):
        parts = path.relative_to(HOUSE).with_suffix("").parts
        names[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported(name: str) -> Iterator[str]:
    """What a module imports anywhere in it: "ops.kl" for ours, "numpy" and such for others as "numpy:"."""
    inside = MODULES[name].relative_to(HOUSE).parent.parts
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = ["peftlab", *inside][: len(inside) + 2 - node.level] if node.level else []
            base = ".".join([*home, *filter(None, [node.module])])
            # `from . import text` and `from .read import Row` look alike: a module counts as itself.
            targets = [f"{base}.{a.name}" if f"{base}.{a.name}"[8:] in MODULES else base for a in node.names]
        else:
            continue
        for target in targets:
            top, _, rest = target.partition(".")
            yield (rest or "__init__") if top == "peftlab" else f"{top}:"


IMPORTS = {name: set(imported(name)) for name in MODULES}


def package(name: str) -> str:
    return name.partition(".")[0]


def breaks(name: str, target: str) -> str | None:
    """Why module `name` may not import `target`, None where it may."""
    here, there = package(name), package(target)
    if here == there and here != "__init__":
        return None
    if target.endswith(":"):
        if here in ("runs", "report") and target in ("torch:", "transformers:", "peft:", "datasets:"):
            return f"{here} knows no {target[:-1]}"
        alone = ("torch:", "typing:", "__future__:")
        compiles = name == "ops.kernels" and target[:-1] in sys.stdlib_module_names  # its source is a file
        if here == "ops" and target not in alone and not compiles:
            return "ops imports torch only"
        library = target[:-1] not in sys.stdlib_module_names
        return "errors imports nothing of others" if here == "errors" and library else None
    if here in ("errors", "ops", "__init__"):
        return f"{here} imports nothing of the package"
    if here in ("runs", "report", "config"):
        allowed = {"errors"} | ({"runs"} if here == "report" else set())
        return None if there in allowed else f"{here} knows only {allowed}"
    if STOREY[here] > STOREY["recipes"] and any(target == t or target.startswith(t + ".") for t in RUN_FOLDER):
        return "only recipes and cli know the run folder"
    if there in ANYWHERE or there == "report":
        return None
    return None if STOREY[here] < STOREY[there] else f"an arrow from {here} to {there}"


def test_arrows_run_one_way():
    found = {f"{n} imports {t}": why for n, ts in IMPORTS.items() for t in ts if (why := breaks(n, t))}
    assert not found


def test_the_arrows_are_seen():
    """The rule above reads what it should: real arrows, relative ones included, and every package has a place."""
    assert {"ops.masks", "torch:"} <= IMPORTS["models.backbone"]
    assert {"report.text", "runs.metrics"} <= IMPORTS["report.charts"]
    assert {package(name) for name in MODULES} <= STOREY.keys() | ANYWHERE | {"report", "__init__"}
    for name, target in [
        ("ops.kl", "models.heads"), ("rl.ppo", "chat.session"), ("models.roles", "recipes.ppo"), ("ops.kl", "numpy:"),
        ("runs.rundir", "torch:"), ("report.page", "recipes.sft"), ("rl.ppo", "runs.rundir"), ("errors", "typer:"),
        ("data.check", "rewards"), ("config", "recipes.sft"), ("sampling.sampler", "report"),
        ("web.label", "runs.lock"), ("web.app", "chat.session"), ("data.labels", "web.app"),
    ]:
        assert breaks(name, target), f"{name} -> {target}"


def test_importing_runs_and_report_loads_no_torch():
    names = [f"peftlab.{name}" for name in MODULES if package(name) in ("runs", "report")]
    code = f"import sys, {', '.join(names)}\nprint(*sorted({{'torch', 'transformers', 'peft'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def reads(name: str) -> set[str]:
    """Attributes that a module reads of what it calls config, settings or lora: "lr", and "lora.r" for a table's."""
    found = set()
    for node in ast.walk(TREES[name]):
        if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)):
            continue
        owner = node.value
        who = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
        if who in ("config", "settings"):
            found.add(node.attr)
        elif who == "lora":
            found.add(f"lora.{node.attr}")
    return found


def below(name: str) -> set[str]:
    """The module and all of ours that it imports, however far down."""
    seen: set[str] = set()
    todo = {name}
    while todo:
        seen |= todo
        todo = {t for module in todo for t in IMPORTS[module] if t in MODULES} - seen
    return seen


@pytest.mark.parametrize("verb", RECIPES)
def test_every_key_of_a_config_is_read(verb):
    known = set(keys(load(verb).CONFIG)) - {"recipe"}  # `recipe` is compared with the verb by load_config
    read = set().union(*(reads(name) for name in below(f"recipes.{verb}")))
    assert known - read == set()
    assert len(known) <= 40
    assert load(verb).CONFIG().recipe == verb


def test_every_setting_of_ppo_is_read_by_it():
    from peftlab.rl.ppo import PPOSettings

    assert PPOSettings.__dataclass_fields__.keys() - (reads("rl.ppo") | reads("rl.trainer")) == set()


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_loads(name):
    import tomllib

    text = shipped_configs()[name].read_text(encoding="utf-8")
    assert text.startswith("# "), "the first line is what `peftlab configs` lists"
    verb = tomllib.loads(text)["recipe"]
    assert load_config(load(verb).CONFIG, name).recipe == verb


def test_the_tree_in_the_readme_is_the_tree():
    blocks = re.findall(r"^```\w*\nsrc/peftlab/\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 1, "one block whose first line is src/peftlab/"
    told = [line.split()[0] for line in blocks[0].splitlines() if line.strip()]
    there = [p.name for p in HOUSE.glob("*.py")]
    there += [f"{p.name}/" for p in HOUSE.iterdir() if p.is_dir() and any(p.rglob("*.*[!c]")) and p.name[0] != "_"]
    assert sorted(told) == sorted(there)


def undocumented() -> Iterator[str]:
    """MODULE, or MODULE:LINE NAME, of what says nothing of itself."""
    for name, tree in TREES.items():
        if not ast.get_docstring(tree):
            yield name
        for node in tree.body:
            known = isinstance(node, ast.ClassDef) or (
                isinstance(node, ast.FunctionDef) and package(name) in DOCUMENTED
            )
            if known and not node.name.startswith("_") and not ast.get_docstring(node):
                yield f"{name}:{node.lineno} {node.name}"


def test_what_is_public_has_a_docstring():
    assert list(undocumented()) == []


# A path of one machine, or the host of a package index: both break elsewhere. URLs of papers and repositories stay.
ELSEWHERE = re.compile(r"(?<![\w.:/])/(?:tmp|work|opt|home|root|Users|mnt|data)/\w|\bpy(?:pi|thonhosted)\.\w|/simple\b")


def test_nothing_names_a_machine_or_an_index():
    files = [p for p in HOUSE.rglob("*") if p.suffix in (".py", ".toml", ".md", ".html", ".css", ".js", ".json")]
    files += [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) < 2000 and ELSEWHERE.search(line)
    ]
    assert not found
    assert ELSEWHERE.search("see " + "/tmp/" + "x") and not ELSEWHERE.search("runs/tmp/x and a/work/b")
