"""Float32 products in parts of bfloat16: how near they are, and that policy and reference stay one function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peftlab.models import packed
from peftlab.models.adapters import Lora, activate
from peftlab.models.backbone import Backbone
from peftlab.models.quick_lora import QuickLora, split_products
from peftlab.models.roles import Roles
from peftlab.ops.split import SplitRows, SplitWeight, in_tf32
from peftlab.rl.rollout import PromptBatch, collect_rollout, first_step
from peftlab.runs.metrics import first_ratio_limit
from peftlab.sampling.fused import fused_step
from peftlab.sampling.graphed import GraphedDecoder
from peftlab.sampling.sampler import Decoding, Sampler

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[0, 0, 5, 6, 7, 8, 1], [3, 4, 5, 9, 10, 11, 12]])
MASK = torch.tensor([[False, False, True, True, True, True, False], [True] * 7])


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 9), st.booleans(), st.sampled_from([1e-3, 1.0, 1e4]))
def test_a_split_product_is_nearer_than_16_bits_of_each_factor(rows, inputs, outputs, biased, scale):
    torch.manual_seed(rows + 10 * inputs + 400 * outputs)
    x, weight = torch.randn(rows, 1, inputs) * scale, torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if biased else None
    exact = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    made = SplitWeight(weight, bias)(x)
    assert made.shape == exact.shape and made.dtype == torch.float32
    sizes = x.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.abs())
    assert ((made - exact).abs() <= 2**-15 * sizes).all()


def test_rows_are_split_once_until_they_change():
    rows, x = SplitRows(remember=True), torch.randn(3, 4)
    first = rows.of(x)
    assert rows.of(x) is first and rows.of(x, bias=True).shape == (3, 20)
    assert rows.of(x.clone()) is not first
    kept = rows.of(x)
    x += 1
    assert rows.of(x) is not kept
    torch.testing.assert_close(rows.of(x)[:, :4].float() + rows.of(x)[:, 4:8].float(), x, atol=1e-4, rtol=2**-16)


def test_rows_of_inference_mode_are_split_each_time():
    rows, outside = SplitRows(remember=True), torch.randn(3, 4)
    kept = rows.of(outside)
    with torch.inference_mode():
        x = torch.randn(3, 4)
        first = rows.of(x).clone()
        x += 1
        assert not torch.equal(rows.of(x), first)
    assert torch.equal(rows.of(outside), kept)


def test_tf32_is_left_as_it_was_found():
    was = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(KeyError), in_tf32():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        raise KeyError
    assert torch.backends.cuda.matmul.fp32_precision == was


def roles_of(causal, architecture: str, critic: str = "shared", merged: bool = False) -> Roles:
    model, tokenizer = causal(architecture)
    roles = Roles(Backbone("tiny", model, tokenizer, ""), Lora(r=3, alpha=8), critic)
    roles.quicken(merged)
    assert (roles.merged is not None) == merged
    layers = [module for module in roles.model.modules() if isinstance(module, QuickLora)]
    assert layers and roles.quick_head is not None and all(layer.split is not None for layer in layers)
    return roles


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("critic", ["shared", "adapter", "none"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_invariants_of_a_first_step_hold_with_split_products(tiny_causal, split, architecture, critic, merged):
    roles = roles_of(tiny_causal, architecture, critic, merged)
    prompts = PromptBatch([[3, 4, 5], [6], [7, 8]], ["a", "b", "c"], [None] * 3)
    reward = lambda prompts, completions, records: (torch.zeros(len(completions)), {})  # noqa: E731
    sampler = Sampler(roles.twin, roles.tokenizer)
    rollout = collect_rollout(sampler, roles, reward, prompts, [1, 2, 3], Decoding(12), exact=True)
    first = first_step(roles, rollout, 1.0, first_ratio_limit(roles.precision))
    first.check()
    assert first.kl == 0.0 and 0 < first.ratio_error < first.ratio_limit == 1e-3
    assert float(rollout.exact_kl.sum()) == 0.0


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_split_products_change_neither_what_is_read_nor_what_is_learned(tiny_causal, split, architecture, merged):
    roles = roles_of(tiny_causal, architecture, merged=merged)
    for parameter in (roles.policy_parameters() | roles.critic_parameters()).values():
        nn.init.normal_(parameter, std=0.3)
    roles.moved()
    learned = [*roles.policy_parameters().values(), *roles.critic_parameters().values()]

    def read() -> list[torch.Tensor]:
        logprobs, entropies, values = roles.policy_tokens(IDS, MASK, 3, 0.7)
        gradients = torch.autograd.grad(logprobs.sum() + values.square().sum(), learned)
        return [logprobs, entropies, values, roles.reference_logprobs(IDS, MASK, 3, 0.7), *gradients]

    ours = read()
    roles.quick_head = roles.merged = None
    for module in roles.model.modules():
        if isinstance(module, QuickLora):
            module.split = None
    for one, other in zip(ours, read(), strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_decode_by_split_products_follows_the_weights(tiny_causal, monkeypatch, architecture):
    model, tokenizer = tiny_causal(architecture)
    prompts = torch.tensor([[0, 3, 4], [5, 6, 7]]), torch.tensor([[False, True, True], [True, True, True]])

    def decoded(step) -> torch.Tensor:
        steps = GraphedDecoder(step).decode(*prompts, [1, 2], None, Decoding(8))
        return torch.stack([logprobs.clone() for _, logprobs in steps])

    plain = fused_step(model)
    monkeypatch.setattr(packed, "_KNOWN", {})
    monkeypatch.setattr(packed, "splits_pay", lambda device: True)
    split = fused_step(model)
    parts = split.products.packed
    assert parts.split and not plain.products.packed.split
    weights = [*parts.split, parts.split_head]
    before = decoded(split)
    torch.testing.assert_close(before, decoded(plain), atol=5e-4, rtol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    torch.testing.assert_close(decoded(split), decoded(plain), atol=5e-4, rtol=0)
    assert not torch.allclose(decoded(split), before, atol=1e-3)
    assert all(weight.rows._last is None for weight in weights), "a decode keeps no layer's input"


def test_what_is_not_plain_float32_is_not_split(tiny_causal, split, monkeypatch):
    roles = roles_of(tiny_causal, "gpt2")
    monkeypatch.setattr(SplitWeight, "__call__", lambda *_: pytest.fail("was split"))
    roles.quick_head = None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for names in ((), ("policy",)):
            activate(roles.model, *names)
            roles.policy(IDS, MASK, 3)
    roles.model.double()
    roles.policy(IDS, MASK, 3)


def test_a_cpu_multiplies_float32(tiny_causal):
    roles = Roles(Backbone("tiny", *tiny_causal("gpt2"), ""), Lora(r=3))
    split_products(roles.model)
    assert roles.quick_head is None
    assert all(module.split is None for module in roles.model.modules() if isinstance(module, QuickLora))
