"""The classifier's section of a report: its tables, its diagram, and files that are not what they should be."""

from __future__ import annotations

import json

import fake_runs
import pytest

from peftlab.report import render
from peftlab.report.classifier import classifier_of

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


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"labels": ["a"]}', '{"labels": 1, "confusion": [], "reliability": 2}']
)
def test_a_file_that_is_none_leaves_the_section_out(tmp_path, text):
    if text is not None:
        (tmp_path / "classifier.json").write_text(text)
    assert classifier_of(tmp_path) is None
