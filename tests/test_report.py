"""The report: one safe static page from a run's files, whatever they hold and however the run ended."""

from __future__ import annotations

import json
import math
import re

import fake_runs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Page, read

from peftlab.errors import LabError, UserError
from peftlab.report import render
from peftlab.report.svg import MOST_POINTS, Marker, Series, line_chart, nice_ticks, thin
from peftlab.report.text import compact, number, visible
from peftlab.runs.metrics import METRICS
from peftlab.runs.rundir import RunDir

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title></svg><script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp;",
    "\x1b]52;c;aGk=\x07\x1b[31mred",
    "\u202egnp.exe\u2066 \x00\x9b1m \ud800",
    "javascript:alert(1)",
    "' onmouseover='alert(1)",
]


WRONG = '{"schema_version": 1, "step": "x", "tokens": 3, "data": 1, "metrics": [], "time": 4}'


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    return read(render(fake_runs.ppo_run(tmp_path_factory.mktemp("runs")).path))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return read(render(fake_runs.demo_run(tmp_path_factory.mktemp("runs")).path))


def test_a_ppo_run_shows_gain_curves_samples_and_tokens(ppo):
    html, page = ppo
    for shown in (
        "0.472",
        "0.861",
        "0.826 to 0.893",
        "imdb-judge",
        "9f2c" * 16,
        "I went into this",
        "ref_logprob",
    ):
        assert shown in page.text, shown
    for heading in ("Before and after", "Curves", "Samples", "Token by token", "Settings and provenance"):
        assert heading in page.text
    assert "prefers-color-scheme: dark" in html
    assert sum(tag == "svg" and attrs.get("class") == "plot" for tag, attrs in page.elements) >= 12


@pytest.mark.parametrize(
    ("recipe", "task", "judged", "gain"),
    [
        ("rloo", "custom", False, ["Reward"]),
        ("ppo", "custom", True, ["Independent judge", "Reward"]),
        ("ppo", "continuation", True, ["Independent judge"]),
    ],
)
def test_the_reward_is_a_card_where_a_judge_alone_does_not_say_what_was_gained(tmp_path, recipe, task, judged, gain):
    run = RunDir.create(tmp_path, "own", recipe, f'task = "{task}"\n')
    before = {"eval/judge": 0.5} if judged else {}
    before |= {"eval/reward": 2.28, "eval/kl": 0.0, "eval/distinct_2": 0.84}
    with run.session():
        run.finish({**before, "eval/reward": 2.59, "eval/length": 16.0}, before, {"eval/reward": (2.38, 2.8)})
    cards = re.findall('<p class="card-title">(.*?)</div>', read(render(run.path))[0], re.DOTALL)
    told = [" ".join(re.sub("<[^>]*>", " ", card).split()) for card in cards]
    for title, card in zip([*gain, "KL to the reference", "Distinct word pairs"], told, strict=True):
        assert card.startswith(f"{title} ")
        if title == "Reward":
            assert card == "Reward 2.28 → 2.59 ▲ better 95%: 2.38 to 2.80"


def test_every_curve_carries_its_definition_and_healthy_range(ppo):
    _, page = ppo
    for name in (
        "reward/mean",
        "kl/reference",
        "policy/entropy",
        "policy/approx_kl",
        "value/loss",
        "rollout/length",
    ):
        assert METRICS[name].definition in page.text, name
    assert "Healthy: 0 to 0.02; " in page.text and "points outside" in page.text
    assert any(attrs.get("class") == "band" for tag, attrs in page.elements if tag == "rect")
    constants = page.text[page.text.index("The same through the run") :]
    assert METRICS["kl/coef"].definition in constants, "a metric that never changes is told, not drawn"


def test_signs_of_advantages_show_without_colour(ppo):
    _, page = ppo
    styles = [attrs["style"] for tag, attrs in page.elements if tag == "span" and attrs.get("class") == "t"]
    strengths = [float(match[1]) for style in styles if (match := re.match(r"--a:([-\d.]+);", style))]
    assert min(strengths) == -1 and max(strengths) == 1 and any(0.1 < abs(share) < 0.9 for share in strengths)
    assert re.search(r"·film[+−]\d\.\d\d", page.text.replace("\n", ""))
    assert "↵" in page.text, "a line end shows as a sign"


def test_a_demo_is_one_page_with_an_overview_and_its_stages(demo, tmp_path):
    _, page = demo
    order = [page.text.index(words) for words in ("Overview", "stage 1 of 3", "stage 2 of 3", "stage 3 of 3")]
    assert order == sorted(order)
    overview = page.text[order[0] : order[1]]
    for shown in ("0.503", "0.887", "64.8", "61.5", "0.472", "0.861", "What it writes"):
        assert shown in overview, shown
    assert {"demo-classify", "demo-sft", "demo-ppo-rollouts", "overview"} <= set(page.values("id"))


def hostile_run(root, text):
    run = RunDir.create(root, "hostile", "ppo", f"model = {json.dumps(text)}\n", environment={"device": text})
    with run.session():
        run.record_data(text, text, 3)
        run.event("note", words=text)
        for step in (1, 2, 3):
            run.log({f"reward/part/{text.replace('/', '')}": step, "reward/mean": step}, step)
        run.write_samples(
            [
                {"prompt_id": text, "side": side, "prompt": text, "completion": text}
                for side in ("before", "after")
            ]
            + [{"id": text, text: text}]
        )
        token = {"token": text, "logprob": -1, "advantage": 0.5}
        run.append_rollouts(
            [{"step": 1, "prompt_id": text, "prompt": text, "score_parts": {text: 1}, "tokens": [token]}]
        )
        run.finish({"eval/judge": 0.5}, {}, reason=text)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, text: 1.0, "eval/judge": text}) + "\n")
    return run


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(tmp_path, text):
    html, page = read(render(hostile_run(tmp_path, text).path))
    assert "<script" not in html.lower()
    if text.isprintable():
        assert page.text.count(text) >= 8, "shown as it is"
    else:
        assert "⟨U+" in page.text


@settings(max_examples=40)
@given(st.text(max_size=40))
def test_any_text_leaves_the_page_whole(tmp_path_factory, text):
    read(render(hostile_run(tmp_path_factory.mktemp("runs"), text.replace("/", "") or "x").path))


def test_a_run_without_metrics_yet(tmp_path):
    run = RunDir.create(tmp_path, "new", "ppo", "lr = 1\n")
    with run.session():
        _, page = read(render(run.path))
        assert "Running" in page.text and "No metrics were logged yet" in page.text
        run.finish({}, {})


def test_a_failed_run_says_why_and_shows_what_it_logged(tmp_path):
    run = RunDir.create(tmp_path, "broken", "ppo", "lr = 1\n")
    with pytest.raises(LabError), run.session():
        run.log({"reward/mean": 0.5, "policy/loss": float("nan")}, 1)
        run.log({"reward/mean": 0.7, "policy/loss": float("nan")}, 2)
        raise LabError("step 2: policy/loss is nan; the weights were not updated")
    _, page = read(render(run.path))
    assert "Failed" in page.text and "policy/loss is nan; the weights" in page.text
    assert METRICS["reward/mean"].definition in page.text and "no finite values" in page.text


def test_a_killed_demo_shows_the_stages_it_reached(tmp_path):
    RunDir.create(tmp_path, "demo", "demo", "")
    fake_runs.sft_run(tmp_path, "demo/sft")
    RunDir.create(tmp_path, "demo/ppo", "ppo", "")
    (tmp_path / "demo" / "ppo" / "metrics.jsonl").write_text(
        '{"step": 1, "time": 2.0, "reward/mean": 0.1}\n{"step"'
    )
    _, page = read(render(tmp_path / "demo"))
    assert page.text.count("Ended without a summary") >= 2 and "61.5" in page.text


@pytest.mark.parametrize(
    "name", ["summary.json", "environment.json", "metrics.jsonl", "samples.jsonl", "rollouts.jsonl"]
)
@pytest.mark.parametrize("content", ["", "{", "[]", "null", WRONG])
def test_files_that_are_not_what_they_should_be(tmp_path, name, content):
    run = fake_runs.ppo_run(tmp_path, steps=3, prompts=2)
    (run.path / name).write_text(content)
    read(render(run.path))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        render(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_bounded_however_long_the_run(tmp_path):
    run = RunDir.create(tmp_path, "long", "ppo", "")
    rows = [
        {"step": step, "time": step, "reward/mean": math.sin(step), "kl/reference": step}
        for step in range(20_000)
    ]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "word " * 5000
    sides = [{"prompt_id": i, "side": "after", "prompt": "p", "completion": text} for i in range(200)]
    (run.path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sides))
    columns = {"logprob": -1.25, "ref_logprob": -1.5, "kl": 0.25, "value": 0.5, "reward": -0.025, "advantage": 0.75}
    tokens = [{"token": " incomprehensible", **columns}] * 2000
    ids = [step if number else "again" for step in range(12) for number in range(4)]
    rollouts = [{"step": at // 4, "prompt_id": str(name), "tokens": tokens} for at, name in enumerate(ids)]
    (run.path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts))
    html, page = read(render(run.path))
    assert len(html) < 1_000_000
    assert "1872 more tokens" in page.text and "characters more" in page.text


coordinates = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.integers(-5, 5).map(float)
points = st.lists(st.tuples(st.integers(0, 10**6).map(float), coordinates), max_size=30)


@given(
    st.lists(points, max_size=3),
    st.none() | st.tuples(st.none() | st.floats(-10, 10), st.none() | st.floats(-10, 10)),
    st.lists(coordinates.filter(lambda value: value is not None), max_size=2),
)
def test_charts_hold_finite_coordinates_only(lines, band, marks):
    series = [Series(str(index), line) for index, line in enumerate(lines)]
    markers = [Marker("at", value, end) for value, end in zip(marks, ("start", "end"), strict=False)]
    chart = Page(line_chart(series, "label", "nats", band, markers))
    for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
        assert all(math.isfinite(float(value)) for value in chart.values(name))
    for path in chart.values("d"):
        assert all(math.isfinite(float(value)) for value in re.findall(r"[^ ML]+", path))


@pytest.mark.parametrize(
    ("values", "paths", "dots"),
    [
        ([], 0, 0),
        ([1.0], 0, 1),
        ([2.0, 2.0, 2.0], 1, 3),
        ([1.0, None, 2.0], 0, 2),
        ([1.0, 2.0, float("nan"), 1.0, 2.0], 2, 4),
        ([None, None], 0, 0),
        ([float(i) for i in range(50)], 1, 0),
    ],
)
def test_lines_break_at_gaps_and_lone_points_are_dots(values, paths, dots):
    tags = [tag for tag, _ in Page(line_chart([Series("s", list(enumerate(values)))], "label")).elements]
    assert (tags.count("path"), tags.count("circle")) == (paths, dots)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_even_and_inside(low, width):
    high = low + width
    if high - low < abs(low) * 1e-9:
        return
    ticks = nice_ticks(low, high)
    slack = (high - low) * 1e-6
    assert 1 <= len(ticks) <= 6 and all(low - slack <= tick <= high + slack for tick in ticks)


def test_thinning_keeps_peaks_and_gaps():
    line = [(float(i), 0.0) for i in range(10_000)]
    line[7001], line[3000] = (7001.0, 99.0), (3000.0, None)
    kept = thin(line)
    assert len(kept) <= MOST_POINTS and (7001.0, 99.0) in kept and (3000.0, None) in kept
    assert kept == sorted(kept, key=lambda point: point[0])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0, "0"),
        (0.5, "0.500"),
        (0.9999, "1.00"),
        (12.345, "12.3"),
        (999.96, "1,000"),
        (-0.0312, "−0.0312"),
        (3.4e-6, "3.4e−6"),
        (123456, "123,456"),
    ],
)
def test_numbers_show_three_figures(value, shown):
    assert number(value) == shown


def test_ticks_and_bytes_are_short():
    assert [compact(v) for v in (0, 0.002, 20, 12_000, 3e6, 1e-5)] == [
        "0",
        "0.002",
        "20",
        "12k",
        "3M",
        "1e−5",
    ]
    assert number(1_300_000_000, "bytes") == "1.3GB"


def test_what_would_not_show_becomes_a_sign():
    assert visible(" the\n", spaces=True) == [("·", True), ("the", False), ("↵", True)]
    assert visible("a\nb") == [("a\nb", False)]
    assert visible("x\u202ey\x1b") == [("x", False), ("⟨U+202E⟩", True), ("y", False), ("⟨U+001B⟩", True)]
    assert visible("नमस्ते 👩\u200d🔬") == [("नमस्ते 👩\u200d🔬", False)]
