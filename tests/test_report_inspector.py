"""The inspector and the alarms on the page: what is shown of which rollouts, in a real browser, too."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import fake_runs
import pytest
from fake_runs import record, rollout_row
from pages import read

from peftlab.report import render
from peftlab.report.inspector import MOST_ANSWERS, MOST_STEPS, MOST_TOKENS, inspector_of
from peftlab.report.recorded import FLOOR, read_recorded
from peftlab.runs.rundir import RunDir

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
REAL = json.loads((Path(__file__).parent / "real_runs.json").read_text())  # see test_report_alarms.py


def share(token, key):
    """How strongly a measure colours a token, by its style."""
    found = re.search(rf"--{key}:(-?[\d.]+)", token.style)
    return float(found[1]) if found else 0.0


def test_the_scale_is_that_of_the_whole_file_and_never_noise(tmp_path):
    path = record(tmp_path, [rollout_row(1, "a", kl=1e-7), rollout_row(9, "b", kl=1.0)])
    scales = read_recorded(path).scales
    assert list(scales) == ["advantage", "kl"] and 1.0 <= scales["kl"] <= 3.0 and scales["advantage"] == 0.25
    assert read_recorded(record(tmp_path, [rollout_row(1, "a", kl=1e-7)], name="noise")).scales["kl"] == FLOOR
    first, last = (group.asked[0].answers[0].tokens[3] for group in inspector_of(path, read_recorded(path)).groups)
    assert share(last, "k") == 1 and share(first, "k") == 0 and share(first, "a") == share(last, "a") == -1


def test_a_colour_is_the_number_over_the_scale(tmp_path):
    path = fake_runs.ppo_run(tmp_path).path
    recorded = read_recorded(path)
    view = inspector_of(path, recorded)
    rows = [json.loads(line) for line in (path / "rollouts.jsonl").read_text().splitlines()]
    seen = 0
    for group in view.groups:
        for asked in group.asked:
            for answer in asked.answers:
                row = next(r for r in rows if (r["step"], r["prompt_id"]) == (answer.step, asked.prompt_id))
                for token, numbers in zip(answer.tokens, row["tokens"], strict=True):
                    for name, full in recorded.scales.items():
                        wanted = max(-1.0, min(1.0, numbers[name] / full))
                        assert share(token, name[0]) == pytest.approx(wanted, abs=0.00501)
                        seen += 1
    assert seen > 500


def test_prompts_that_came_again_stand_together(tmp_path):
    rows = [rollout_row(step, prompt_id) for step in range(1, 40) for prompt_id in ("probe", f"own-{step}")]
    path = record(tmp_path, rows)
    again, *by_step = inspector_of(path, read_recorded(path)).groups
    assert again.heading == "The same prompt, step by step" and again.by_step
    assert [asked.prompt_id for asked in again.asked] == ["probe"]
    steps = [answer.step for answer in again.asked[0].answers]
    assert len(steps) == MOST_STEPS and steps[0] == 1 and steps[-1] == 39 and steps == sorted(steps)
    assert [(group.heading, [asked.prompt_id for asked in group.asked]) for group in by_step] == [
        ("Step 1", ["own-1"]),
        ("Step 39", ["own-39"]),
    ]
    _, page = read(render(path))
    places = [page.text.index(f"step {step}reward") for step in steps]
    assert places == sorted(places) and page.text.count("About probe:") == 1


def test_without_such_prompts_some_steps_are_shown_and_those_between_folded(tmp_path):
    path = record(tmp_path, [rollout_row(step, f"{step}-{n}") for step in range(1, 40) for n in range(9)])
    groups = inspector_of(path, read_recorded(path)).groups
    assert [group.folded for group in groups] == [False, True, True, True, False]
    assert {len(group.asked) for group in groups} == {MOST_ANSWERS}
    html, _ = read(render(path))
    assert html.count("<summary>Step ") == 3 and html.count("<h4>Step ") == 2
    assert "<details open" not in html, "tables are there on demand"


def test_long_answers_and_tokens_are_cut_and_that_is_told(tmp_path):
    tokens = [{"token": "a" * 5000, "advantage": 0.5}] * (MOST_TOKENS + 7)
    _, page = read(render(record(tmp_path, [rollout_row(1, "x", tokens=tokens)])))
    assert "7 more tokens are in the file" in page.text
    assert "a" * 80 + "…" in page.text and "a" * 81 not in page.text


def test_every_colour_of_the_stack_has_a_legend(tmp_path):
    """Eight parts, hostile names among them: more than there are colours."""
    names = [f"p{number}" for number in range(7)] + ["<script>alert(1)"]
    run = RunDir.create(
        tmp_path, "parts", "ppo", f'reward = "{" + ".join(f"{n + 1}*rubric:x{n}" for n in range(8))}"\n'
    )
    with run.session():
        for step in range(1, 100):
            values = [((step + number) % 5 - 2) / 4 for number in range(8)]
            total = sum((number + 1) * value for number, value in enumerate(values))
            run.log({f"reward/part/{n}": v for n, v in zip(names, values, strict=True)} | {"reward/mean": total}, step)
        run.finish({}, {})
    html, page = read(render(run.path))
    figure = html[html.index("The reward, stacked from its parts") :].partition("</figure>")[0]
    legend, drawn = figure.split('<svg class="plot"')
    piles = set(re.findall(r'class="(pile [\w ]+)"', drawn))
    assert piles == set(re.findall(r'class="(pile [\w ]+)"', legend)) and len(piles) == 8
    assert 'class="line total"' in legend and 'class="line total"' in drawn
    assert [name in page.text for name in names] == [True] * 8
    assert len(re.findall("<rect", drawn)) <= 8 * 60, "steps are averaged"


def hacked(root, name="ppo"):
    """The log of a real run that gamed its reward."""
    run = RunDir.create(root, name, "ppo", "kl_target = 0.0\n")
    with run.session():
        for step, _ in REAL["hacked"]["columns"]["reward/mean"]:
            run.log({metric: dict(points)[step] for metric, points in REAL["hacked"]["columns"].items()}, step)
        run.finish(REAL["hacked"]["metrics"], REAL["hacked"]["baseline"])
    return run


def test_alarms_are_sentences_with_the_step_they_began(tmp_path):
    hacked(tmp_path)
    _, page = read(render(tmp_path / "ppo"))
    told = page.text[page.text.index("Signs that a policy games its reward") :]
    far = r"Since step 1\d the policy is far from its reference: [\d.]+ nats a completion now"
    assert re.search(rf"! KL to the reference alarm\s+{far}", told)
    assert re.search(r"! Entropy alarm\s+Since step 2\d the policy's entropy is below half of what it was: 3\.6", told)
    assert told.index("! KL to the reference alarm") < told.index("✓ Length no alarm") < told.index("Curves")
    assert "3 alarms from step 1" in page.text[: page.text.index("Signs that")], "the contents name them"


def test_the_overview_of_a_demo_links_to_its_alarms(tmp_path):
    demo = fake_runs.demo_run(tmp_path)
    shutil.rmtree(demo.path / "ppo")
    hacked(tmp_path, "demo/ppo")
    _, page = read(render(demo.path))
    overview = page.text[page.text.index("Overview") : page.text.index("stage 1 of 3")]
    assert re.search(r"! 3 alarms from step 1\d on", overview) and "#demo-ppo-alarms" in page.values("href")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)")
def test_the_page_colours_by_what_is_asked_for_without_scripts(tmp_path):
    from playwright.sync_api import sync_playwright

    path = render(fake_runs.ppo_run(tmp_path).path)
    complaints: list[str] = []
    with sync_playwright() as driver:
        # Containers run as root, where Chromium's own sandbox cannot start.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(java_script_enabled=False).new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(path.as_uri())
        token = page.locator(".strip .t").first
        colours, numbers, legends = {}, {}, {}
        for measure in ("a", "k", "r"):
            page.check(f"#ppo-by-{measure}")
            colours[measure] = token.screenshot()
            numbers[measure] = token.inner_text()
            legends[measure] = page.locator("p[class*=of-]").locator("visible=true").inner_text()
        table = page.locator("details:has(table.tokens)").nth(1)
        assert not table.locator("table").is_visible()
        table.locator("summary").click()
        assert table.locator("table").is_visible()
        page.set_viewport_size({"width": 360, "height": 800})
        assert page.locator("html").evaluate("e => e.scrollWidth") <= 360, "nothing sticks out of a telephone"
        browser.close()
    assert len(set(colours.values())) == len(set(numbers.values())) == len(set(legends.values())) == 3
    assert complaints == []
    assert all("blue, +" in legend and "orange, −" in legend for legend in legends.values())
    first = json.loads((path.parent / "rollouts.jsonl").read_text().splitlines()[0])["tokens"][0]
    for key, name in (("a", "advantage"), ("k", "kl"), ("r", "reward")):
        assert f"{first[name]:+.2f}".replace("-", "−") in numbers[key]
