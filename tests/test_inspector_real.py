"""Real runs of seconds, PPO and RLOO, from the rollouts that they record to the page and the terminal."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
import tiny
from commands import peftlab, program
from pages import read

from peftlab.recipes.launch import launch
from peftlab.report import render
from peftlab.report.recorded import MEASURES

REWARD = '''
def praise(prompts, completions, records):
    """The share of letters e, and how short the answer is."""
    return {"e": [c.count("e") / 8 for c in completions], "short": [-len(c) / 40 for c in completions]}
'''
PROMPTS = ["the film was", "a dull plot and", "i was not", "it is a very"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with runs/ppo and runs/rloo; there are so few prompts that each step has them all."""
    root = tmp_path_factory.mktemp("real")
    shop = {"gpt2": str(tiny.causal_folder(root / "gpt2"))}
    shop["prompts"] = tiny.write_rows(root / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    (root / "my_rewards.py").write_text(REWARD)
    keys = ["task=custom", "reward=2*my_rewards:praise + 0.5*rubric:repetition", "eval_prompts=4", "save_every=100"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for verb, more in (("ppo", ["steps=6", "prompts_per_step=4", "record_every=2"]), ("rloo", [])):
            launch(verb, None, tiny.overrides(shop, verb, *keys, *more), root / "runs", verb, False)
    return root


def recorded(home, run):
    return [json.loads(line) for line in (home / "runs" / run / "rollouts.jsonl").read_text().splitlines()]


def sign(character):
    """What stands on the page for a character that would not show."""
    return {" ": "·", "\n": "↵", "\t": "⇥"}.get(character[0], f"⟨U+{ord(character[0]):04X}⟩")


def strips(page):
    """Each answer of the page as its tokens: (text, number below it by the measure's letter, style)."""
    token = re.compile(r'<span class="t"(?: style="([^"]*)")?>(.*?)((?:<small class="\w">[^<]*</small>)+)</span>')
    for strip in re.findall(r'<p class="strip">\n(.*?)\n?</p>', page, re.DOTALL):
        yield [
            (
                html.unescape(re.sub("<[^>]*>", "", said)),
                dict(re.findall(r'<small class="(\w)">([^<]*)<', numbers)),
                style,
            )
            for style, said, numbers in token.findall(strip)
        ]


def test_the_page_shows_the_same_prompts_step_by_step_as_they_were_recorded(home):
    source, page = read(render(home / "runs/ppo"))
    section = page.text[page.text.index("The same prompt, step by step") :]
    places = [section.index(f"step {step}reward") for step in (1, 2, 4, 6)]
    assert places == sorted(places)
    rows = recorded(home, "ppo")
    prompts = list(dict.fromkeys(row["prompt_id"] for row in rows))
    answers = {(row["prompt_id"], row["step"]): row for row in reversed(rows)}  # the first one to a prompt in a step
    wanted = [answers[prompt, step] for prompt in prompts[:3] for step in (1, 2, 4, 6)]
    shown_first = list(strips(source))[: len(wanted)]
    for row, shown in zip(wanted, shown_first, strict=True):
        assert len(shown) == len(row["tokens"])
        for (said, numbers, style), token in zip(shown, row["tokens"], strict=True):
            assert said == re.sub(r"[\x00-\x20\x7f-\x9f]", sign, token["token"])
            for name in MEASURES:
                number = float(numbers[name[0]].replace("−", "-"))
                assert number == pytest.approx(token[name], abs=0.00501)
                colour = re.search(rf"--{name[0]}:(-?)", style)
                assert abs(number) < 0.01 or colour is None or (colour[1] == "-") is (token[name] < 0)
    assert any("--a:" in style for shown in shown_first for *_, style in shown)


def test_the_page_stacks_what_each_part_brings(home):
    """The function returns two parts, which share its weight."""
    source, _ = read(render(home / "runs/ppo"))
    figure = source[source.index("The reward, stacked from its parts") :].partition("</figure>")[0]
    last = json.loads((home / "runs/ppo/metrics.jsonl").read_text().splitlines()[-1])
    told = dict(re.findall(r"<code>([\w/-]+)</code> <span class=\"now\">(\S+) at step 6<", figure))
    assert {name: float(value.replace("−", "-")) for name, value in told.items()} == pytest.approx(
        {
            "reward/mean": last["reward/mean"],
            "e": 2 * last["reward/part/e"],
            "short": 2 * last["reward/part/short"],
            "repetition": 0.5 * last["reward/part/repetition"],
        },
        rel=5e-3,
    )


def test_the_page_answers_every_alarm_in_a_sentence(home):
    _, page = read(render(home / "runs/ppo"))
    told = page.text[page.text.index("Signs that a policy games its reward") :]
    figures = ("Independent judge", "Length", "Entropy", "Distinct word pairs", "KL to the reference")
    for title in (*figures, "Reward parts"):
        assert re.search(rf"[!✓·] {title}( alarm| no alarm)?\s+[A-Z\d][^\n]*\.\n", told), title
    assert "were not both measured before and after" in told, "task custom has no judge"


def test_the_terminal_shows_what_the_run_recorded(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("COLUMNS", "100")
    for step, number in ((1, 0), (6, 3)):
        rows = [row for row in recorded(home, "ppo") if row["step"] == step]
        prompt = list(dict.fromkeys(row["prompt_id"] for row in rows))[number]
        done = peftlab(f"inspect ppo --step {step} --prompt {number} --by kl")
        assert done.code == 0 and PROMPTS[int(prompt)] in done.out and "The same prompt at other steps: " in done.out
        numbers = [line.split()[-6:] for line in done.out.splitlines() if re.match(r" ?\d+ ", line)]
        assert [[float(cell) for cell in line] for line in numbers] == [
            pytest.approx(
                [token[n] for n in ("logprob", "ref_logprob", "kl", "value", "reward", "advantage")], abs=6e-4
            )
            for row in rows
            if row["prompt_id"] == prompt
            for token in row["tokens"]
        ]


def test_four_answers_of_rloo_stand_below_their_prompt(home, monkeypatch):
    monkeypatch.chdir(home)
    done = peftlab("inspect rloo --step 2 --json")
    answers = json.loads(done.out)
    assert len(answers) == 4 and len({row["prompt_id"] for row in answers}) == 1
    _, page = read(render(home / "runs/rloo"))
    assert "better than the other answers to the prompt" in page.text and "value: the critic's" not in page.text


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--step 3", "--step 3: run ppo has no rollouts of it; recorded: 1, 2, 4, 6"),
        ("--step 6 --prompt 4", "--prompt 4: not recorded at step 6 of run ppo; give 0 to 3, or an id: 0 is "),
        ("--step x", "Invalid value for '--step'"),
    ],
)
def test_a_wrong_number_is_one_message_that_names_what_there_is(home, monkeypatch, line, told):
    monkeypatch.chdir(home)
    done = program(f"inspect ppo {line}")
    assert done.code == 2 and done.out == "" and told in done.err and "Traceback" not in done.err
