"""A policy that is read merged: what learns, is sampled and is taken back, on a CPU that stands for a GPU."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from test_split import IDS, MASK, roles_of
from torch import nn

from peftlab.errors import LabError
from peftlab.models.adapters import activate
from peftlab.models.backbone import causal_logits
from peftlab.models.packed import packed_of
from peftlab.models.roles import Roles
from peftlab.ops.logprobs import token_logprobs
from peftlab.rl.control import FixedKL
from peftlab.rl.ppo import PPOSettings, PPOTrainer
from peftlab.rl.rollout import PromptBatch
from peftlab.sampling.fused import fused_step
from peftlab.sampling.graphed import GraphedDecoder
from peftlab.sampling.sampler import Decoding, Sampler

pytestmark = pytest.mark.usefixtures("one_thread", "split")
PROMPTS = PromptBatch([[3, 4, 5], [6], [7, 8], [9]], list("abcd"), [None] * 4)


def moved(roles: Roles) -> Roles:
    """The same with another adapter."""
    for parameter in roles.policy_parameters().values():
        nn.init.normal_(parameter, std=0.3)
    roles.moved()
    return roles


def told(roles: Roles) -> torch.Tensor:
    """Log-probabilities by a pass of the policy."""
    with torch.no_grad():
        return roles.policy_tokens(IDS, MASK, 3)[0]


def beside(roles: Roles) -> torch.Tensor:
    """The same as PEFT makes them, of base and adapter."""
    activate(roles.model, "policy")
    with torch.no_grad():
        return token_logprobs(causal_logits(roles.model, IDS, MASK, 3), IDS[:, -3:]) * MASK[:, -3:]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_it_follows_its_adapter(tiny_causal, architecture):
    roles = roles_of(tiny_causal, architecture, merged=True)
    before = told(roles)
    assert torch.equal(before, roles.reference_logprobs(IDS, MASK, 3))
    after = told(moved(roles))
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(after, beside(roles), atol=1e-3, rtol=0)


def test_a_decode_of_the_reference_between_leaves_the_policy_its_weights(tiny_causal):
    roles = moved(roles_of(tiny_causal, "gpt2", merged=True))
    policy = told(roles)
    roles.refresh(None)
    decoder, prompt = GraphedDecoder(fused_step(roles.twin)), torch.tensor([[3, 4]])
    ((_, logprobs),) = list(decoder.decode(prompt, prompt > 0, [1], None, Decoding(1, 0.0)))
    reference = roles.reference(torch.tensor([[3, 4, 0]]), torch.ones(1, 3, dtype=torch.bool), 1).log_softmax(-1)
    torch.testing.assert_close(logprobs, reference.max(-1).values[0], atol=1e-3, rtol=0)
    assert torch.equal(told(roles), policy)


def learner(roles: Roles) -> PPOTrainer:
    settings = PPOSettings(lr=0.05, minibatch_size=2, epochs=2, warmup_steps=0, epoch_kl_stop=99.0, ratio_limit=1.0)
    reward = lambda prompts, completions, records: (torch.arange(len(completions)).float(), {})  # noqa: E731
    return PPOTrainer(roles, Sampler(roles.twin, roles.tokenizer), reward, FixedKL(0.1), settings, Decoding(8))


def ratio_error(trainer: PPOTrainer) -> float:
    """By how much the next rollout's sampling and the policy's passes disagree."""
    rollout = trainer.collect(PROMPTS)
    with torch.no_grad():
        again = trainer.roles.policy_tokens(rollout.ids, rollout.mask, rollout.completion_ids.shape[1])[0]
    return float((torch.expm1(again - rollout.logprobs).abs() * rollout.completion_mask).max())


def test_training_moves_it_and_the_sampler_alike(tiny_causal):
    trainer = learner(roles_of(tiny_causal, "gpt2", merged=True))
    before = told(trainer.roles)
    seen: list[torch.Tensor] = []
    backward = trainer.backward
    trainer.backward = lambda *given: (seen.append(told(trainer.roles)), backward(*given))[1]
    trainer.step(PROMPTS)
    assert len(seen) == 4 and all(not torch.equal(one, other) for one, other in zip(seen, seen[1:], strict=False))
    torch.testing.assert_close(told(trainer.roles), beside(trainer.roles), atol=1e-3, rtol=0)
    assert not torch.allclose(told(trainer.roles), before, atol=1e-2)
    assert ratio_error(trainer) < 1e-3


def test_an_update_that_fails_is_taken_back_from_the_sampler_too(tiny_causal):
    trainer = learner(roles_of(tiny_causal, "gpt2", merged=True))
    trainer.step(PROMPTS)
    before, apply, calls = told(trainer.roles), trainer.apply, []

    def failing(stats: dict[str, torch.Tensor]) -> dict[str, float]:
        calls.append(1)
        return apply(stats | ({"value/loss": torch.tensor(torch.nan)} if len(calls) == 4 else {}))

    trainer.apply = failing
    with pytest.raises(LabError, match="the weights are those before the step"):
        trainer.step(PROMPTS)
    trainer.apply = apply
    assert len(calls) == 4 and torch.equal(told(trainer.roles), before)
    assert ratio_error(trainer) < 1e-3


def test_roles_are_gone_with_their_last_name(tiny_causal):
    """Without a cycle that waits for a collection: an evaluation opens run after run."""
    roles = roles_of(tiny_causal, "gpt2", merged=True)
    told(roles)
    gc.collect()
    gc.disable()
    try:
        twin = weakref.ref(roles.twin)
        del roles
        assert twin() is None
    finally:
        gc.enable()


def test_packed_weights_are_made_again_where_they_moved(tiny_causal):
    model, _ = tiny_causal("llama")
    first = packed_of(model)
    assert packed_of(model) is first
    model.model.layers[0].mlp.down_proj.weight.data = model.model.layers[0].mlp.down_proj.weight.data.clone() * 2
    second = packed_of(model)
    assert second is not first
    torch.testing.assert_close(second.weights[3], first.weights[3] * 2)
