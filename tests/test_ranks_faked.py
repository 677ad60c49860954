"""What a process makes of the others: its own words and steps, with theirs, or their loss, faked."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_group import group

from peftlab.errors import Interrupted, LabError
from peftlab.models.adapters import Lora
from peftlab.models.backbone import Backbone, fingerprint
from peftlab.models.roles import Roles
from peftlab.ops import ranks
from peftlab.recipes.several import joined
from peftlab.rl.control import FixedKL
from peftlab.rl.gather import gathered, require_same_weights
from peftlab.rl.ppo import PPOSettings, PPOTrainer
from peftlab.rl.rollout import PromptBatch
from peftlab.runs.launched import PeersLost
from peftlab.runs.signals import StopSignals
from peftlab.sampling.sampler import Decoding, Sampler

pytestmark = pytest.mark.usefixtures("one_thread")


def test_alone_nothing_is_shared():
    figures = [torch.tensor([1.0, 2.0])]
    ranks.add_up(figures)
    assert figures[0].tolist() == [1.0, 2.0]
    assert (ranks.size(), ranks.rank(), ranks.share(5), ranks.objects("x")) == (1, 0, range(5), ["x"])
    assert (ranks.agreed(None), ranks.agreed(15)) == (None, 15)


def ppo(tiny_causal) -> PPOTrainer:
    """PPO on a random model, whose reward is the length of a completion."""
    model, tokenizer = tiny_causal("gpt2")
    roles = Roles(Backbone("tiny", model, tokenizer, fingerprint(model)), Lora(r=2, alpha=2))

    def length(prompts, completions, records):
        return torch.tensor([float(len(text)) for text in completions]), {}

    return PPOTrainer(roles, Sampler(roles.twin, tokenizer), length, FixedKL(0.01), PPOSettings(), Decoding(4))


def prompts(count: int) -> PromptBatch:
    return PromptBatch([[3, 4]] * count, ["x"] * count, [None] * count)


@pytest.mark.parametrize(("theirs", "broken"), [([math.nan, 0.0], "first_kl"), ([0.0, math.nan], "first_ratio_error")])
def test_a_first_step_that_is_not_a_number_elsewhere_stops_this_process_too(tiny_causal, monkeypatch, theirs, broken):
    trainer = ppo(tiny_causal)
    rollout = trainer.collect(prompts(4))
    monkeypatch.setattr(ranks, "objects", lambda mine: [mine, theirs])
    with pytest.raises(LabError, match=f"{broken} is nan"):
        trainer.check_first(rollout)


GONE = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


@pytest.fixture
def member(monkeypatch) -> Callable[..., None]:
    """Makes this process one of two that have met, with torch's own part faked: member(rank, objects)."""

    def join(number: int, objects: Callable[[Any], list[Any]]) -> None:
        for name, value in group(number).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        monkeypatch.setattr(ranks, "size", lambda: 2)
        monkeypatch.setattr(ranks, "rank", lambda: number)
        monkeypatch.setattr(ranks, "objects", objects)

    return join


def lost(mine: Any) -> list[Any]:
    raise GONE


def test_a_process_lost_outside_a_session_is_told_in_one_line_with_what_torch_said(member):
    member(0, lost)
    said = r"^another of the 2 .*\(RuntimeError: .*Connection closed"
    with pytest.raises(PeersLost, match=said) as end, joined("cpu"):
        ranks.objects(None)
    assert "\n" not in str(end.value)


def test_a_process_lost_when_all_leave_leaves_a_run_that_is_done(member, capsys):
    member(0, lost)
    with joined("cpu"):
        pass
    assert capsys.readouterr().err == "another of the 2 processes ended too early; the work of this one is done\n"
    with pytest.raises(Interrupted), joined("cpu"):
        raise Interrupted(signal.SIGTERM)


def test_no_signal_that_comes_late_takes_a_process_from_the_first_one(member):
    """A process that heeded them would end, and with it this test."""
    heard = []

    def leaving(mine: Any) -> list[Any]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        heard.append("left")
        return [mine, mine]

    member(1, leaving)
    with joined("cpu"), StopSignals() as session:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert session.requested == signal.SIGTERM
    assert heard == ["left"]


def test_a_signal_before_the_session_stops_the_session():
    with StopSignals() as outer:
        os.kill(os.getpid(), signal.SIGTERM)
        with StopSignals() as session:
            assert session.requested == outer.requested == signal.SIGTERM


def test_a_reward_that_gives_other_parts_in_another_process_ends_all_with_both_names(tiny_causal, monkeypatch):
    trainer = ppo(tiny_causal)
    mine = replace(trainer.collect(prompts(2)), score_parts={"a": torch.zeros(2), "b": torch.zeros(2)})
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "objects", lambda told: [told, (told[0], {"a": torch.zeros(2)}, told[2])])
    with pytest.raises(LabError) as end:
        gathered(mine, prompts(4))
    assert str(end.value) == "reward: process 0 gave parts a, b, process 1 a; give the same parts for every list"

    measured = {"logprobs": torch.zeros(2, 4)}
    monkeypatch.setattr(ranks, "objects", lambda told: [told, (measured, told[1], told[2])])
    with pytest.raises(LabError, match="process 0 measured .*exact_kl.*, process 1 logprobs$"):
        gathered(mine, prompts(4))
    monkeypatch.setattr(ranks, "objects", lambda told: [told, told])
    both = gathered(mine, prompts(4))
    assert both.score_parts.keys() == {"a", "b"} and len(both.scores) == len(both.completions) == 4


def test_what_two_processes_cannot_share_evenly_is_refused_of_a_trainer_too(tiny_causal, monkeypatch):
    trainer = ppo(tiny_causal)
    rollout = trainer.collect(prompts(6))
    trainer.settings = replace(trainer.settings, minibatch_size=3)
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(LabError, match="^prompts: 5 cannot be shared evenly by 2 processes$"):
        trainer.collect(prompts(5))
    with pytest.raises(LabError, match="^minibatch_size: 3 cannot be shared evenly by 2 processes"):
        trainer.update(rollout, lambda rows: {"policy/approx_kl": 0.0})


@pytest.mark.parametrize(("named", "part"), [("policy_parameters", "the adapter"), ("frozen_parameters", "the frozen")])
def test_weights_that_differ_between_processes_stop_the_first_step(tiny_causal, monkeypatch, named, part):
    trainer = ppo(tiny_causal)
    other = []
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "objects", lambda mine: other.append(mine) or [mine, other[0]])
    require_same_weights(trainer.roles)
    with torch.no_grad():
        next(iter(getattr(trainer.roles, named)().values())).view(-1)[0] += 1
    with pytest.raises(LabError, match=f"^{part}.* of process 1 is not that of process 0 before any update"):
        require_same_weights(trainer.roles)
