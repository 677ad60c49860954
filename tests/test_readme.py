"""The README's commands in a row, as a reader would type them, on models and data of seconds; its lines of Python; and
the quick half of docs/bring-your-own.md as it is printed.

The README's shell block is run by test_tasks_custom.py; that each command can be typed is test_docs.py's.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tiny
from commands import peftlab

from peftlab.recipes.launch import launch

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## Do it yourself\n")[2].partition("\n## ")[0]
BLOCK = SECTION.split("```")[1]
LINES = [line for line in BLOCK.replace("\\\n", " ").splitlines() if line.startswith("peftlab ")]
# What waits for a browser, and the tests that try it.
ELSEWHERE = {"serve": "test_serve_browser.py", "label": "test_label.py"}
# What is large or comes from a wheel, and what the workshop has in its place.
STAND_INS = {
    "smollm2-135m": "{gpt2}",
    "tiny-gpt2": "{gpt2}",
    "imdb-sentiment": "{reward}",
    "imdb-judge": "{judge}",
    "imdb:test": "{labelled_test}",
    "imdb:train": "{texts}",
}
# Pairs want answers that differ, from a model that writes words, and a score that tells them apart.
PAIRS = {"tiny-gpt2": "tiny-gpt2", "imdb-sentiment": "readme_scores:vowels"}
SCORES = """
def vowels(prompts, completions, records):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]
"""
# Jobs, the keys that the workshop does not fill, and those that it fills beside its own.
OWN = {"reward": {"train_data", "eval_data"}, "dpo": {"train_data", "eval_data"}}  # pairs of the README's own making
MORE = {"ppo": ["reward={reward}", "judge={judge}"], "rloo": ["reward={reward}", "judge={judge}"]}
MORE |= {"dpo": ["judge={judge}"], "sft": [], "reward": [], "classify": []}
# What differs between machines in the output of bring-your-own.md, and what the page leaves out.
MACHINES = r"\.\.\.|^\$ .*|^\w+: done in .*|^eval/(?:ece|loss) .*|\d\.\d+e-07"


def small(line: str, shop: dict[str, str]) -> list[str]:
    """The words of a command behind `peftlab`, with stand-ins, and for a job the keys that make it one of seconds.

    A key that the README gives stays.
    """
    words = shlex.split(line, comments=True)[1:]
    if words[0] == "pull":
        return words
    names = STAND_INS | (PAIRS if "preferences" in words[:2] else {})
    words = [names.get(word, word).format(**shop) for word in words]
    verb = words[0]
    if verb not in MORE:
        return words
    given = {word.partition("=")[0] for word in words} | OWN.get(verb, set())
    pairs = tiny.overrides(shop, verb, *(pair.format(**shop) for pair in MORE[verb]))
    return [*words, *(pair for pair in pairs if pair.partition("=")[0] not in given)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    """The workshop, and two classifiers."""
    root = tmp_path_factory.mktemp("readme")
    shop = tiny.workshop(root)
    for name, seed in (("reward", 1), ("judge", 2)):
        launch("classify", None, tiny.overrides(shop, "classify", f"seed={seed}"), root / "runs", name)
        shop[name] = str(root / "runs" / name)
    return shop


def test_the_block_is_read():
    verbs = {line.split()[1] for line in LINES}
    assert len(LINES) > 15 and {*MORE, *ELSEWHERE, "chat", "eval", "predict", "runs", "doctor"} <= verbs
    assert all((ROOT / "tests" / name).is_file() for name in ELSEWHERE.values())


def test_every_command_of_the_readme_runs(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "readme_scores.py").write_text(SCORES)
    for line in LINES:
        verb, *rest = small(line, shop)
        if verb in ELSEWHERE:
            continue
        monkeypatch.setattr("sys.stdin", io.StringIO("The film\n/quit\n"))  # for the chats
        outcome = peftlab(shlex.join([verb, *rest]))
        assert outcome.code == 0, (line, outcome)
        if verb in MORE:
            assert (tmp_path / "runs" / rest[0] / "adapter" / "stack.json").is_file(), line
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()


def test_the_lines_of_python_print_two_texts_and_their_log_probabilities(capsys):
    (code,) = re.findall(r"^`{3}python\n(.*?)^`{3}", SECTION, re.M | re.S)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("['") and "tensor([-" in printed


def test_bring_your_own_prints_what_the_page_says(tmp_path, monkeypatch):
    """Its shell blocks, the model that it makes, and the checks and figures of both."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "bring-your-own.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^`{3}(\w*)\n(.*?)^`{3}", page, re.M | re.S)
    for kind, text in blocks:
        if kind == "sh":
            subprocess.run(["bash", "-euc", text], check=True)
    exec(compile(next(text for kind, text in blocks if "save_pretrained" in text), "my_model.py", "exec"), {})
    tried = 0
    for said in re.split(r"^\$ peftlab ", "".join(text for kind, text in blocks if not kind), flags=re.M)[1:]:
        line, _, shown = said.partition("\n")
        if line.startswith(("data ", "classify ", "doctor ")):
            printed = " ".join(peftlab(line).out.split())
            for part in re.split(MACHINES, shown, flags=re.M):
                assert " ".join(part.split()) in printed, line
            tried += 1
    assert tried == 4
