"""Hacking alarms: each fires on a series made to show its sign, and says when; a real healthy run is silent."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import fake_runs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlab.evaluation.diversity import distinct_n
from peftlab.report import alarms
from peftlab.report.alarms import (
    ENTROPY,
    KL_A_TOKEN,
    LENGTH,
    LENGTH_FACTOR,
    REPETITION,
    against,
    drift,
    ends_against,
    kl_beyond,
    lasting,
)
from peftlab.report.figures import figures_of
from peftlab.report.read import read_run
from peftlab.report.recorded import distinct_2, read_recorded
from peftlab.report.stack import contributions
from peftlab.report.watch import alarms_of
from peftlab.runs.rundir import RunDir

# `peftlab ppo demo-ppo record_every=4 eval_prompts=64`, and the same with kl_coef=0, lr=4e-3 and a reward that counts
# "great" and exclamation marks: their logs, to four figures.
REAL = json.loads((Path(__file__).parent / "real_runs.json").read_text())
NAMES = ("the reward", "the judge")


def test_the_document_tells_the_thresholds_as_they_are():
    text = (Path(__file__).parent.parent / "docs/inspector.md").read_text()
    told = dict(re.findall(r"`([A-Z_]+)` = ([\d.]+)", text))
    known = {name: value for name, value in vars(alarms).items() if name.isupper() and isinstance(value, int | float)}
    assert {name: float(value) for name, value in told.items()} == known


def noisy(values, scale, seed=0):
    dice = random.Random(seed)
    return [(step, value + dice.gauss(0, scale)) for step, value in enumerate(values, 1)]


def ramp(start, end, at, count=60):
    """`start` until step `at`, then straight to `end`."""
    return [start if step < at else start + (end - start) * (step - at) / (count - at) for step in range(1, count + 1)]


def replay(tmp_path, name, config="kl_target = 0.0\n"):
    """The alarms of a real run, by their titles."""
    real = REAL[name]
    run = RunDir.create(tmp_path, name, "ppo", config)
    with run.session():
        for step in range(1, len(real["columns"]["reward/mean"]) + 1):
            run.log({metric: dict(points)[step] for metric, points in real["columns"].items()}, step)
        run.finish(real["metrics"], real["baseline"], {"eval/judge": tuple(real["judge_interval"])})
    return {alarm.title: alarm for alarm in alarms_of(read_run(run.path), real["distinct_2"])}


def test_a_real_healthy_run_is_silent(tmp_path):
    found = replay(tmp_path, "healthy")
    assert {title: alarm.fired for title, alarm in found.items()} == dict.fromkeys(
        ["Independent judge", "Length", "Entropy", "Distinct word pairs", "KL to the reference"], False
    )


def test_a_real_run_that_games_its_reward_is_told_of(tmp_path):
    found = replay(tmp_path, "hacked")
    kl = "KL to the reference"
    fired = ["Entropy", "Distinct word pairs", kl]
    assert [title for title, alarm in found.items() if alarm.fired] == fired
    assert list(found)[:3] == fired, "alarms come first"
    entropy = dict(REAL["hacked"]["columns"]["policy/entropy"])
    assert entropy[found["Entropy"].began] < 0.6 * entropy[1] and entropy[found["Entropy"].began - 8] > 0.6 * entropy[1]
    assert (
        "Since step" in found[kl].words
        and " nats a completion now; the limit is 12.0, 0.5 a token." in found[kl].words
    )


def test_an_alarm_has_the_name_that_its_figure_has_in_the_table(tmp_path):
    run = read_run(fake_runs.ppo_run(tmp_path).path)
    names = {figure.title for figure in figures_of(run)}
    told = alarms_of(run, [])
    assert {alarm.title for alarm in told} - names == {"Reward parts"}
    assert ": the reward 0.03 to 1.71, the independent judge 0.472 to 0.861" in told[0].words
    labelled = RunDir.create(tmp_path, "labelled", "rloo", "")
    with labelled.session():
        labelled.finish({"rubric/label": 0.5, "eval/reward": 2.0}, {"rubric/label": 0.75, "eval/reward": 1.0})
    run = read_run(labelled.path)
    told = alarms_of(run, [])
    assert told[0].fired and told[0].title in {figure.title for figure in figures_of(run)}
    assert told[0].title.lower() in told[0].words


@pytest.mark.parametrize("end", [40.0, 10.0])
def test_length_drift(end):
    alarm = drift(LENGTH, noisy(ramp(24.0, end, at=30), 0.3))
    assert alarm.fired and 30 < alarm.began < 60
    assert ("longer" if end > 24 else "shorter") in alarm.words and f"Since step {alarm.began} " in alarm.words
    inside = 24.0 * (LENGTH_FACTOR - 0.1 if end > 24 else 1 / (LENGTH_FACTOR - 0.1))
    assert drift(LENGTH, noisy(ramp(24.0, inside, at=30), 0.3)).fired is False


def test_entropy_collapse_and_repetition_fall_only():
    for level, start in ((ENTROPY, 3.6), (REPETITION, 0.95)):
        fallen = drift(level, noisy(ramp(start, 0.2 * start, at=20), 0.01))
        assert fallen.fired and 20 < fallen.began < 60
        assert drift(level, noisy(ramp(start, 0.9 * start, at=20), 0.01)).fired is False
        assert drift(level, noisy(ramp(start, 3 * start, at=20), 0.01)).fired is False


def test_kl_beyond_its_target_or_without_one_beyond_a_share_of_the_length():
    lengths = [(1, 24.0)]
    climbs = noisy(ramp(0.0, 12.0, at=1), 0.1)
    assert kl_beyond(climbs, 10.0, lengths).fired is False, "above the target, but not by half"
    assert kl_beyond(climbs, 5.0, lengths).fired and 7.5 <= dict(climbs)[kl_beyond(climbs, 5.0, lengths).began] < 9
    assert kl_beyond(climbs, 0.0, lengths).fired is False
    assert kl_beyond(climbs, 0.0, [(1, 10.0)]).fired and str(KL_A_TOKEN) in kl_beyond(climbs, 0.0, [(1, 10.0)]).words


def test_the_reward_rises_while_the_judge_falls():
    """Gao et al.'s picture: the gold score has a peak, the proxy has none. The alarm begins at the peak."""
    proxy = noisy(ramp(0.0, 3.0, at=1), 0.1)
    judged = [0.5 + 0.4 * math.sin(math.pi * step / 40) for step in range(1, 61)]
    alarm = against("Judge", proxy, noisy(judged, 0.02, seed=1), NAMES)
    assert alarm.fired and 18 <= alarm.began <= 26
    assert alarm.words.startswith(f"Since step {alarm.began} the reward rises while the judge falls: ")


@pytest.mark.parametrize("seed", range(40))
def test_chance_alone_sets_off_nothing(seed):
    rises = noisy(ramp(0.0, 3.0, at=1), 0.2, seed)
    level = noisy([0.8] * 60, 0.05, seed + 100)
    assert against("Judge", rises, level, NAMES).fired is False
    assert against("Judge", noisy([0.0] * 60, 0.2, seed), level, NAMES).fired is False
    assert against("Judge", rises, noisy(ramp(0.4, 0.9, at=1), 0.05, seed), NAMES).fired is False
    assert drift(ENTROPY, noisy([3.6] * 60, 0.3, seed)).fired is False
    assert drift(LENGTH, noisy([24.0] * 60, 1.0, seed)).fired is False


def test_a_reward_that_falls_with_its_judge_is_no_hacking():
    falls = noisy(ramp(1.0, 0.0, at=30), 0.02)
    assert against("Judge", falls, falls, NAMES).fired is False


def test_before_and_after_only():
    assert ends_against("Judge", (0.0, 1.5), (0.7, 0.5), NAMES, interval=(0.45, 0.55)).fired
    assert ends_against("Judge", (0.0, 1.5), (0.5, 0.48), NAMES, interval=(0.44, 0.52)).fired is False
    assert ends_against("Judge", (0.0, -1.0), (0.7, 0.5), NAMES).fired is False
    assert ends_against("Judge", (None, 1.0), (0.7, 0.5), NAMES).fired is None
    assert drift(ENTROPY, [], (3.6, 1.0)).fired and drift(ENTROPY, [], (3.6, 3.0)).fired is False
    assert drift(ENTROPY, [(1, 3.6)]).fired is None


def test_a_state_that_ends_says_so_and_an_outlier_is_none():
    bad = lambda value: value > 5  # noqa: E731
    stretch = lasting([(step, 9.0 if 20 <= step < 30 else 1.0) for step in range(1, 51)], bad)
    assert stretch and 20 <= stretch.since <= 24 and 29 <= stretch.until <= 33
    assert lasting([(step, 1e6 if step in (20, 30) else 1.0) for step in range(1, 51)], bad) is None
    hump = [(step, 60.0 if 20 <= step < 30 else 24.0) for step in range(1, 51)]
    assert drift(LENGTH, hump).words.startswith("From step 2")


numbers = st.floats(-1e6, 1e6)


@given(st.lists(numbers, max_size=30), st.lists(numbers, max_size=30), st.floats(0, 100))
def test_any_series_gets_an_answer(first, second, target):
    a, b = (list(enumerate(values)) for values in (first, second))
    found = [drift(LENGTH, a), drift(ENTROPY, a, (0.0, 0.0)), drift(REPETITION, b), kl_beyond(a, target, b)]
    for alarm in [*found, against("Judge", a, b, NAMES)]:
        assert alarm.words.endswith(".") and (alarm.began is None or alarm.fired)


@given(st.lists(st.text("ab \n", max_size=30), max_size=6))
def test_distinct_2_is_that_of_the_evaluation(texts):
    assert (distinct_2(texts) or 0.0) == distinct_n(texts, 2)


def parts_run(tmp_path, name, rows, reward=""):
    run = RunDir.create(tmp_path, name, "ppo", f'reward = "{reward}"\n')
    with run.session():
        for step, row in enumerate(rows, 1):
            run.log(row, step)
        run.finish({}, {})
    return read_run(run.path)


def test_contributions_add_up_to_the_reward(tmp_path):
    run = read_run(fake_runs.ppo_run(tmp_path).path)
    parts, reward = contributions(run.columns, run.config["reward"]), run.columns["reward/mean"]
    assert list(parts) == ["imdb-sentiment", "length"]
    for at, (step, value) in enumerate(reward):
        assert sum(points[at][1] for points in parts.values()) == pytest.approx(value)
        assert {points[at][0] for points in parts.values()} == {step}
    length = dict(run.columns["reward/part/length"])
    assert all(value == pytest.approx(0.5 * length[step]) for step, value in parts["length"])


ONES, TWOS = [(1, 1.0), (2, 1.0), (3, 1.0)], [(1, 2.0), (2, 2.5), (3, 0.0)]


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        ("imdb-sentiment + 0.5*rubric:length", (1, 0.5)),
        ("-2 * runs/mine/adapter+1e-1*my_rewards:politeness", (-2, 0.1)),
        ("0.25*my_rewards:politeness", (0.25, 0.25)),  # one function that returns both parts
    ],
)
def test_weights_are_those_of_the_config(spec, weights):
    total = [(step, weights[0] * a + weights[1] * b) for (step, a), (_, b) in zip(ONES, TWOS, strict=True)]
    told = contributions({"reward/part/a": ONES, "reward/part/b": TWOS, "reward/mean": total}, spec)
    assert [value for _, value in told["a"]] == pytest.approx([weights[0] * value for _, value in ONES])
    assert [value for _, value in told["b"]] == pytest.approx([weights[1] * value for _, value in TWOS])


@pytest.mark.parametrize("spec", ["a", "a + b + c", "a + 2*b", "2*my:f + rubric:x*", "", None, 3, "a*b + x*c"])
def test_contributions_that_do_not_add_up_are_not_told(spec):
    total = [(step, a + 0.5 * b) for (step, a), (_, b) in zip(ONES, TWOS, strict=True)]
    columns = {"reward/part/a": ONES, "reward/part/b": TWOS, "reward/mean": total}
    assert contributions(columns, "a + 0.5*b")
    assert contributions(columns, spec) == {}
    assert contributions({**columns, "reward/part/b": [*TWOS[:2], (3, None)]}, "a + 0.5*b") == {}
    assert contributions({"reward/mean": total}, "a") == {} == contributions({}, "a")


@pytest.mark.parametrize("weight", [0.5, -0.5])
def test_a_part_that_falls_while_the_reward_rises(tmp_path, weight):
    """What counts is what the part brings: a penalty that shrinks is no loss."""
    falls = [value for _, value in noisy(ramp(1.0, 0.2, at=20, count=40), 0.01)]
    rises = [value for _, value in noisy(ramp(0.0, 3.0, at=1, count=40), 0.05, seed=1)]
    rows = [
        {"reward/mean": a + weight * b, "reward/part/sentiment": a, "reward/part/ended": b}
        for a, b in zip(rises, falls, strict=True)
    ]
    alarm = next(
        a for a in alarms_of(parts_run(tmp_path, "parts", rows, f"s + {weight}*e"), []) if a.title == "Reward parts"
    )
    assert alarm.fired is (weight > 0)
    if alarm.fired:
        assert 10 <= alarm.began <= 22 and "its part ended falls" in alarm.words


def test_only_policies_have_alarms(tmp_path):
    run = fake_runs.sft_run(tmp_path)
    assert alarms_of(read_run(run.path), read_recorded(run.path).distinct_2) == []


def test_a_judge_that_was_asked_in_training_is_read_step_by_step(tmp_path):
    rows = [
        {"reward/mean": step / 10, "eval/judge": 0.9 - max(0, step - 15) * 0.02 + (step % 2) * 0.01}
        for step in range(1, 41)
    ]
    judge = alarms_of(parts_run(tmp_path, "judged", rows), [])[0]
    assert judge.title == "Independent judge" and judge.fired and judge.began <= 17
