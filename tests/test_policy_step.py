"""A policy's step in passes of few tokens, its exact KL, and the intervals of prompts that repeat."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import test_ppo
import test_rloo
import torch
from torch.distributions import Categorical, kl_divergence

from peftlab.data.records import Prompt
from peftlab.evaluation.policy import Side, evaluate_side
from peftlab.rl.rollout import FirstStep
from peftlab.rl.trainer import PolicyTrainer
from peftlab.sampling.sampler import Decoding

pytestmark = pytest.mark.usefixtures("one_thread")


def moved(learner: PolicyTrainer) -> PolicyTrainer:
    """The same with a policy that has left its reference and ends its answers, and a critic that says something."""
    for name, parameter in learner.roles.policy_parameters().items():
        torch.nn.init.normal_(parameter, std=0.1 if "lora_B" in name else 0.3)
    if learner.roles.head is not None:
        torch.nn.init.normal_(learner.roles.head.linear.weight, std=0.3)
    learner.roles.refresh()
    learner.first = FirstStep(0.0, 0.0, 1.0)
    return learner


def gradient_of(learner: PolicyTrainer, tokens: int, patch: pytest.MonkeyPatch) -> tuple[torch.Tensor, dict, int]:
    """The first minibatch's gradient, its figures, and how many passes it took, at most `tokens` in each."""
    made, backward = [], PolicyTrainer.backward

    def counting(self, rollout, rows, loss_of, *held):
        passes = []
        figures = backward(self, rollout, rows, lambda part: (passes.append(len(part.rows)), loss_of(part))[1], *held)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        made.append((torch.cat([p.grad.flatten() for p in parameters]).double(), figures, len(passes)))
        return figures

    with patch.context() as patched:
        learner.settings = replace(learner.settings, pass_tokens=tokens)
        patched.setattr(PolicyTrainer, "backward", counting)
        rollout, _, _ = moved(learner).step(test_ppo.PROMPTS.take(range(12)))
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 2, "passes of different shares"
    return made[0]


FREE = {"max_grad_norm": 1e9, "reward": test_rloo.w_words}
UNITS = {
    "ppo": lambda causal: test_ppo.trainer(causal, minibatch_size=12, **FREE),
    "ppo-adapter": lambda causal: test_ppo.trainer(causal, critic="adapter", minibatch_size=12, **FREE),
    "rloo-fixed": lambda causal: test_rloo.trainer(causal, **FREE),
    "rloo-sequence": lambda causal: test_rloo.trainer(causal, length_normaliser="sequence", **FREE),
}


@pytest.mark.parametrize("unit", UNITS)
def test_the_gradient_of_passes_is_that_of_the_whole(tiny_causal, monkeypatch, unit):
    gradients = {}
    for tokens in (10**6, 30):
        torch.manual_seed(1)
        gradients[tokens] = gradient_of(UNITS[unit](tiny_causal), tokens, monkeypatch)
    (whole, figures, once), (parts, summed, passes) = gradients.values()
    assert once == 1 and passes > 3 and whole.norm() > 1e-3
    assert float((parts - whole).norm() / whole.norm()) < 1e-6
    assert summed.keys() == figures.keys()
    for name, value in figures.items():
        assert float(summed[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-7), name


# The exact KL


def warm(causal) -> PolicyTrainer:
    """A trainer that samples at another temperature than 1, and looks closely at every third step."""
    learner = moved(test_ppo.trainer(causal, record_every=3, epochs=1))
    learner.decoding = Decoding(max_new_tokens=8, temperature=0.7)
    return learner


@torch.no_grad()
def test_the_exact_kl_is_that_of_the_whole_vocabulary_in_steps_that_are_recorded(tiny_causal):
    learner = warm(tiny_causal)
    for step in range(1, 7):
        before = {name: weight.clone() for name, weight in learner.roles.state().items()}
        with torch.enable_grad():
            rollout, stats, _ = learner.step(test_ppo.PROMPTS)
        assert ("kl/exact" in stats) == (rollout.exact_kl is not None) == (step in (1, 3, 6))
        if rollout.exact_kl is None:
            continue
        after = {name: weight.clone() for name, weight in learner.roles.state().items()}
        learner.roles.load_state(before)
        keep = rollout.completion_ids.shape[1]
        policy, reference = (
            Categorical(logits=logits(rollout.ids, rollout.mask, keep).double() / 0.7)
            for logits in (learner.roles.policy, learner.roles.reference)
        )
        expected = kl_divergence(policy, reference) * rollout.completion_mask
        torch.testing.assert_close(rollout.exact_kl.double(), expected, atol=1e-5, rtol=1e-4)
        assert stats["kl/exact"] == pytest.approx(float(expected.sum(1).mean()), rel=1e-4)
        learner.roles.load_state(after)


def test_the_estimates_scatter_about_the_exact_kl(tiny_causal):
    """k1 and k3 summed over a completion have its mean, within four standard errors over 1,024 completions."""
    rollout = warm(tiny_causal).collect(test_ppo.PROMPTS.repeated(32))
    log_r = rollout.ref_logprobs - rollout.logprobs
    exact = rollout.exact_kl.sum(1)
    assert exact.mean() > 0.1
    for estimate in (-log_r, log_r.expm1() - log_r):
        error = (estimate * rollout.completion_mask).sum(1) - exact
        assert abs(error.mean()) < 4 * error.std() / len(error) ** 0.5


def test_an_interval_draws_the_rows_of_one_prompt_together():
    """Two prompts of three alike answers are two cases, not six: one, the other or both are drawn."""
    columns = {"nll": np.ones(6), "entropy": np.ones(6), "lengths": np.ones(6), "ended": np.ones(6)}
    kl = np.array([0.0, 0, 0, 1, 1, 1])
    two, six = (
        Side(["a"] * 6, kl=kl, measured={"eval/judge": kl}, clusters=of, **columns).intervals()
        for of in (np.array(list("pppqqq")), None)
    )
    assert two == {"eval/judge": (0.0, 1.0), "eval/kl": (0.0, 1.0)}
    assert 0 < six["eval/kl"][0] < six["eval/kl"][1] < 1


@pytest.mark.parametrize(("prompts", "clustered"), [("abcdef", False), ("aabbcc", True), ("aaaaaa", False)])
def test_prompts_that_repeat_are_clusters_where_there_are_several(tiny_causal, prompts, clustered):
    learner = test_rloo.trainer(tiny_causal)
    records = [Prompt(str(i), text) for i, text in enumerate(prompts)]
    token_ids, nothing = [[3, 4]] * 6, lambda prompts, completions, records: {}
    side = evaluate_side(learner.roles, None, token_ids, prompts, records, nothing, Decoding(4), seed=0)
    assert (side.clusters is not None) == clustered
    low, high = side.intervals()["eval/kl"]
    assert low == high == 0.0, "the reference itself"
