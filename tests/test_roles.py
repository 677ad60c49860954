"""One base, several roles: the invariants that make the figures of RL mean something."""

from __future__ import annotations

import pytest
import torch

from peftlab.models.adapters import Lora
from peftlab.models.backbone import Backbone, causal_logits, fingerprint
from peftlab.models.roles import POLICY, Roles
from peftlab.ops.kl import exact_kl
from peftlab.ops.logprobs import token_logprobs
from peftlab.ops.masks import masked_sum

IDS = torch.tensor([[0, 0, 5, 6, 7, 8], [3, 4, 5, 9, 10, 11]])
MASK = torch.tensor([[False, False, True, True, True, True], [True] * 6])


@pytest.fixture(params=["gpt2", "llama"])
def roles(request, tiny_causal):
    model, tokenizer = tiny_causal(request.param)
    return Roles(Backbone("tiny", model, tokenizer, fingerprint(model)), Lora(r=4, alpha=8), critic="adapter")


def jolt(roles: Roles) -> None:
    """Move every adapter away from its no-op start."""
    with torch.no_grad():
        for name, parameter in (roles.policy_parameters() | roles.critic_parameters()).items():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_a_fresh_policy_is_its_reference_bit_for_bit(roles):
    policy, reference = roles.policy(IDS, MASK, 3), roles.reference(IDS, MASK, 3)
    assert torch.equal(policy, reference)
    assert (exact_kl(policy, reference) == 0.0).all()


@pytest.mark.parametrize("targets", [["c_attn"], ["c_fc"], ["c_attn", "c_proj", "c_fc"]])
def test_a_fresh_policy_is_its_reference_with_gradients_asked_for_or_not(tiny_causal, targets):
    model, tokenizer = tiny_causal("gpt2")
    roles = Roles(Backbone("tiny", model, tokenizer, ""), Lora(r=4, alpha=8, targets=targets))
    with torch.no_grad():
        without = roles.policy(IDS, MASK, 3)
    assert torch.equal(roles.policy(IDS, MASK, 3), without) and torch.equal(roles.reference(IDS, MASK, 3), without)
    logprobs, _, _ = roles.policy_tokens(IDS, MASK, 3)
    assert logprobs.requires_grad and torch.equal(logprobs, roles.reference_logprobs(IDS, MASK, 3))


def test_roles_do_not_leak_into_each_other(roles):
    reference, values = roles.reference(IDS, MASK, 3), roles.values(IDS, MASK, 3)
    assert (values == 0).all()
    jolt(roles)
    assert torch.equal(roles.reference(IDS, MASK, 3), reference)
    policy = roles.policy(IDS, MASK, 3)
    assert not torch.equal(policy, reference)
    roles.values(IDS, MASK, 3)
    assert torch.equal(roles.policy(IDS, MASK, 3), policy)


def test_the_samplers_copy_is_the_policy_after_refresh(roles):
    jolt(roles)
    roles.refresh()
    copied, policy = causal_logits(roles.twin, IDS, MASK, 3), roles.policy(IDS, MASK, 3)
    assert (copied - policy).abs()[MASK[:, -3:]].max() < 1e-4
    roles.refresh(None)
    assert torch.equal(causal_logits(roles.twin, IDS, MASK, 3), roles.reference(IDS, MASK, 3))


def test_embeddings_are_shared_and_linear_weights_are_not(roles):
    base = roles.model.get_base_model()
    assert roles.twin.get_input_embeddings().weight.data_ptr() == base.get_input_embeddings().weight.data_ptr()
    owned = roles.bytes_per_role()["sampler"]
    assert 0 < owned < roles.bytes_per_role()["base"]


def test_training_moves_adapters_and_nothing_else(roles):
    before = roles.frozen_hash()
    optimizer = torch.optim.AdamW(
        [*roles.policy_parameters().values(), *roles.critic_parameters().values()], lr=0.01, weight_decay=0.1
    )
    for _ in range(3):
        logprobs, _, values = roles.policy_tokens(IDS, MASK, 3)
        loss = -logprobs.mean() + (values - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in roles.policy_parameters().values())
        optimizer.step()
    assert roles.frozen_hash() == before
    assert not torch.equal(roles.policy(IDS, MASK, 3), roles.reference(IDS, MASK, 3))


def test_left_padding_changes_no_logprob(roles):
    jolt(roles)
    padded = token_logprobs(roles.policy(IDS[:1], MASK[:1], 3), IDS[:1, -3:])
    alone = token_logprobs(roles.policy(IDS[:1, 2:], MASK[:1, 2:], 3), IDS[:1, -3:])
    assert masked_sum((padded - alone).abs(), torch.ones(1, 3)).item() < 1e-4


def test_state_round_trip(roles, tiny_causal):
    jolt(roles)
    state = {name: value.clone() for name, value in roles.state().items()}
    expected = roles.policy(IDS, MASK, 3)
    with torch.no_grad():
        for parameter in roles.policy_parameters().values():
            parameter.zero_()
    roles.load_state(state)
    assert torch.equal(roles.policy(IDS, MASK, 3), expected)
    assert POLICY in roles.model.peft_config
