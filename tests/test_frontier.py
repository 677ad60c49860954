"""Best-of-n, the tilted bound, win rates and self-BLEU: against enumeration, closed forms and what must hold."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from peftlab.evaluation.diversity import self_bleu_4
from peftlab.evaluation.frontier import best_of_n, best_of_n_curve, best_of_n_kl, tilted, tilted_curve
from peftlab.evaluation.winrate import Scored, win_rate
from peftlab.report.frontier import Cross, Curve, frontier_chart

SEEDS = st.integers(0, 10**6)
DRAWS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "sure": lambda rng, shape: rng.beta(0.3, 0.3, shape),
    "right or wrong": lambda rng, shape: (rng.random(shape) < 0.4).astype(float),
    "long tail": lambda rng, shape: rng.exponential(size=shape),
}


# Best of n


@given(SEEDS, st.integers(1, 7), st.data())
def test_best_of_n_is_the_mean_over_every_choice_of_n_answers(seed, count, data):
    n = data.draw(st.integers(1, count))
    rng = np.random.default_rng(seed)
    chosen_by, measured = rng.normal(size=(2, 3, count))
    every = [
        np.mean([m[max(some, key=lambda i: c[i])] for some in itertools.combinations(range(count), n)])
        for c, m in zip(chosen_by, measured, strict=True)
    ]
    assert best_of_n(chosen_by, measured, n) == pytest.approx(every)


@given(SEEDS, st.integers(1, 20))
def test_the_best_of_one_is_the_mean_and_of_all_is_the_largest_and_more_never_lose(seed, count):
    scores = np.random.default_rng(seed).choice([0.0, 0.5, 1.0, 2.0], (4, count))
    values = np.array([best_of_n(scores, scores, n) for n in range(1, count + 1)])
    assert values[0] == pytest.approx(scores.mean(1)) and values[-1] == pytest.approx(scores.max(1))
    assert (np.diff(values, axis=0) >= -1e-12).all()


def test_more_answers_than_were_sampled_are_refused():
    with pytest.raises(ValueError, match="there are 3"):
        best_of_n(np.ones((2, 3)), np.ones((2, 3)), 4)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_kl_of_best_of_n_is_that_of_its_density(n):
    """Of a continuous score's quantile u the best of n has the density n u^(n-1): its KL by numerical integration."""
    u = (np.arange(200_000) + 0.5) / 200_000
    density = n * u ** (n - 1)
    assert best_of_n_kl(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-4)


# The tilt


@given(SEEDS)
def test_without_a_tilt_it_is_the_reference_and_any_tilt_gains_and_costs(seed):
    scores = np.random.default_rng(seed).normal(size=(5, 12))
    values, kl = tilted(scores, scores, 0.0)
    assert values == pytest.approx(scores.mean(1)) and kl == pytest.approx(0, abs=1e-12)
    places = [tilted(scores, scores, inverse) for inverse in (0.0, 0.3, 1.0, 4.0, 1e9)]
    assert (np.diff([v for v, _ in places], axis=0) >= -1e-9).all()
    assert (np.diff([k for _, k in places], axis=0) >= -1e-9).all()
    assert places[-1][0] == pytest.approx(scores.max(1)) and places[-1][1] == pytest.approx(math.log(12))


def test_the_tilt_of_a_right_or_wrong_reward_is_the_closed_form():
    """Of mean .5: e^t / (1 + e^t) is right, at the KL of that coin from a fair one. At .92 it is 0.41 nats."""
    scores = np.array([[0.0, 1.0] * 8])
    for share in (0.6, 0.92):
        values, kl = tilted(scores, scores, math.log(share / (1 - share)))
        coin = share * math.log(2 * share) + (1 - share) * math.log(2 * (1 - share))
        assert values[0] == pytest.approx(share) and kl[0] == pytest.approx(coin)


@given(SEEDS)
def test_no_other_weights_of_that_kl_reach_a_higher_mean(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(1, 10))
    other = rng.dirichlet(np.ones(10) * rng.choice([0.3, 1.0, 5.0]))
    other_kl = float(np.sum(other * np.log(other * 10, where=other > 0, out=np.zeros(10))))
    low, high = 0.0, 1e4
    for _ in range(100):  # the tilt of the same KL
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(scores, scores, middle)[1][0] < other_kl else (low, middle)
    assert tilted(scores, scores, high)[0][0] >= float(other @ scores[0]) - 1e-6


@pytest.mark.parametrize("kind", DRAWS)
def test_the_tilted_curve_bounds_best_of_n_at_each_kl(kind):
    scores = DRAWS[kind](np.random.default_rng(0), (600, 64))
    tilt, best = tilted_curve(scores, scores), best_of_n_curve(scores, scores)
    assert (tilt[0].kl, tilt[0].value) == (0.0, pytest.approx(scores.mean()))
    assert [place.at for place in best] == [1, 2, 4, 8, 16] and best[0].value == pytest.approx(scores.mean())
    assert all(place.kl <= math.log(64 / 4) for place in tilt)
    kls, values = [place.kl for place in tilt], [place.value for place in tilt]
    compared = [place for place in best if place.kl <= kls[-1]]
    assert len(compared) >= 3
    assert all(place.value <= np.interp(place.kl, kls, values) + 1e-9 for place in compared)
    assert all(place.interval[0] <= place.value <= place.interval[1] for place in [*tilt, *best])


def test_a_proxy_buys_less_of_what_is_measured_than_the_measure_itself():
    rng = np.random.default_rng(1)
    measured = rng.normal(size=(400, 32))
    proxy = measured + rng.normal(size=measured.shape)
    for own, by_proxy in zip(best_of_n_curve(measured, measured), best_of_n_curve(proxy, measured), strict=True):
        assert own.value >= by_proxy.value - 1e-9
    assert tilted_curve(proxy, measured)[-1].value < tilted_curve(measured, measured)[-1].value


def test_scores_that_tell_nothing_apart_leave_the_reference_alone():
    flat = np.full((3, 8), 0.7)
    assert [(place.kl, place.value) for place in tilted_curve(flat, flat)] == [(0.0, pytest.approx(0.7))]


# Win rates


def answers(seed: int, prompts: int = 5, samples: int = 3) -> Scored:
    rng = np.random.default_rng(seed)
    return Scored(rng.choice([0.0, 0.1, 0.5, 0.9], (prompts, samples)), rng.integers(1, 30, (prompts, samples)))


@given(SEEDS, st.floats(0, 0.5))
def test_against_itself_it_is_a_draw_and_swapping_the_sides_mirrors_it(seed, margin):
    one, other = answers(seed), answers(seed + 1)
    assert win_rate(one, one, margin).metrics["compare/win_rate"] == 0.5
    there, back = win_rate(one, other, margin), win_rate(other, one, margin)
    assert there.metrics.keys() == back.metrics.keys()
    for name in there.metrics:
        mirrored = 1 - back.metrics[name] if "win_rate" in name else back.metrics[name]
        assert there.metrics[name] == pytest.approx(mirrored)
    for name, (low, high) in there.intervals.items():
        assert low - 1e-9 <= there.metrics[name] <= high + 1e-9
        assert (1 - high, 1 - low) == pytest.approx(back.intervals[name])


def test_a_case_worked_out_by_hand():
    """Two prompts, two against one: gaps .6, .005 and -.3, .0; lengths 10:10, 20:10 and 10:11, 9:11."""
    ours = Scored(np.array([[0.9, 0.305], [0.2, 0.5]]), np.array([[10, 20], [10, 9]]))
    theirs = Scored(np.array([[0.3], [0.5]]), np.array([[10], [11]]))
    found = win_rate(ours, theirs, 0.01).metrics
    assert found == {
        "compare/win_rate": 0.5, "compare/ties": 0.5, "compare/length_matched": 0.5,
        "compare/win_rate_length_matched": 0.5,
    }
    assert win_rate(ours, theirs).metrics["compare/win_rate"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_a_policy_that_wins_by_length_alone_wins_nothing_where_lengths_match():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(10, 60, (200, 4)), rng.integers(5, 40, (200, 4))
    found = win_rate(Scored(ours.astype(float), ours), Scored(theirs.astype(float), theirs), tie_margin=6).metrics
    assert found["compare/win_rate"] > 0.7 and found["compare/win_rate_length_matched"] == 0.5


def test_no_pair_of_one_length_leaves_that_rate_out():
    found = win_rate(Scored(np.ones((2, 1)), np.full((2, 1), 9)), Scored(np.zeros((2, 1)), np.full((2, 1), 3)))
    assert found.metrics == {"compare/win_rate": 1.0, "compare/ties": 0.0, "compare/length_matched": 0.0}


def test_the_interval_knows_that_answers_to_one_prompt_go_together():
    """Twenty prompts decide, not their 320 pairs: answers copied over leave the interval as wide as it was."""
    rng = np.random.default_rng(0)
    one, other = (Scored(rng.normal(size=(20, 1)), np.ones((20, 1))) for _ in range(2))
    many = [Scored(np.repeat(s.scores, 4, 1), np.repeat(s.lengths, 4, 1)) for s in (one, other)]
    narrow, wide = (win_rate(*sides).intervals["compare/win_rate"] for sides in (many, (one, other)))
    assert narrow == pytest.approx(wide)


# Self-BLEU


@given(st.lists(st.lists(st.sampled_from(tiny.WORDS[:5]), min_size=1, max_size=9), min_size=2, max_size=5))
def test_self_bleu_is_bleu_of_each_text_with_the_others_as_references(texts):
    assert self_bleu_4([" ".join(words) for words in texts]) == pytest.approx(np.mean([
        plain_bleu(words, [other for j, other in enumerate(texts) if j != i]) for i, words in enumerate(texts)
    ]))


def plain_bleu(words: list[str], references: list[list[str]]) -> float:
    """Papineni et al. 2002 as it is written, smoothed by Chen and Cherry's method 1."""
    precisions = []
    for n in range(1, 5):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        theirs = [[tuple(r[i : i + n]) for i in range(len(r) - n + 1)] for r in references]
        clipped = sum(min(grams.count(g), max(t.count(g) for t in theirs)) for g in set(grams))
        precisions.append((clipped or 0.1) / max(1, len(grams)))
    nearest = min((len(r) for r in references), key=lambda size: (abs(size - len(words)), size))
    return min(1.0, math.exp(1 - nearest / len(words))) * math.prod(precisions) ** 0.25


def test_copies_are_one_and_strangers_near_nothing():
    assert self_bleu_4(["the film was very good"] * 3) == pytest.approx(1)
    assert self_bleu_4(["a b c d e", "f g h i j", ""]) < 0.05
    assert self_bleu_4(["alone"]) == self_bleu_4([]) == 0


# The picture


def test_the_chart_is_one_svg_without_scripts_that_shows_every_run():
    runs = [Cross(f"run <{i}>", [(0.5 * i, 0.6, (0.4 * i, 0.6 * i), (0.5, 0.7))]) for i in range(8)]
    chart = frontier_chart(runs, [Curve("tilted by eval/judge", [(0, 0.5), (1, 0.9)])], "eval/judge")
    root = ET.fromstring(chart)
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert "script" not in tags and "http" not in chart.replace("http://www.w3.org/2000/svg", "")
    marks = [e for e in root.iter() if e.get("class") == "mark"]
    assert len(marks) == 2 * len(runs)  # each in the plot and in the legend
    told = {e.text for e in root.iter() if e.get("class") == "label"}
    assert told == {*(run.label for run in runs), "tilted by eval/judge"}
    looks = {(group.get("class"), group[-1].get("d")) for group in root.iter() if (group.get("class") or "")[:1] == "r"}
    assert len(looks) == len(runs)


def test_a_chart_of_one_flat_point_still_draws():
    assert "NaN" not in frontier_chart([Cross("one", [(0.0, 0.5, (0.0, 0.0), (0.5, 0.5))])], [], "eval/judge")
