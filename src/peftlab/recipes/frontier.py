"""`peftlab eval --frontier`: what checkpoints of runs gained for their KL, beside what their reference could give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.frontier import Place, best_of_n_curve, tilted_curve
from ..models.roles import POLICY
from ..report.frontier import Cross, Curve, frontier_chart
from ..rl.rollout import PromptBatch
from ..runs.atomic import write_json, write_text
from ..runs.progress import say
from .before_after import REWARD
from .policy_eval import completions, own_sampler, sampled_side
from .policy_options import PolicyOptions, Ruler, ruler_by, ruler_of
from .policy_run import PolicyRun, ReadRun

# Keys that say what is asked, of whom, and how far from whom: runs of one picture have them in common.
SHARED = ("model", "task", "want", "judge", "prompt_tokens", "max_new_tokens")


def draw_frontier(
    folders: Sequence[Path], data: str | None, limit: int | None, device: str, options: PolicyOptions
) -> dict[str, Any]:
    """Points, curves and where the chart lies; the same, but the chart, is written as JSON beside it.

    Prompts and the ruler are the first run's, and all runs have its reference. UserError where they have not.
    """
    runs = [ReadRun.at(folder) for folder in folders]
    _check(runs, device)
    first = PolicyRun.open(folders[0], device)
    prompts = first.prompts(data, limit)
    by, ruler = ruler_of(first, options.by, prompts)
    name = options.by or by
    curves = _curves(first, prompts, name, ruler, options.reference_samples)
    points = _points(first, prompts, by, ruler, options.samples)
    for folder in folders[1:]:  # one base in memory besides the first run's
        points += _points(PolicyRun.open(folder, device), prompts, by, ruler, options.samples)
    found = {
        "runs": [run.name for run in runs],
        "by": name,
        "prompts": len(prompts.texts),
        "samples": options.samples,
        "reference_samples": options.reference_samples,
        "sha256": first.run.sha256,
        "points": points,
        "curves": {title: [asdict(place) for place in places] for title, places in curves.items()},
    }
    write_text(options.chart, _picture(points, curves, name))
    facts = options.chart.with_suffix(".json")
    write_json(facts, found)
    return {**found, "chart": str(options.chart), "json": str(facts)}


def frontier_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The points and curves of `draw_frontier` as rows of one table."""
    told = [(f"{point['run']}, step {point['step']}", point) for point in found["points"]]
    told += [(f"{title}, {place['at']:.3g}", place) for title, places in found["curves"].items() for place in places]
    return [
        {
            "what": what,
            "KL": place["kl"],
            found["by"]: place["value"],
            "95% interval": "{:.4g} to {:.4g}".format(*place["interval"]),
        }
        for what, place in told
    ]


def _check(runs: Sequence[ReadRun], device: str) -> None:
    """UserError where runs are not alike in what a picture needs, or where one has no policy yet."""
    configs = [run.config_on(device) for run in runs]
    for run, config in zip(runs, configs, strict=True):
        apart = [key for key in SHARED if getattr(config, key) != getattr(configs[0], key)]
        if apart:
            there, here = (getattr(one, apart[0]) for one in (config, configs[0]))
            raise UserError(
                f"--frontier: run {run.name} has {apart[0]} {there!r} where {runs[0].name} has {here!r}, so their "
                "points are of different things; draw them apart"
            )
        if not (run.steps or run.has_adapter):
            raise UserError(f"--frontier: run {run.name} has neither a checkpoint nor an adapter; let it run on")


def _curves(first: PolicyRun, prompts: PromptBatch, name: str, ruler: Ruler, samples: int) -> dict[str, list[Place]]:
    """Best-of-n and the tilt of the reference's own answers: by the ruler itself, and by what the run learned from."""
    asked = prompts.repeated(samples)
    say(f"{len(asked.texts)} answers of the reference")
    reference = own_sampler(first.roles, None)
    texts = asked.texts, completions(reference, "the reference", asked.token_ids, first), asked.records
    measured = ruler(*texts).reshape(-1, samples)
    curves = {
        f"tilted by {name}": tilted_curve(measured, measured),
        f"best of n by {name}": best_of_n_curve(measured, measured),
    }
    reward = first.reward() if name != REWARD else None
    if reward is not None:
        rewarded = ruler_by(reward)(*texts).reshape(-1, samples)
        curves |= {
            "tilted by the reward": tilted_curve(rewarded, measured),
            "best of n by the reward": best_of_n_curve(rewarded, measured),
        }
    return curves


def _points(one: PolicyRun, prompts: PromptBatch, by: str, ruler: Ruler, samples: int) -> list[dict[str, Any]]:
    """The point of each checkpoint; of the adapter, where a run has no checkpoint any more."""
    points = []
    steps: list[int | None] = [*one.run.steps] or [None]
    for step in steps:
        one.load_policy(step)
        side = sampled_side(one, POLICY, prompts, samples, lambda *texts: {by: ruler(*texts)})
        spread = side.intervals()
        points.append(
            {
                "run": one.run.name,
                "recipe": one.run.recipe,
                "seed": one.config.seed,
                "step": "end" if step is None else step,
                "kl": float(side.kl.mean()),
                "kl_interval": spread["eval/kl"],
                "value": float(side.measured[by].mean()),
                "interval": spread[by],
            }
        )
        say(f"{one.run.name}, step {points[-1]['step']}: KL {points[-1]['kl']:.3g}, {by} {points[-1]['value']:.3g}")
    return points


def _picture(points: Sequence[dict[str, Any]], curves: dict[str, list[Place]], name: str) -> str:
    runs = list(dict.fromkeys(point["run"] for point in points))
    crosses = [
        Cross(run, [(p["kl"], p["value"], p["kl_interval"], p["interval"]) for p in points if p["run"] == run])
        for run in runs
    ]
    lines = [Curve(title, [(place.kl, place.value) for place in places]) for title, places in curves.items()]
    return frontier_chart(crosses, lines, name)
