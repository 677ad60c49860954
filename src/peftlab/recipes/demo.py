"""The whole lab on real reviews: each stage a real run with its own folder, then one table, samples and one report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import Config, load_config, to_toml
from ..errors import Interrupted
from ..report import render
from ..runs.atomic import read_rows
from ..runs.progress import say
from ..runs.rundir import RunDir
from ..runs.sanitize import sanitize
from ..runs.typed import typed
from . import load
from .launch import already_done, free_name, start, stopped

PROMPTS = 400  # of the reward model's pairs
OPENING = 200  # characters of a prompt that the terminal shows: a whole review would fill it


@dataclass(frozen=True)
class Stage:
    """One stage: a run of `recipe` by the shipped config demo-NAME.

    `figures` are (metric, what it measures) of the table's lines; `shown` counts the prompts printed before and after.
    `given` are keys that name what earlier stages left: {demo} is the demo's folder, {own} the config's own value.
    """

    name: str
    recipe: str
    figures: tuple[tuple[str, str], ...]
    shown: int = 0
    given: tuple[tuple[str, str], ...] = ()


CLASSIFY = Stage(
    "classify",
    "classify",
    (
        ("eval/accuracy", "accuracy on unseen reviews"),
        ("compare/accuracy", "bundled imdb-sentiment on as few tokens"),
    ),
)
SFT = Stage("sft", "sft", (("eval/perplexity", "perplexity of unseen openings"),))
PAIRS = "{demo}/preferences"  # answers of the SFT model, sampled before the stage `reward`
TRAIN_PAIRS = "preferences-train.jsonl"
REWARD = Stage(
    "reward",
    "reward",
    (
        ("eval/pair_accuracy", "pairs of unseen prompts ranked right"),
        ("compare/pair_accuracy_longer", "the same for: the longer one wins"),
    ),
    given=(
        ("model", "{demo}/sft/adapter"),
        ("train_data", f"{PAIRS}/{TRAIN_PAIRS}"),
        ("eval_data", f"{PAIRS}/preferences-test.jsonl"),
    ),
)
PPO = Stage(
    "ppo",
    "ppo",
    (
        ("eval/judge", "p(wanted sentiment), independent judge"),
        ("eval/kl", "KL to the SFT model, nats a completion"),
        ("eval/perplexity_ratio", "perplexity under SFT, ratio"),
        ("eval/distinct_2", "distinct bigrams"),
    ),
    shown=3,
    given=(("model", "{demo}/sft/adapter"), ("reward", "0.5*{demo}/reward/adapter + 0.5*{own}")),
)
EXPLANATIONS = Stage(
    "explanations",
    "sft",
    (
        ("rubric/label", "true label stated, unseen reviews"),
        ("rubric/evidence", "review cited as evidence"),
        ("eval/perplexity", "perplexity of unseen explanations"),
    ),
    shown=1,
)
SUMMARIZE = Stage(
    "summarize",
    "summarize",
    (
        ("eval/rougeL", "ROUGE-L of gists of unseen reviews"),
        ("compare/rougeL", "the same for lead-1, first sentence"),
    ),
    shown=1,
)
STAGES = (CLASSIFY, SFT, REWARD, PPO)
FULL = (*STAGES, EXPLANATIONS, SUMMARIZE)


class DemoConfig(Config):
    """What a demo's run folder notes of it: its stages, each by the shipped config demo-STAGE."""

    recipe: str = "demo"
    stages: tuple[str, ...]


def run_demo(
    root: Path, name: str | None = None, *, full: bool = False, resume: bool = False, as_json: bool = False
) -> dict[str, Any]:
    """Run the stages in order, each in its own run folder below `root/name`; then table, samples, report.

    `full` adds explanations and summaries. Without a name the folder is demo, or demo-full, or the next that is free.
    """
    stages = FULL if full else STAGES
    config = DemoConfig(stages=tuple(stage.name for stage in stages))
    words = ["demo", *(["--full"] if full else [])]
    name = name or free_name(root, "demo-full" if full else "demo", resume, config, words)
    run = RunDir.create(root, name, "demo", to_toml(config), resume=resume)
    console = Console(stderr=as_json)
    try:
        with run.session():
            done = run.finished
            summary = run.summary if done else _run_stages(run, stages, console, root, resume)
    except Interrupted as error:
        raise stopped(error.signum, [*words, "--run", name]) from None
    assert summary is not None
    report = render(run.path)
    if as_json:
        print(json.dumps(summary, indent=1))
    elif done:
        say(already_done(run))
    else:
        console.print(outcome(stages, summary["stages"]))
        for stage in stages:
            if stage.shown:
                show_samples(console, run.path / stage.name, stage.shown)
        console.print(f"\n{summary['time']['wall_s']:.0f} s. Report: {report}", highlight=False, soft_wrap=True)
        texts = run.path / PPO.name / "samples.jsonl", Path(PAIRS.format(demo=run.path)) / TRAIN_PAIRS
        told = f"Texts: {texts[0]}, before and after; {texts[1]}, what the reward model learned from"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
        talk = typed("chat", f"{run.name}/{PPO.name}")
        console.print(f"Talk to it: {talk}", highlight=False, markup=False, soft_wrap=True)
    return summary


def _run_stages(
    run: RunDir, stages: tuple[Stage, ...], console: Console, root: Path, resume: bool
) -> dict[str, Any]:
    """Every stage; one that is done is kept. The demo's own figures are those of PPO."""
    done: dict[str, Any] = {}
    for number, stage in enumerate(stages, 1):
        place = f"{number} of {len(stages)}"
        console.rule(f"{stage.name}, {place}")
        if stage is REWARD:
            _sample_pairs(run.path)
            if run.stop_requested:
                raise Interrupted(run.stop_requested)
        config = _config(stage)
        own = config.model_dump()
        config = config.with_(**{key: text.format(demo=run.path, own=own[key]) for key, text in stage.given})
        done[stage.name] = start(stage.recipe, config, root, f"{run.name}/{stage.name}", resume)
        told = f"[{place}] {stage.name}: {_first_figure(stage, done[stage.name])}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
        if run.stop_requested:  # it came as the stage ended: the stage is done, the demo is not
            raise Interrupted(run.stop_requested)
    ppo = done[PPO.name]
    artifacts = {"report": "report.html", "adapter": "ppo/adapter"}
    return run.finish(ppo["metrics"], ppo["baseline"], ppo["intervals"], artifacts, stages=done)


def _config(stage: Stage) -> Any:
    return load_config(load(stage.recipe).CONFIG, f"demo-{stage.name}")


def _sample_pairs(folder: Path) -> None:
    """Pairs of the SFT model's answers as PPO samples them, the better one by its classifier; kept where they are."""
    from .build_preferences import PreferenceOptions, build_preferences

    ppo = _config(PPO)
    options = PreferenceOptions(
        policy=str(folder / "sft" / "adapter"),
        prompts=ppo.train_data,
        output=Path(PAIRS.format(demo=folder)),
        scorer=ppo.reward,
        limit=PROMPTS,
        prompt_tokens=ppo.prompt_tokens,
        max_new_tokens=ppo.max_new_tokens,
        device=ppo.device,
    )
    if not options.beside(".json").exists():
        build_preferences(options)


def outcome(stages: tuple[Stage, ...], done: dict[str, Any]) -> Table:
    """The table that ends the demo: before -> after of every stage. `done` holds their summaries by name."""
    table = Table(title="what was learned", title_style="bold", show_edge=False, pad_edge=False)
    for column in ("stage", "figure", "before", "after", "seconds"):
        table.add_column(column, justify="left" if column in ("stage", "figure") else "right")
    for stage in stages:
        summary = done[stage.name]
        head = [stage.name, f"{summary['time']['wall_s']:.0f}"]
        for metric, words in stage.figures:
            table.add_row(head[0], words, *_sides(summary, metric), head[1])
            head = ["", ""]
    return table


def show_samples(console: Console, folder: Path, count: int) -> None:
    """`count` prompts before and after, evenly spread over those of the evaluation (not picked).

    A completion stands behind its prompt. One that does not continue its prompt's line has the prompt's opening above.
    """
    sides: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    for row in read_rows(folder / "samples.jsonl"):
        sides[row["side"]].append(row)
    pairs = list(zip(*sides.values(), strict=True))
    for pair in pairs[:: max(1, len(pairs) // count)][:count]:
        prompt = sanitize(pair[0]["prompt"])
        console.print()
        if "\n" in prompt:
            opening = _one_line(prompt)
            console.print(Text(opening if len(opening) <= OPENING else opening[:OPENING] + " ...", style="bold"))
            prompt = ""
        for side, row in zip(sides, pair, strict=True):
            judged = f"{row['judge']:.2f}  " if "judge" in row else ""
            line = Text(f"{side:>6} {judged}", style="dim")
            line.append(prompt, style="bold")
            line.append(_one_line(sanitize(row["completion"])), style="default")
            console.print(line)


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _first_figure(stage: Stage, summary: dict[str, Any]) -> str:
    """What the table's first line of a stage will say, in words."""
    metric, words = stage.figures[0]
    return "{}, {} before, {} after".format(words, *_sides(summary, metric))


def _sides(summary: dict[str, Any], metric: str) -> list[str]:
    return [_number(summary[side].get(metric)) for side in ("baseline", "metrics")]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
