"""All alarms of one run: which of its series each check reads."""

from __future__ import annotations

from collections.abc import Sequence

from .alarms import (
    ENTROPY,
    JUDGE_DROP,
    LENGTH,
    REPETITION,
    UNCHECKED,
    Alarm,
    Ends,
    Points,
    against,
    drift,
    ends_against,
    kl_beyond,
)
from .read import RunFiles, as_number
from .stack import PART, contributions
from .text import title

# What knows better than the reward, if it was measured: the classifier of the evaluation, or labels known beforehand.
_GOLD = (("eval/judge", "the independent judge"), ("rubric/label", "the share with the true label stated"))


def alarms_of(run: RunFiles, distinct: Points) -> list[Alarm]:
    """Every check of a policy's run, alarms first; none of other recipes. `distinct`: (step, distinct-2), recorded."""
    if run.summary["recipe"] not in ("ppo", "rloo", "dpo"):
        return []
    reward, judge, lengths = (_points(run, name) for name in ("reward/mean", "eval/judge", "rollout/length"))
    by_step = against(title(_GOLD[0][0]), reward, judge, ("the reward", _GOLD[0][1]), JUDGE_DROP)
    found = [
        by_step if by_step.fired is not None else _judge_at_the_ends(run),
        *(_parts(run, reward) if sum(name.startswith(PART) for name in run.columns) > 1 else []),
        drift(LENGTH, lengths, _ends(run, "eval/length")),
        drift(ENTROPY, _points(run, "policy/entropy"), _ends(run, "eval/entropy")),
        drift(REPETITION, distinct, _ends(run, "eval/distinct_2")),
        kl_beyond(_points(run, "kl/reference"), as_number(run.config.get("kl_target")) or 0.0, lengths),
    ]
    return sorted(found, key=lambda alarm: not alarm.fired)


def in_short(alarms: Sequence[Alarm]) -> str:
    """How many fired, and where the first began; empty where none did."""
    fired = [alarm for alarm in alarms if alarm.fired]
    began = min((alarm.began for alarm in fired if alarm.began is not None), default=None)
    many = f"{len(fired)} alarm{'s' * (len(fired) > 1)}" if fired else ""
    return many if began is None else f"{many} from step {began} on"


def _parts(run: RunFiles, reward: Points) -> list[Alarm]:
    """The weighted parts that fall while the reward rises, or one line where none does; a growing penalty is a fall."""
    heading, parts = "Reward parts", contributions(run.columns, run.config.get("reward"))
    if not parts:
        return [Alarm(heading, None, f"{UNCHECKED}the config does not tell what each part weighs.")]
    found = [against(heading, reward, points, ("the reward", f"its part {name}")) for name, points in parts.items()]
    fired = [alarm for alarm in found if alarm.fired]
    if fired or found[0].fired is None:
        return fired or found[:1]
    return [Alarm(heading, False, f"No part falls while the reward rises: {', '.join(parts)}.")]


def _judge_at_the_ends(run: RunFiles) -> Alarm:
    margin = run.summary["recipe"] == "dpo"
    proxy = ("eval/reward_margin", "the reward margin") if margin else ("eval/reward", "the reward")
    name, words = next((gold for gold in _GOLD if None not in _ends(run, gold[0])), _GOLD[0])
    given = run.table("intervals").get(name)
    low, high = map(as_number, given) if isinstance(given, list) and len(given) == 2 else (None, None)
    interval = None if low is None or high is None else (low, high)
    return ends_against(title(name), _ends(run, proxy[0]), _ends(run, name), (proxy[1], words), interval)


def _points(run: RunFiles, name: str) -> list[tuple[float, float]]:
    return [(step, value) for step, value in run.columns.get(name, []) if value is not None]


def _ends(run: RunFiles, name: str) -> Ends:
    return as_number(run.table("baseline").get(name)), as_number(run.table("metrics").get(name))
