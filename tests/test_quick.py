"""What is done in fewer passes gives the numbers and gradients of the plain way, or is left to that."""

from __future__ import annotations

import platform

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import Linear
from torch import nn
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peftlab.models.adapters import Lora, LoraVariants, activate, adapter_parameters, attach
from peftlab.models.backbone import Backbone, causal_logits, unembedding
from peftlab.models.freed_memory import keep_freed_memory
from peftlab.models.quick_layers import quicken_layers
from peftlab.models.quick_lora import QuickLora, _LowRank
from peftlab.models.roles import Roles
from peftlab.ops import logprobs as logprobs_module
from peftlab.ops.logprobs import entropy, state_logprobs, token_logprobs
from peftlab.rl.rollout import passes
from peftlab.sampling import engine as engine_module
from peftlab.sampling.engine import CachedDecoder, PlainDecoder
from peftlab.sampling.sampler import Decoding, Sampler, Samples

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[0, 0, 5, 6, 7, 8, 1], [3, 4, 5, 9, 10, 11, 12]])
MASK = torch.tensor([[False, False, True, True, True, True, False], [True] * 7])


def adapted(causal, architecture: str, lora: Lora | None = None):
    """A model with an adapter that acts, and alone learns."""
    model = attach(causal(architecture)[0], lora or Lora(r=3, alpha=8), "policy").requires_grad_(False)
    for parameter in adapter_parameters(model, "policy").values():
        nn.init.normal_(parameter, std=0.3).requires_grad_(True)
    return model


def passed(model) -> list[torch.Tensor]:
    """Logits, and the gradient of a sum of them in all that learns."""
    model.zero_grad()
    logits = causal_logits(model, IDS, MASK, 3)
    logits.log_softmax(-1)[..., 5].sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_quick_lora_is_pefts_lora(tiny_causal, monkeypatch, architecture):
    model = adapted(tiny_causal, architecture).double()
    assert {type(m) for m in model.modules() if isinstance(m, Linear)} == {QuickLora}
    ours = passed(model)
    monkeypatch.setattr(_LowRank, "apply", None)
    monkeypatch.setattr(QuickLora, "forward", Linear.forward)
    theirs = passed(model)
    assert len(ours) == len(theirs) > 8
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_quick_lora_leaves_the_rest_to_peft(tiny_causal, monkeypatch):
    def several(model):
        attach(model, Lora(r=2), "other")
        activate(model, "policy", "other")

    odd = {
        "dora": (LoraVariants(r=3, dora=True), lambda model: None),
        "dropout": (Lora(r=3, dropout=0.5), lambda model: model.train()),
        "several": (Lora(r=3), several),
        "off": (Lora(r=3), activate),
        "a base that learns": (Lora(r=3), lambda model: model.requires_grad_(True)),
        "half": (Lora(r=3), lambda model: [p.data.mul_(1) for p in model.to(torch.float64).parameters()]
                 and [m.base_layer.float() for m in model.modules() if isinstance(m, Linear)]),
    }
    monkeypatch.setattr(_LowRank, "apply", lambda *_: pytest.fail("took what is peft's"))
    for what, (lora, change) in odd.items():
        model = adapted(tiny_causal, "gpt2", lora)
        change(model)
        if what != "half":
            causal_logits(model, IDS, MASK, 3)
        else:
            layer = next(m for m in model.modules() if isinstance(m, Linear))
            layer(torch.zeros(2, layer.in_features))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_under_autocast_quick_lora_rounds_no_more_than_peft(tiny_causal, architecture):
    model = adapted(tiny_causal, architecture)
    learned = list(adapter_parameters(model, "policy").values())
    for parameter in learned:
        nn.init.normal_(parameter, std=0.2)
        parameter.requires_grad_(True)

    def gradients(rounded: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            logits = causal_logits(model, IDS, MASK, 3).float()
        made = torch.autograd.grad(logits.log_softmax(-1)[..., 5].sum(), learned)
        assert all(gradient.dtype == torch.float32 for gradient in made)
        return torch.cat([gradient.flatten() for gradient in made])

    exact, ours = gradients(False), gradients(True)
    for module in model.modules():
        if isinstance(module, QuickLora):
            module.__class__ = Linear
    theirs = gradients(True)
    assert 0 < (ours - exact).norm() < 1.25 * (theirs - exact).norm()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_under_autocast_a_fresh_policy_is_its_reference(tiny_causal, architecture):
    model = adapted(tiny_causal, architecture)
    for name, parameter in adapter_parameters(model, "policy").items():
        nn.init.normal_(parameter, std=0.0 if "lora_B" in name else 0.2)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        policy = causal_logits(model, IDS, MASK, 3)
        activate(model)
        assert torch.equal(causal_logits(model, IDS, MASK, 3), policy)


def test_a_frozen_weight_is_rounded_once_until_it_changes(tiny_causal):
    model = adapted(tiny_causal, "llama")
    layer = next(module for module in model.modules() if isinstance(module, QuickLora))
    with torch.no_grad():
        first = layer.weight_in(torch.bfloat16)
        assert layer.weight_in(torch.bfloat16) is first
        layer.base_layer.weight.mul_(2)
        assert torch.equal(layer.weight_in(torch.bfloat16), first * 2)
        assert layer.weight_in(torch.float32).data_ptr() == layer.base_layer.weight.data_ptr()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_quick_layers_change_last_bits_alone(tiny_causal, architecture):
    model, _ = tiny_causal(architecture)
    plain = type(model)(model.config).eval()
    plain.load_state_dict(model.state_dict())
    slow = [m for m in plain.modules() if isinstance(m, NewGELUActivation | LlamaRMSNorm)]
    assert slow and not {type(module) for module in slow} & {type(module) for module in model.modules()}
    before = causal_logits(plain, IDS, MASK, 3)
    torch.testing.assert_close(causal_logits(model, IDS, MASK, 3), before, atol=1e-4, rtol=1e-4)
    theirs = causal_logits(quicken_layers(plain.requires_grad_(False)), IDS, MASK, 3)
    assert torch.equal(causal_logits(model, IDS, MASK, 3), theirs)


@given(st.integers(0, 7), st.integers(2, 40), st.sampled_from([1.0, 0.3, 2.0]), st.integers(1, 100), st.integers(0, 99))
def test_log_probabilities_from_states_are_those_of_the_logits(rows, words, temperature, block, seed):
    torch.manual_seed(seed)
    states, head = torch.randn(rows, 5, requires_grad=True), torch.randn(words, 5)
    tokens, weights = torch.randint(words, (rows,)), torch.randn(rows)
    logits = (states @ head.t())[None]
    plain = token_logprobs(logits, tokens[None], temperature)[0], entropy(logits, temperature)[0]
    (expected,) = torch.autograd.grad((plain[0] * weights).sum(), states)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs_module, "BLOCK", {"cpu": block})
        ours = state_logprobs(states, head, tokens, temperature)
        (gradient,) = torch.autograd.grad((ours[0] * weights).sum(), states)
    assert not ours[1].requires_grad
    for one, other in zip((*ours, gradient), (*plain, expected), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_rounded_gradients_leave_every_number_but_the_gradients(tiny_causal, architecture):
    found = []
    for gradients in (torch.float32, torch.bfloat16):
        model, tokenizer = tiny_causal(architecture)
        torch.manual_seed(0)
        roles = Roles(Backbone("tiny", model, tokenizer, ""), Lora(r=3, alpha=8))
        for parameter in (roles.policy_parameters() | roles.critic_parameters()).values():
            nn.init.normal_(parameter, std=0.3)
        roles.quicken(merged=True, gradients=gradients)
        read = roles.policy_tokens(IDS, MASK, 3, 0.7)
        learned = list((roles.policy_parameters() | roles.critic_parameters()).values())
        made = torch.autograd.grad(read[0].sum() + read[2].square().sum(), learned)
        found.append((read, roles.reference_logprobs(IDS, MASK, 3), torch.cat([part.flatten() for part in made])))
    (read, reference, exact), (same, as_well, rounded) = found
    assert all(map(torch.equal, read, same)) and torch.equal(reference, as_well)
    assert not torch.equal(exact, rounded), "they went another way"
    assert (exact - rounded).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_tokens_are_read_the_same_with_and_without_logits(tiny_causal, architecture):
    model, tokenizer = tiny_causal(architecture)
    roles = Roles(Backbone("tiny", model, tokenizer, ""), Lora(r=3, alpha=8))
    for parameter in (roles.policy_parameters() | roles.critic_parameters()).values():
        nn.init.normal_(parameter, std=0.3)
    seen, counted = [], MASK[:, -3:]
    assert roles.unembedding is model.get_output_embeddings().weight
    for head in (roles.unembedding, None):
        roles.unembedding = head
        logprobs, entropies, values = roles.policy_tokens(IDS, MASK, 3, 0.7)
        learned = [*roles.policy_parameters().values(), *roles.critic_parameters().values()]
        gradients = torch.autograd.grad((logprobs * counted).sum() + (values * counted).square().sum(), learned)
        reference = roles.reference_logprobs(IDS, MASK, 3, 0.7)
        assert (logprobs[~counted] == 0).all() and (entropies[~counted] == 0).all() and (reference[~counted] == 0).all()
        seen.append([logprobs, entropies, values, reference, *gradients])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    plain = token_logprobs(roles.policy(IDS, MASK, 3), IDS[:, -3:], 0.7)
    torch.testing.assert_close(seen[0][0][counted], plain[counted], atol=1e-5, rtol=1e-5)


def drained(sampler: Sampler, decoder: type, monkeypatch, read=None) -> tuple[Samples, int]:
    """Samples of many rows, most of which end early, and how often the decoder lost some of them."""
    sampler.eos_id = None
    sampler.eos_id = int(sampler.sample([[3]], [0], Decoding(60)).completion_ids.mode().values)
    kept, keep = [], decoder.keep
    monkeypatch.setattr(decoder, "keep", lambda self, rows: kept.append(keep(self, rows)))
    return sampler.sample([[3, 4 + i % 5, 7][: 1 + i % 3] for i in range(24)], range(24), Decoding(40), read), len(kept)


@pytest.mark.parametrize("decoder", [CachedDecoder, PlainDecoder])
def test_rows_that_ended_leave_and_the_others_do_not_notice(tiny_causal, monkeypatch, decoder):
    model, tokenizer = tiny_causal("gpt2")
    sampler = Sampler(model, tokenizer)
    if decoder is PlainDecoder:
        monkeypatch.setattr(engine_module, "known_step", lambda model: None)
    samples, left = drained(sampler, decoder, monkeypatch)
    width, counted = samples.completion_ids.shape[1], samples.completion_mask
    assert left > 1 and 2 < int(counted.sum(1).float().median()) < width
    again = token_logprobs(causal_logits(model, samples.ids, samples.mask, width), samples.completion_ids) * counted
    torch.testing.assert_close(samples.logprobs, again, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_values_read_while_sampling_are_those_of_a_pass(tiny_causal, monkeypatch, architecture):
    model, tokenizer = tiny_causal(architecture)
    roles = Roles(Backbone("tiny", model, tokenizer, ""), Lora(r=3, alpha=8))
    for parameter in (roles.policy_parameters() | roles.critic_parameters()).values():
        nn.init.normal_(parameter, std=0.2)
    roles.refresh()
    sampler = Sampler(roles.twin, tokenizer)
    samples, _ = drained(sampler, CachedDecoder, monkeypatch, roles.shared_head)
    values = roles.values(samples.ids, samples.mask, samples.completion_ids.shape[1]) * samples.completion_mask
    assert values.abs().max() > 0.1
    torch.testing.assert_close(samples.readings, values.detach(), atol=1e-4, rtol=1e-4)


def test_only_a_plain_product_makes_logits_of_states(tiny_causal):
    model, _ = tiny_causal("gpt2")
    assert unembedding(model) is model.lm_head.weight
    hook = model.lm_head.register_forward_hook(lambda module, given, made: 2 * made)
    assert unembedding(model) is not None  # of the head itself: both sides of the comparison
    hook.remove()
    model.register_forward_hook(lambda module, given, made: made.__class__(logits=torch.tanh(made.logits)))
    assert unembedding(model) is None
    biased, _ = tiny_causal("gpt2")
    biased.lm_head.bias = nn.Parameter(torch.ones(biased.config.vocab_size))
    assert unembedding(biased) is None


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_passes_take_every_row_once_and_lose_padding_alone(rows, before, behind, seed):
    torch.manual_seed(seed)
    fronts, ends = torch.randint(1, before + 1, (rows,)), torch.randint(1, behind + 1, (rows,))
    prompt_mask = torch.arange(before) >= before - fronts[:, None]
    mask = torch.arange(behind) < ends[:, None]
    ids = torch.arange(1, rows * (before + behind) + 1).view(rows, -1)
    samples = Samples(ids[:, :before], prompt_mask, ids[:, before:], mask, torch.zeros(mask.shape), mask[:, -1])
    found: list[int] = []
    some = torch.randperm(rows)[: max(1, rows - 2)]
    for part in passes(samples, some, 2 * (before + behind)):
        own = part.rows
        assert len(own) <= 2
        assert part.ids.shape == part.mask.shape == (len(own), int(fronts[own].max() + ends[own].max()))
        assert part.keep == int(ends[own].max())
        assert part.ids[part.mask].tolist() == samples.ids[own][samples.mask[own]].tolist()
        assert torch.equal(torch.stack(part.counted), mask[own].nonzero().t())
        found += own.tolist()
    assert sorted(found) == sorted(some.tolist())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_glibc_takes_the_limits_of_what_it_keeps():
    assert keep_freed_memory()
