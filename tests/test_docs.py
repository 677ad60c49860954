"""What documents and help tell can be typed: commands, configs, keys, links, paths and Python; and they tell the same
verbs. docs/metrics.md has its own test in test_runs_metrics.py, the README's commands run in test_readme.py."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from commands import peftlab

from peftlab import cli
from peftlab.config import keys, load_config, shipped_configs
from peftlab.errors import UserError
from peftlab.recipes import RECIPES, load

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
}
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```", re.M | re.S)
GROUP = typer.main.get_command(cli.app)
COMMAND = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?peftlab ")
DEFINITIONS = runpy.run_path(str(ROOT / "docs" / "conf.py"))["definitions"]
# Capitals stand for what the reader fills in: NAME, FILE, KIND.
BLANK = re.compile(r"^[A-Z]{2,}$")


def commands() -> Iterator[tuple[str, str, str]]:
    """(page, command, the line below it) of every `peftlab ...` in a code block."""
    for page, text in PAGES.items():
        for _, block in FENCE.findall(text):
            lines = block.replace("\\\n", " ").splitlines()
            for line, below in zip(lines, [*lines[1:], ""], strict=True):
                if COMMAND.match(line):
                    yield page, COMMAND.sub("", line), below


def inline() -> Iterator[tuple[str, str]]:
    """(page, command) of every `peftlab ...` in running text."""
    for page, text in PAGES.items():
        for command in re.findall(r"(?<!`)`peftlab ([^`]+)`(?!`)", FENCE.sub("", text)):
            yield page, command


TYPED = list(commands())
REFUSED = [(page, line, below) for page, line, below in TYPED if below.startswith("peftlab: ")]
GOOD = [(page, line) for page, line, below in TYPED if not below.startswith("peftlab: ")]


def parsed(line: str) -> tuple[str, dict]:
    """The verb and its parameters; an AssertionError where the verb, an option or an argument does not exist."""
    words, command = shlex.split(line, comments=True), GROUP
    while hasattr(command, "commands") and (words or not command.invoke_without_command):
        verb = words.pop(0)
        assert verb in command.commands, f"{line}: no verb {verb}"
        command = command.commands[verb]
    try:
        return verb, command.make_context(verb, words).params
    except Exception as error:  # the classes of click's errors move between versions of typer
        raise AssertionError(f"{line}: {error}") from error


def check(line: str) -> None:
    """Raises where a command could not be typed: unknown verb or option, config, key or value."""
    verb, params = parsed(line)
    if verb in RECIPES and not BLANK.match(params["config"] or ""):
        config, pairs = params["config"], list(params["overrides"] or [])
        if config and "=" in config:
            config, pairs = None, [config, *pairs]
        load_config(load(verb).CONFIG, config, pairs)
    if verb == "configs" and params["name"]:
        assert params["name"] in shipped_configs()


def test_there_is_something_to_check():
    assert {"README.md", "CONTRIBUTING.md", "docs/metrics.md"} <= set(PAGES)
    assert len(GOOD) > 8 and len(list(inline())) > 3
    assert {"sft", "ppo", "predict", "chat"} <= {line.split()[0] for _, line in GOOD}


@pytest.mark.parametrize(("page", "line"), GOOD)
def test_a_command_in_a_code_block_can_be_typed(page, line):
    check(line)


@pytest.mark.parametrize(("page", "line"), list(inline()))
def test_a_command_in_running_text_names_a_verb(page, line):
    words, command = line.split(), GROUP
    while words and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    if words and not any(BLANK.match(word) for word in words):
        check(line)


@pytest.mark.parametrize(("page", "line", "message"), REFUSED)
def test_a_command_shown_with_its_error_gives_that_error(page, line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = peftlab(line)
    assert outcome.code == 2
    shown = " ".join(PAGES[page].split(message)[1].split("```")[0].split())  # an error may go on over several lines
    assert " ".join(outcome.err.split()) in f"{message} {shown}"


@pytest.mark.parametrize(
    "line",
    ["sfd x", "sft sft-tyni", "sft model=a setps=3", "predict a --txt b", "predict", "eval x --limit z", "ppo lr=0"],
)
def test_a_command_that_cannot_be_typed_is_found(line):
    with pytest.raises((UserError, AssertionError)):
        check(line)


def verbs(group=GROUP, *outer: str) -> Iterator[tuple[str, object]]:
    """("data check", its command) of every verb and group of verbs."""
    for name, command in group.commands.items():
        yield " ".join([*outer, name]), command
        if hasattr(command, "commands"):
            yield from verbs(command, *outer, name)


VERBS = dict(verbs())


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_every_help_shows_examples_that_can_be_typed(verb):
    title, *lines = VERBS.get(verb, GROUP).epilog.split("\n\n")
    assert title.rstrip("s:") == "Example" and lines
    for line in lines:
        assert f"{line} ".startswith(f"peftlab {verb} ".replace("  ", " ")), line
        check(COMMAND.sub("", line))
    shown = " ".join(peftlab(f"{verb} --help").out.split())
    assert all(line in shown for line in lines)


def test_the_documents_show_every_verb():
    told = [line for _, line, _ in TYPED] + [line for _, line in inline()]
    assert [verb for verb in VERBS if not any(f"{line} ".startswith(f"{verb} ") for line in told)] == []


def test_every_page_stands_in_one_toctree():
    index = PAGES["docs/index.md"]
    trees = [body.splitlines() for kind, body in FENCE.findall(index) if kind == "{toctree}"]
    lines = [line for tree in trees for line in tree if line and not line.startswith(":")]
    listed = [re.sub(r".*<(.+)>", r"\1", line) for line in lines]  # TITLE <PAGE>
    pages = [name.removeprefix("docs/").removesuffix(".md") for name in PAGES if name.startswith("docs/")]
    assert sorted(["index", *listed]) == sorted(pages)
    assert [page for page in listed if f"]({page}.md)" not in index] == [], "a repository's reader sees no toctree"


def slug(heading: str) -> str:
    """The anchor of a heading, as the forges make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def anchors(path: Path) -> set[str]:
    """What a link may name behind a #: headings of a page, functions and classes of a program."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return {name for name, _ in DEFINITIONS(ast.parse(text))}
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", PAGES[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        path = (ROOT / page).parent / place if place else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page}: {target}"


def test_pictures_are_shown_told_of_and_small():
    """Each picture stands in a page, with words for whoever does not see it; the clone stays small."""
    shown = {}
    for page, text in PAGES.items():
        for words, target in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", text):
            shown[((ROOT / page).parent / target).resolve()] = words
    there = sorted((ROOT / "docs/pictures").iterdir())
    assert there and set(there) == set(shown)
    assert [path.name for path in there if path.stat().st_size > 165_000] == []
    assert sum(path.stat().st_size for path in there) < 630_000
    assert all(len(words.split()) > 8 for words in shown.values())


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"LOG.md"}))
def test_files_of_ours_that_are_named_exist(page):
    """`rl/ppo.py` and such, from the repository's root, the package or the page's folder. LOG.md tells of the past."""
    text = FENCE.sub("", PAGES[page])
    for name in re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|toml|md))`", text):
        homes = (ROOT, ROOT / "src", ROOT / "src/peftlab", (ROOT / page).parent)
        assert any((home / name).exists() for home in homes), f"{page}: {name}"


@pytest.mark.parametrize("page", PAGES)
def test_python_in_code_blocks_compiles(page):
    for language, block in FENCE.findall(PAGES[page]):
        if language in ("python", "py"):
            ast.parse(block)


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    named = set()
    for text in PAGES.values():
        named |= set(re.findall(r"`make ([a-z][\w-]*)", FENCE.sub("", text)))
        blocks = "".join(block for _, block in FENCE.findall(text))
        named |= set(re.findall(r"^make ([a-z][\w-]*)", blocks, re.M))
    assert named and named <= targets


VERBS_OF = {
    "PPOConfig to `ppo`": ["ppo"],
    "RLOOConfig and GRPOConfig to `rloo`": ["rloo"],
    "DPOConfig, RewardConfig, SFTConfig": ["sft", "dpo", "reward"],
}


def test_every_key_of_ppo_is_explained():
    missing = [key for key in keys(load("ppo").CONFIG) if key != "recipe" and f"`{key}`" not in PAGES["docs/ppo.md"]]
    assert not missing


def test_a_key_of_trl_is_answered_with_ours_as_its_page_says():
    told = 0
    for title, rows in re.findall(r"\n## (.*?)\n(.*?)(?=\n## |\Z)", PAGES["docs/from-trl.md"], re.S):
        for theirs, ours in re.findall(r"^\| `(\w+)` \| `(\w+)` \|", rows, re.M):
            verbs = [verb for verb in VERBS_OF[title] if ours in keys(load(verb).CONFIG)]
            assert verbs, (theirs, ours)
            for verb in verbs if theirs != ours else []:
                with pytest.raises(UserError, match=f"unknown key {theirs}; did you mean {ours}\\?"):
                    load_config(load(verb).CONFIG, None, [f"{theirs}=1"])
                told += 1
    assert told > 30


def test_setup_ends_with_what_to_do_next():
    """`-o` takes the stamp as it is, so that nothing is installed here."""
    made = subprocess.run(
        ["make", "-C", str(ROOT), "-o", ".venv/.stamp", "--no-print-directory", "setup"], capture_output=True, text=True
    )
    (line,) = made.stdout.splitlines()
    assert made.returncode == 0 and "source .venv/bin/activate && peftlab" in line and "make demo" in line
