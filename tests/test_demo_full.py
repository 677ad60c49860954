"""The demo with explanations and summaries, whole but tiny: its stages by configs of this test's."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import tiny
from commands import peftlab

from peftlab import config
from peftlab.config import load_config, shipped_configs, to_toml
from peftlab.data import sources
from peftlab.data.records import SummaryPair
from peftlab.errors import Interrupted
from peftlab.models.catalog import named, resolve
from peftlab.recipes import demo, load, summarize
from peftlab.recipes.common import load_rows
from peftlab.recipes.launch import launch
from peftlab.report import render
from peftlab.runs.rundir import RunDir
from peftlab.runs.summary import read_summary

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["classify", "sft", "reward", "ppo", "explanations", "summarize"]

pytestmark = pytest.mark.usefixtures("one_thread")


def explained(count: int) -> list[dict]:
    """Prompts of two lines with what to answer, and the label."""
    rows = tiny.reviews(count, seed=count)
    words = ("Negative", "Positive")
    return [
        {"prompt": f"{row['text'][:20]}\n", "completion": f" {words[row['label']]}. good film", "label": row["label"]}
        for row in rows
    ]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A folder of configs like the shipped ones, for jobs of a second each."""
    root = tmp_path_factory.mktemp("demo")
    shop = tiny.workshop(root / "shop")
    for name, seed in (("reward", 1), ("judge", 2)):
        launch("classify", None, tiny.overrides(shop, "classify", f"seed={seed}"), root / "shop", name)
    shop["explained"] = tiny.write_rows(root / "explained.jsonl", explained(24))
    shop["explained_test"] = tiny.write_rows(root / "explained-test.jsonl", explained(8))
    own = {
        "ppo": [f"{key}={root / 'shop' / key}" for key in ("reward", "judge")],
        "explanations": ["train_data={explained}", "eval_data={explained_test}", "answers=6"],
    }
    shelf = root / "configs"
    shelf.mkdir()
    for stage in demo.FULL:
        pairs = [pair.format(**shop) for pair in own.get(stage.name, [])]
        resolved = load_config(load(stage.recipe).CONFIG, None, tiny.overrides(shop, stage.recipe, *pairs))
        (shelf / f"demo-{stage.name}.toml").write_text(to_toml(resolved))
    return shelf


@pytest.fixture
def place(shelf, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(config, "SHIPPED", shelf)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_a_full_demo_runs_every_stage_and_tells_of_each(place):
    outcome = peftlab("demo --full")
    assert outcome.code == 0, outcome.err
    folder = place / "demo-full"
    summary = read_summary(folder)
    assert (summary["recipe"], summary["run"], summary["status"]) == ("demo", "demo-full", "done")
    assert list(summary["stages"]) == NAMES == tomllib.loads((folder / "config.toml").read_text())["stages"]
    for name, stage in summary["stages"].items():
        assert stage == read_summary(folder / name), "a stage is a run of its own"
        assert (stage["run"], stage["status"]) == (f"demo-full/{name}", "done")
    assert summary["metrics"] == summary["stages"]["ppo"]["metrics"]

    table, *samples = re.split(r"\n(?=before)", outcome.out)
    for stage in demo.FULL:
        figures = summary["stages"][stage.name]
        for name, words in stage.figures:
            assert words in table
            assert name in figures["metrics"] or name == "compare/accuracy", "the tiny classifier compares with none"
    assert len(samples) == sum(stage.shown for stage in demo.FULL)
    assert all(re.search(r"^ after ", sample, re.M) for sample in samples)

    told = dict(re.findall(r"^\[(\d of 6)\] (\w+): .+, \S+ before, \S+ after$", outcome.out, re.M))
    assert told == {f"{number} of 6": name for number, name in enumerate(NAMES, 1)}
    assert re.findall(r"^─+ (\w+), (\d) of 6 ─+$", outcome.out, re.M) == [(n, str(i)) for i, n in enumerate(NAMES, 1)]
    talk = re.search(r"^Talk to it: .*peftlab chat (\S+)$", outcome.out, re.M)[1]
    assert talk == "demo-full/ppo" and resolve(named(talk)).path == Path("runs/demo-full/ppo/adapter")

    files = re.findall(r"[\w./-]+\.jsonl", re.search(r"^Texts: (.*)$", outcome.out, re.M)[1])
    samples, pairs = ([json.loads(line) for line in Path(path).read_text().splitlines()] for path in files)
    assert {row["side"] for row in samples} == {"before", "after"} and all("completion" in row for row in samples)
    assert all({"prompt", "chosen", "rejected"} <= row.keys() for row in pairs)

    page = (folder / "report.html").read_text()
    for name in NAMES:
        assert f'href="#demo-full-{name}">{name}</a>' in page and f"<h2>{name}</h2>" in page
    assert {"demo-full-explanations-samples", "demo-full-summarize-samples"} <= set(re.findall(r'id="([^"]+)"', page))


def test_a_plain_demo_has_four_stages(place):
    assert peftlab("demo").code == 0
    summary = read_summary(place / "demo")
    assert list(summary["stages"]) == NAMES[:4]
    folders = {path.name for path in (place / "demo").iterdir() if path.is_dir()}
    assert folders == {*NAMES[:4], "preferences"}
    steered = tomllib.loads((place / "demo" / "ppo" / "config.toml").read_text())
    assert "demo/reward/adapter" in steered["reward"], "PPO optimises the reward model of this demo"


def test_a_stopped_full_demo_keeps_its_stages_and_goes_on(place, monkeypatch):
    def stop(*_):
        raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(summarize, "run", stop)
        stopped = peftlab("demo --full --run mine")
    assert stopped.code == 143
    assert "peftlab demo --full --run mine --resume" in stopped.err
    before = read_summary(place / "mine")
    assert before["status"] == "stopped" and set(before["stages"]) == set(NAMES[:5])
    assert peftlab("demo --full --run mine --resume").code == 0
    after = read_summary(place / "mine")
    assert after["status"] == "done" and list(after["stages"]) == NAMES
    assert all(after["stages"][name] == before["stages"][name] for name in NAMES[:5]), "not run again"
    again = peftlab("demo --full --run mine --resume")
    assert (again.code, again.out) == (0, "") and again.err.startswith("mine: already done, since 20")


def test_a_report_shows_a_question_once_and_a_long_one_folded(tmp_path):
    """What goes on in its prompt's line stands behind it on either side; other answers stand below one prompt."""
    run = RunDir.create(tmp_path, "asked", "sft", 'recipe = "sft"\n')
    prompts = {"p": "this film", "q": "this plot\nWhy?", "r": "a scene " * 99 + "\nWhy?"}
    with run.session():
        run.write_samples({"prompt_id": key, "side": side, "prompt": prompt, "completion": f" {side} {key}."}
                          for side in ("before", "after") for key, prompt in prompts.items())
        run.finish({"rubric/label": 0.5}, {"rubric/label": 0.1})
    page = render(run.path).read_text()
    assert page.count('<span class="prompt">this film</span> ') == 2
    assert page.count("this plot") == 1
    assert len(re.findall('<details class="asked"><summary><bdi>(?:a scene )+', page)) == 1
    assert all(f">{side} {key}.<" in page for side in ("before", "after") for key in "qr")
    assert "True label stated" in page


def test_make_demo_full_types_a_command_that_exists():
    makefile = (ROOT / "Makefile").read_text()
    typed = dict(re.findall(r"^(demo[\w-]*):.*\n\t@\$\(BIN\)/peftlab (.+)$", makefile, re.M))
    assert typed == {"demo": "demo", "demo-full": "demo --full"}
    phony = next(line for line in makefile.splitlines() if line.startswith(".PHONY"))
    assert typed.keys() <= set(phony.split())


@pytest.mark.parametrize("stage", demo.FULL, ids=lambda stage: stage.name)
def test_the_shipped_config_of_a_stage_is_of_its_recipe(stage):
    resolved = load_config(load(stage.recipe).CONFIG, f"demo-{stage.name}")
    assert resolved.recipe == stage.recipe
    if stage.name == "explanations":
        assert 0 < resolved.answers <= resolved.eval_limit


# A row as each dataset of the Hub spells it.
HUB_ROWS = {
    "summarize-xsum": {"dialogue": "A long text.", "summary": "Short.", "id": "1"},
    "summarize-samsum": {"dialogue": "A long text.", "summary": "Short.", "id": "1"},
    "summarize-cnn": {"article": "A long text.", "highlights": "Short.", "id": "1"},
}


def test_every_preset_of_the_hub_is_known_here():
    found = {name for name, path in shipped_configs().items() if "google-t5/" in path.read_text()}
    assert found == HUB_ROWS.keys()


@pytest.mark.parametrize("name", HUB_ROWS)
def test_a_preset_reads_the_columns_of_its_dataset(name, monkeypatch):
    asked = []

    def hub(dataset, split, labels, columns):
        asked.append(f"{dataset}:{split}")
        yield 0, HUB_ROWS[name]
        yield 1, dict.fromkeys(HUB_ROWS[name], "")

    monkeypatch.setattr(sources, "_from_hub", hub)
    resolved = load_config(summarize.CONFIG, name)
    for which in ("train", "eval"):
        rows = load_rows(resolved, which, "summarize")
        assert rows.records == [SummaryPair("1", "A long text.", "Short.")]
        assert len(rows.skipped) == 1, "an empty row costs itself, not the job"
    assert asked == [resolved.train_data, resolved.eval_data]


def test_tables_show_intervals_beside_figures(place, shelf):
    done = peftlab(f"summarize {shelf / 'demo-summarize.toml'} --run one seed=3")
    assert done.code == 0, done.err
    assert 'seed = 3' in (place / "one" / "config.toml").read_text()
    header, *lines = [re.split(r"\s{2,}", line.strip()) for line in done.out.split("\n\n")[0].splitlines()
                      if not line.startswith("  step")]
    assert header == ["metric", "before", "after", "95% interval"]
    shown = {line[0]: line[-1] for line in lines}
    intervals = read_summary(place / "one")["intervals"]
    assert shown["compare/rougeL"] == "-" and "compare/rougeL" not in intervals
    low, high = map(float, shown["eval/perplexity"].split(" to "))
    assert [low, high] == pytest.approx(intervals["eval/perplexity"], rel=1e-3)

    texts = tiny.write_rows(place / "rows.jsonl", tiny.summaries(6, seed=1))
    told = peftlab(f"eval runs/one --data {texts} --device cpu")
    assert told.code == 0, told.err
    facts, table = told.out.split("\n\n")
    assert facts.split()[:2] == ["model", "runs/one"] and "rows" in facts
    assert table.splitlines()[0].split() == ["metric", "value", "95%", "interval"]
    found = json.loads(peftlab(f"eval runs/one --data {texts} --device cpu --json").out)
    assert [line.split()[0] for line in table.splitlines()[1:]] == list(found["metrics"])
