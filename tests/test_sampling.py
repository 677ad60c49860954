"""The sampler against transformers' own forward and generate, on tiny random models."""

from __future__ import annotations

import pytest
import torch

from peftlab.models.backbone import causal_logits
from peftlab.ops.logprobs import token_logprobs
from peftlab.sampling.choice import choose, row_uniforms, truncate
from peftlab.sampling.sampler import Decoding, Sampler

PROMPTS = [[5, 6, 7, 8, 9], [11], [3, 4, 12]]
SEEDS = [1, 2, 3]


@pytest.fixture(params=["gpt2", "llama"])
def sampler(request, tiny_causal):
    return Sampler(*tiny_causal(request.param))


def test_logprobs_while_sampling_are_those_of_a_full_forward(sampler):
    samples = sampler.sample(PROMPTS, SEEDS, Decoding(max_new_tokens=12))
    width = samples.completion_ids.shape[1]
    logits = causal_logits(sampler.model, samples.ids, samples.mask, width)
    again = token_logprobs(logits, samples.completion_ids) * samples.completion_mask
    assert (again - samples.logprobs).abs().max() < 1e-5


def test_a_row_says_the_same_whatever_its_neighbours(sampler):
    together = sampler.sample(PROMPTS, SEEDS, Decoding(max_new_tokens=10))
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = sampler.sample([prompt], [seed], Decoding(max_new_tokens=10))
        length = int(alone.completion_mask.sum())
        assert together.completion_ids[row, :length].tolist() == alone.completion_ids[0, :length].tolist()


def test_greedy_equals_generate(sampler):
    ids, mask = sampler.pad(PROMPTS)
    ours = sampler.sample(PROMPTS, SEEDS, Decoding(max_new_tokens=8, temperature=0.0))
    theirs = sampler.model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=sampler.pad_id,
        eos_token_id=sampler.eos_id,
    )[:, ids.shape[1] :]
    width = min(theirs.shape[1], ours.completion_ids.shape[1])
    assert torch.equal(theirs[:, :width], ours.completion_ids[:, :width])


def test_draws_follow_the_distribution():
    """Chi-squared of 40,000 draws against the exact probabilities, 9 degrees of freedom, p = .001 at 27.9."""
    logits = torch.linspace(-2, 1, 10).expand(40_000, 10)
    tokens, _ = choose(logits, row_uniforms([0], 40_000)[0], Decoding())
    expected = logits[0].softmax(0) * 40_000
    observed = torch.bincount(tokens, minlength=10)
    assert float(((observed - expected).square() / expected).sum()) < 27.9


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1000, 6), -torch.inf)
    logits[:, 2], logits[:, 4] = 0.0, 1.0
    uniforms = torch.linspace(0, 1 - 2**-24, 1000)
    assert set(choose(logits, uniforms, Decoding())[0].tolist()) == {2, 4}


def test_truncation_keeps_the_smallest_set_of_that_mass():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert torch.isfinite(truncate(logits, 0, 0.75)).tolist() == [[True, True, False, False]]
    assert torch.isfinite(truncate(logits, 3, 1.0)).tolist() == [[True, True, True, False]]
    assert torch.isfinite(truncate(logits, 0, 1e-9)).sum() == 1


def test_a_row_that_ended_is_padded_and_not_counted(sampler):
    sampler.eos_id = int(sampler.sample([PROMPTS[0]], [1], Decoding(max_new_tokens=3)).completion_ids[0, 1])
    samples = sampler.sample(PROMPTS, SEEDS, Decoding(max_new_tokens=10))
    length = int(samples.completion_mask[0].sum())
    assert length <= 2
    assert (samples.completion_ids[0, length:] == sampler.pad_id).all()
    assert (samples.logprobs[0, length:] == 0).all()


@pytest.mark.parametrize("dtype, near", [(torch.float32, 2e-5), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_cache_grows_under_a_long_completion(tiny_causal, architecture, dtype, near):
    model, tokenizer = tiny_causal(architecture)
    sampler = Sampler(model.to(dtype), tokenizer)
    sampler.eos_id = None
    samples = sampler.sample([[5, 6, 7, 8, 9], [11], [3, 4, 12]], [1, 2, 3], Decoding(50))
    again = token_logprobs(causal_logits(model, samples.ids, samples.mask, 50), samples.completion_ids)
    assert samples.ids.shape[1] > 32
    assert (again - samples.logprobs).abs().max() < near
