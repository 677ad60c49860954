"""The classifier's section of a report: its tables, its diagram, and files that are not what they should be."""

from __future__ import annotations

import json

import fake_runs
import numpy as np
import pytest

from peftlab.evaluation.calibration import expected_calibration_error, reliability
from peftlab.report import render
from peftlab.report.classifier import chance_error, classifier_of
from peftlab.report.figures import figures_of
from peftlab.report.read import read_run
from peftlab.runs.rundir import RunDir

BIN = {"low": 0.8, "high": 0.9, "rows": 40, "confidence": 0.85, "accuracy": 0.75}


def write(folder, **changes):
    tables = {"labels": ["no", "yes"], "confusion": [[30, 10], [5, 55]], "reliability": [BIN]} | changes
    (folder / "classifier.json").write_text(json.dumps(tables))


def test_every_count_and_bin_is_shown_and_labels_are_escaped(tmp_path):
    folder = fake_runs.sft_run(tmp_path, "mine").path
    write(folder, labels=["<script>alert(1)</script>", "yes"])
    page = render(folder).read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert all(cell in page for cell in ("75.0%", "8.3%", "91.7%", "0.80 to 0.90", "Right and wrong"))
    view = classifier_of(folder)
    assert view.rows[0][1] == [("30", "75.0%", True), ("10", "25.0%", False)]
    assert view.chart.count("<rect") == 1


def folder_of(tmp_path, before, after, rows, name):
    """A run whose evaluation had these calibration errors on so many rows, all at confidence .85."""
    run = RunDir.create(tmp_path, name, "classify", 'recipe = "classify"\n')
    with run.session():
        run.log({"eval/ece": before}, 0)
        run.log({"eval/ece": after}, 9)
        run.finish({"eval/ece": after}, {"eval/ece": before})
    write(run.path, reliability=[BIN | {"rows": rows}])
    return run.path


@pytest.mark.parametrize(
    ("before", "after", "rows", "verdict", "words"),
    [
        (0.005, 0.01, 200, "healthy", "in the healthy range"),
        (0.01, 0.06, 200, "", "200 rows are too few to tell: chance alone adds up to 0.0506"),
        (0.01, 0.06, 20_000, "unhealthy", "outside the healthy range"),
        (0.01, 0.3, 200, "unhealthy", "outside the healthy range"),  # so far off that few rows do tell
        (0.3, 0.06, 20_000, "", "better, yet outside the healthy range"),
    ],
)
def test_a_calibration_error_is_red_where_it_became_worse_by_more_than_chance(
    before, after, rows, verdict, words, tmp_path
):
    folder = folder_of(tmp_path, before, after, rows, "judged")
    (figure,) = figures_of(read_run(folder))
    assert (figure.verdict, figure.verdict_text) == (verdict, words)
    page = render(folder).read_text()
    red = "v-unhealthy" in page.partition("<main>")[2], 'healthy strayed"' in page
    assert words in page and red == (verdict == "unhealthy",) * 2


def test_a_figure_without_a_direction_does_not_become_better(tmp_path):
    run = RunDir.create(tmp_path, "spread", "rloo", 'recipe = "rloo"\n')
    with run.session():
        run.finish({"reward/std": 0.05}, {"reward/std": 0.5})
    (figure,) = figures_of(read_run(run.path))
    assert (figure.verdict, figure.verdict_text) == ("unhealthy", "outside the healthy range")


@pytest.mark.parametrize("rows", [50, 200, 1000])
def test_a_calibrated_model_keeps_to_what_chance_makes(rows, tmp_path):
    """So in about 95 of 100 samples; and its error is no small part of that, so the bound hides little."""
    dice = np.random.default_rng(0)
    errors, bounds = [], []
    for _ in range(200):
        chances = dice.beta(4, 1, rows)
        labels = (dice.random(rows) < chances).astype(int)
        table = np.stack([1 - chances, chances], 1)
        write(tmp_path, reliability=reliability(table, labels))
        errors.append(expected_calibration_error(table, labels))
        counted, bound = chance_error(tmp_path)
        bounds.append(bound)
        assert counted == rows
    assert np.mean(np.array(errors) <= bounds) >= 0.92 and np.mean(bounds) < 2 * np.mean(errors)


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"labels": ["a"]}', '{"labels": 1, "confusion": [], "reliability": 2}']
)
def test_a_file_that_is_none_leaves_the_section_out(tmp_path, text):
    if text is not None:
        (tmp_path / "classifier.json").write_text(text)
    assert classifier_of(tmp_path) is None
