"""CUDA graphs on a GPU: what is captured says what the same steps say one by one, and what transformers says."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peftlab.models.adapters import Lora
from peftlab.models.backbone import Backbone, causal_logits
from peftlab.models.roles import Roles
from peftlab.ops.logprobs import token_logprobs
from peftlab.sampling import graphed
from peftlab.sampling.choice import Decoding
from peftlab.sampling.graphed import GraphedDecoder
from peftlab.sampling.sampler import Sampler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PROMPTS = [[5 + i, 6, 7 + i][: 1 + i % 3] for i in range(48)]
SEEDS = list(range(48))


def backbone(kind: str, dtype: torch.dtype) -> Backbone:
    """GPT-2's 124M or SmolLM2's 135M architecture with random weights."""
    torch.manual_seed(0)
    ids = {"initializer_range": 0.05, "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
    heads = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192}
    with torch.device("cuda"):
        if kind == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(**ids))
        else:
            model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **ids, **heads, **sizes))
    return Backbone(kind, model.to(dtype).requires_grad_(False).eval(), tiny.tokenizer(), "")


@pytest.fixture(scope="module", params=["gpt2", "smollm2"])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def sampler(request, kind):
    base = backbone(kind, request.param)
    return Sampler(base.model, base.tokenizer)


@torch.no_grad()
def require_no_more_noise_than_transformers(model, samples):
    """Root mean square from the same weights in float32: at most that of transformers' own forward, and a half more.

    Both round, each elsewhere; a slot, position or weight that is wrong costs tens of times as much.
    """
    keep, counted = samples.completion_ids.shape[1], samples.completion_mask
    exact, theirs = (
        token_logprobs(causal_logits(m, samples.ids, samples.mask, keep), samples.completion_ids)
        for m in (copy.deepcopy(model).float(), model)
    )
    ours, theirs = (float((given - exact)[counted].square().mean().sqrt()) for given in (samples.logprobs, theirs))
    print(f"{type(model).__name__} {model.dtype}: from float32 {ours:.2e}, transformers {theirs:.2e}")
    assert ours < 1.5 * theirs + 1e-4


def test_a_graph_does_what_its_steps_do(sampler):
    for decoding in (Decoding(40, temperature=0.0), Decoding(40), Decoding(40, 0.8, 50, 0.9)):
        called = sampler.sample(PROMPTS, SEEDS, decoding)
        replayed = sampler.sample(PROMPTS, SEEDS, decoding)
        plain = Sampler(sampler.model, sampler.tokenizer)
        plain._graphed, plain._weights = GraphedDecoder(sampler._graphed.step, capture=False), sampler._weights
        again = plain.sample(PROMPTS, SEEDS, decoding)
        for graphed_samples in (called, replayed):
            assert torch.equal(graphed_samples.completion_ids, again.completion_ids), decoding
            assert (graphed_samples.logprobs - again.logprobs).abs().max() < 1e-5, decoding
    assert any(sampler._graphed.graphs.values()) and not any(plain._graphed.graphs.values())


def test_seeds_and_logprobs(sampler):
    first = sampler.sample(PROMPTS, SEEDS, Decoding(64))
    sampler.sample(PROMPTS[:5], SEEDS[:5], Decoding(20))
    second = sampler.sample(PROMPTS, SEEDS, Decoding(64))
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert torch.equal(first.logprobs, second.logprobs)
    require_no_more_noise_than_transformers(sampler.model, first)


def test_greedy_is_transformers_in_fp32(sampler):
    if sampler.model.dtype != torch.float32:
        pytest.skip("bfloat16 ties break either way")
    ids, mask = sampler.pad(PROMPTS)
    theirs = sampler.model.generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=1
    )[:, ids.shape[1] :]
    samples = sampler.sample(PROMPTS, SEEDS, Decoding(24, temperature=0.0))
    ours = samples.completion_ids
    apart = ours != theirs[:, : ours.shape[1]]
    with torch.no_grad():
        logits = causal_logits(sampler.model, samples.ids, samples.mask, ours.shape[1])
    for row in apart.any(1).nonzero()[:, 0].tolist():
        first = int(apart[row].nonzero()[0, 0])  # behind it the two go on from different texts
        ties = logits[row, first, torch.stack([ours[row, first], theirs[row, first]])]
        assert (ties[0] - ties[1]).abs() < 1e-3
    assert apart.any(1).sum() < len(PROMPTS) / 8


def test_values_read_while_sampling_are_those_of_a_pass(kind):
    roles = Roles(backbone(kind, torch.float32), Lora(r=8))
    for parameter in (roles.policy_parameters() | roles.critic_parameters()).values():
        torch.nn.init.normal_(parameter, std=0.05)
    roles.refresh()
    sampler = Sampler(roles.twin, roles.tokenizer)
    for _ in range(3):  # called, captured, replayed
        samples = sampler.sample(PROMPTS, SEEDS, Decoding(32), roles.shared_head)
        with torch.no_grad():
            values = roles.values(samples.ids, samples.mask, samples.completion_ids.shape[1])
        sampler.sample(PROMPTS, SEEDS, Decoding(32))  # without them: steps of another kind
        assert values.std() > 0.1
        torch.testing.assert_close(samples.readings, values * samples.completion_mask, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_refreshed_weights_act_in_captured_graphs(kind, dtype):
    roles = Roles(backbone(kind, dtype), Lora(r=8), critic="none")
    sampler = Sampler(roles.twin, roles.tokenizer)
    before = [sampler.sample(PROMPTS, SEEDS, Decoding(32)) for _ in range(2)][1]
    graphs = dict(sampler._graphed.graphs)
    assert all(graphs.values())
    with torch.no_grad():
        for name, parameter in roles.policy_parameters().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    roles.refresh()
    after = sampler.sample(PROMPTS, SEEDS, Decoding(32))
    assert sampler._graphed.graphs == graphs, "the same graphs, not captured again"
    assert not torch.equal(before.completion_ids, after.completion_ids)
    require_no_more_noise_than_transformers(roles.twin, after)
    keep, counted = after.completion_ids.shape[1], after.completion_mask
    with torch.no_grad():
        policy, reference = (
            (token_logprobs(role(after.ids, after.mask, keep), after.completion_ids) - after.logprobs)[counted].abs()
            for role in (roles.policy, roles.reference)
        )
    assert policy.mean() < 0.2 * reference.mean()
    assert torch.equal(after.completion_ids, sampler.sample(PROMPTS, SEEDS, Decoding(32)).completion_ids)


def test_forgotten_graphs_are_captured_again(monkeypatch):
    """Growing forgets all graphs, and so does their number; each time the allocator lets go of their pool."""
    base = backbone("gpt2", torch.float32)
    sampler = Sampler(base.model, base.tokenizer)
    jobs = [(6, Decoding(20)), (48, Decoding(70)), (6, Decoding(20, 0.7)), (20, Decoding(90, 0.0))]
    monkeypatch.setattr(graphed, "KINDS", 4)
    told, held = [], []
    for count, decoding in [job for job in jobs for _ in range(2)] * 3:
        told.append(sampler.sample(PROMPTS[:count], SEEDS[:count], decoding).completion_ids)
        held.append(torch.cuda.memory_allocated())
    once = 2 * len(jobs)
    for first, second, third in zip(told[:once], told[once : 2 * once], told[2 * once :], strict=True):
        assert torch.equal(first, second) and torch.equal(second, third)
    told.clear()
    assert held[-1] < held[2 * once - 1] + 2**20, "memory grows with each capture"


def test_moved_weights_are_seen(kind):
    base = backbone(kind, torch.bfloat16)
    sampler = Sampler(base.model, base.tokenizer)
    first = sampler.sample(PROMPTS, SEEDS, Decoding(8))
    decoder = sampler._graphed
    for parameter in base.model.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(sampler.sample(PROMPTS, SEEDS, Decoding(8)).completion_ids, first.completion_ids)
    assert sampler._graphed is not decoder


def test_a_stream_stops_at_the_end(sampler):
    ids, mask = sampler.pad(PROMPTS[:1])
    sampler.eos_id = eos_id = int(sampler.sample(PROMPTS[:1], [0], Decoding(6)).completion_ids[0, 2])
    tokens = [int(token) for token, _ in sampler.decode(ids, mask, [0], Decoding(20))]
    sampler.eos_id = 1
    assert len(tokens) <= 3
    assert tokens[-1] == eos_id
