"""`peftlab inspect`: recorded rollouts of a run, token by token, in the terminal. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import UserError, with_article
from ..report.read import Row, as_number, read_run
from ..report.recorded import MEASURES, Recorded, read_recorded, rows_at
from ..report.watch import alarms_of
from ..runs.rundir import find_run
from .inspect_view import show_list, show_rollouts

SHOWN = 8  # steps or prompts that an error or a heading lists


def inspect(
    root: Path, name: str, step: int | None, prompt: str | None, by: str | None, listed: bool, as_json: bool
) -> None:
    """Print the answers to one prompt at one step of the run `name` below `root`, or, `listed`, what is recorded.

    `step`: the last one recorded where it is None. `prompt`: its number in that step, from 0, or its id; with an id and
    no step, the last step that has it. `by`: what colours the tokens, advantage where the rollouts have one.
    Raises UserError where the run has no rollouts, or not these.
    """
    path = find_run(root, name)
    run, recorded = read_run(path), read_recorded(path)
    if not recorded.rows:
        raise UserError(_nothing(root, path, run.summary))
    if listed:
        rows = _listing(path, recorded, step)
        _json(rows) if as_json else show_list(rows, Console())
        return
    by = _measure(by, recorded)
    step, prompt_id, at = _chosen(run.name, recorded, step, prompt)
    answers = rows_at(path, at)
    if as_json:
        _json(answers)
        return
    others = [other for other in recorded.steps_of(prompt_id) if other != step]
    elsewhere = _some([f"--step {other} --prompt {list(recorded.prompts(other)).index(prompt_id)}" for other in others])
    ids = list(recorded.prompts(step))
    which = f"prompt {ids.index(prompt_id)} ({_numbers(ids)}), id {prompt_id}"
    place = f"{run.name}: step {step} (recorded: {steps_in_words(recorded.steps)}), {which}"
    alarms = alarms_of(run, recorded.distinct_2)
    show_rollouts(place, answers, by, recorded.scales, elsewhere, alarms, Console())


def _measure(by: str | None, recorded: Recorded) -> str:
    """The measure asked for, or the first that there is."""
    there = list(recorded.scales)
    if by is None and there:
        return there[0]
    if by in MEASURES and by not in there or not there:
        raise UserError(f"--by {by or MEASURES[0]}: the rollouts have {', '.join(there) or 'no number to colour by'}")
    if by not in there:
        raise UserError(f"--by {by}: give one of {', '.join(MEASURES)}")
    return by


def _chosen(run: str, recorded: Recorded, step: int | None, prompt: str | None) -> tuple[int, str, list[int]]:
    """(step, prompt id, places of its rows); UserError where there is no such step or prompt."""
    steps, asked = recorded.steps, prompt or "0"
    if step is None:
        numbered = asked.isdecimal() and int(asked) < len(recorded.prompts(steps[-1]))
        step = steps[-1] if numbered else max(recorded.steps_of(asked), default=steps[-1])
    if step not in steps:
        raise UserError(f"--step {step}: run {run} has no rollouts of it; recorded: {steps_in_words(steps)}")
    prompts = recorded.prompts(step)
    ids = list(prompts)
    found = ids[int(asked)] if asked.isdecimal() and int(asked) < len(ids) else asked
    if found not in prompts:
        known = _some([f"{number} is {prompt_id}" for number, prompt_id in enumerate(ids)])
        raise UserError(
            f"--prompt {asked}: not recorded at step {step} of run {run}; give {_numbers(ids)}, or an id: {known}; "
            f"`peftlab inspect {run} --list` shows them all"
        )
    return step, found, prompts[found]


def _listing(path: Path, recorded: Recorded, step: int | None) -> list[dict[str, Any]]:
    """One row a prompt and step: how many answers, their mean reward, and prompt and first answer as one text."""
    if step is not None and step not in recorded.steps:
        raise UserError(f"--step {step}: nothing is recorded of it; recorded: {steps_in_words(recorded.steps)}")
    wanted = [step] if step is not None else recorded.steps
    groups = [(s, number, p, at) for s in wanted for number, (p, at) in enumerate(recorded.prompts(s).items())]
    places = sorted(place for *_, at in groups for place in at)
    found: dict[int, Row] = dict(zip(places, rows_at(path, places), strict=False))
    rows = []
    for its_step, number, prompt_id, at in groups:
        answers = [found[place] for place in at if place in found]
        scores = [score for row in answers if (score := as_number(row.get("score"))) is not None]
        rows.append(
            {
                "step": its_step,
                "prompt": number,
                "prompt_id": prompt_id,
                "answers": len(answers),
                "reward": sum(scores) / len(scores) if scores else None,
                "text": "".join(str(row.get(key, "")) for row in answers[:1] for key in ("prompt", "completion")),
            }
        )
    return rows


def _nothing(root: Path, path: Path, summary: Row) -> str:
    """Why a run has no rollouts, and what it has instead."""
    recipe, status = summary["recipe"], summary["status"]
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    what = with_article(recipe)
    stages = [file.parent for file in sorted(path.glob("*/rollouts.jsonl"))]
    if stages:
        return f"run {name} is {what}; its rollouts are those of " + ", ".join(f"{name}/{s.name}" for s in stages)
    if recipe == "dpo":
        return (
            f"run {name} is a dpo run: it learns from pairs and samples nothing while it trains; "
            f"`peftlab report {name}` shows its margins, and its samples before and after"
        )
    if recipe in ("ppo", "rloo"):
        if status in ("failed", "stopped", "killed"):
            return f"run {name} has no rollouts; {status}: {summary['reason']}"
        return f"run {name} has recorded no rollouts yet; the first come with its first step"
    return f"run {name} is {what} run and has no rollouts; ppo and rloo record them; see `peftlab report {name}`"


def steps_in_words(steps: list[int]) -> str:
    """1, 10, 20 ... 100: the first steps and the last one."""
    return _some([str(step) for step in steps])


def _numbers(ids: list[str]) -> str:
    """The numbers that the prompts of a step go by."""
    return f"0 to {len(ids) - 1}" if len(ids) > 1 else "0"


def _some(items: list[str]) -> str:
    return ", ".join(items) if len(items) <= SHOWN else f"{', '.join(items[: SHOWN - 1])} ... {items[-1]}"


def _json(rows: list[dict[str, Any]]) -> None:
    print(json.dumps(rows, indent=1))
