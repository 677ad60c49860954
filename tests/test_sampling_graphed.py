"""The steps that CUDA graphs capture, called one by one: the same code on a CPU, against transformers and `choose`."""

from __future__ import annotations

import pytest
import torch

from peftlab.models.adapters import Lora, attach
from peftlab.models.backbone import causal_logits, causal_logits_and_states
from peftlab.ops.logprobs import token_logprobs
from peftlab.ops.masks import completion_mask
from peftlab.ops.split import SplitHead, SplitRows
from peftlab.sampling import graphed
from peftlab.sampling.between import Fused
from peftlab.sampling.choice import BLOCK, Decoding, choose, choose_in_blocks, row_uniforms
from peftlab.sampling.fused import fused_step
from peftlab.sampling.graphed import GraphedDecoder
from peftlab.sampling.sampler import Sampler
from peftlab.sampling.slab import row_bucket, slot_bucket

PROMPTS = [[5, 6, 7, 8, 9], [11], [3, 4, 12]]
SEEDS = [1, 2, 3]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["gpt2", "llama"])
def sampler(request, tiny_causal):
    return Sampler(*tiny_causal(request.param))


@pytest.fixture
def decoder(sampler):
    return GraphedDecoder(fused_step(sampler.model))


@torch.no_grad()
def decode(decoder, sampler, decoding, prompts=PROMPTS, seeds=SEEDS, look_every=1):
    """(ids, mask) of prompts and completions, tokens and logprobs (B, C), of one decode."""
    ids, mask = sampler.pad(prompts)
    steps = list(decoder.decode(ids, mask, seeds, sampler.eos_id, decoding, look_every))
    tokens, logprobs = (torch.stack(part, 1) for part in zip(*steps, strict=True))
    return torch.cat([ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens).bool()], 1), tokens, logprobs


@pytest.mark.parametrize("steps", [12, 40])  # 40: over three buckets of slots
def test_logprobs_are_those_of_transformers_full_forward(sampler, decoder, steps):
    sampler.eos_id = None
    ids, mask, tokens, logprobs = decode(decoder, sampler, Decoding(steps))
    again = token_logprobs(causal_logits(sampler.model, ids, mask, steps), tokens)
    assert (again - logprobs).abs().max() < 2e-5


def test_greedy_equals_generate(sampler, decoder):
    ids, mask = sampler.pad(PROMPTS)
    theirs = sampler.model.generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    sampler.eos_id = None
    assert torch.equal(decode(decoder, sampler, Decoding(30, temperature=0.0))[0], theirs)


@pytest.mark.parametrize("decoding", [Decoding(20), Decoding(20, 0.7, 8), Decoding(20, 1.3, 0, 0.8)])
def test_samples_are_those_of_the_other_decoder(sampler, decoder, decoding):
    """The same uniforms through the same distribution: a seed says the same on both."""
    theirs = sampler.sample(PROMPTS, SEEDS, decoding)
    _, _, tokens, logprobs = decode(decoder, sampler, decoding)
    mask = completion_mask(tokens, sampler.eos_id)
    assert torch.equal(tokens.masked_fill(~mask, 0), theirs.completion_ids)
    assert (logprobs * mask - theirs.logprobs).abs().max() < 1e-5


def test_a_row_says_the_same_whatever_its_neighbours_and_what_was_decoded_before(sampler, decoder):
    sampler.eos_id = None
    together = decode(decoder, sampler, Decoding(10))[2]
    decode(decoder, sampler, Decoding(50), PROMPTS * 3, SEEDS * 3)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        assert torch.equal(decode(decoder, sampler, Decoding(10), [prompt], [seed])[2][0], together[row])


def test_nothing_of_another_decode_is_left(sampler, decoder):
    """Not even a NaN, which a weight of 0 in attention would not silence."""
    sampler.eos_id = None
    first = decode(decoder, sampler, Decoding(10))
    decoder.cache.fill_(torch.nan)
    for given, again in zip(first, decode(decoder, sampler, Decoding(10)), strict=True):
        assert torch.equal(given, again)


def test_kinds_of_steps_are_bounded_and_come_again(sampler, decoder, monkeypatch):
    """Rows, lengths and temperatures of one process have no end; what is remembered of them has."""
    monkeypatch.setattr(graphed, "KINDS", 5)
    sampler.eos_id = None
    jobs = [(Decoding(steps, heat), rows) for steps in (4, 44) for heat in (0.5, 0.7, 1.0) for rows in (1, 3)]
    told = []
    for decoding, rows in jobs * 2:
        told.append(decode(decoder, sampler, decoding, PROMPTS[:rows], SEEDS[:rows])[2])
        assert len(decoder.graphs) < 5 + 3 and len(decoder.slabs) <= len(decoder.graphs)
    for first, again in zip(told[: len(jobs)], told[len(jobs) :], strict=True):
        assert torch.equal(first, again)


def test_a_second_decoder_of_a_model_leaves_the_first_ones_weights_in_place(sampler, decoder):
    places = [parameter.data_ptr() for parameter in sampler.model.parameters()]
    second = GraphedDecoder(fused_step(sampler.model))
    assert places == [parameter.data_ptr() for parameter in sampler.model.parameters()]
    assert torch.equal(decode(second, sampler, Decoding(6))[2], decode(decoder, sampler, Decoding(6))[2])


@pytest.mark.parametrize("parts", [False, True])
def test_the_states_that_are_kept_are_those_that_tokens_were_chosen_from(sampler, monkeypatch, parts):
    """As they lie, and read off the high and low parts that a GPU's kernels leave."""
    sampler.eos_id = None
    decoder, width = GraphedDecoder(fused_step(sampler.model)), sampler.model.config.hidden_size
    if parts:
        products, norm = decoder.step.products, decoder.step.products.last.norm
        products.last = Fused(None, 0)
        monkeypatch.setattr(products.last, "norm", lambda *given: SplitRows().of(norm(*given)))
        products.packed.split_head = SplitHead(products.packed.head)
    ids, mask = sampler.pad(PROMPTS)
    steps = list(decoder.decode(ids, mask, SEEDS, None, Decoding(7), keep=True))
    tokens = torch.stack([tokens.clone() for tokens, _ in steps], 1)
    states = decoder.states(decoder.turn, 7, len(ids))
    assert states.shape == (7, len(ids), width) and states.dtype == torch.float32
    _, expected = causal_logits_and_states(
        sampler.model, torch.cat([ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens, dtype=torch.bool)], 1), 7
    )
    torch.testing.assert_close(states.transpose(0, 1), expected, atol=2e-4, rtol=1e-4)
    turn = decoder.turn
    without = torch.stack([tokens for tokens, _ in decoder.decode(ids, mask, SEEDS, None, Decoding(7))], 1)
    assert torch.equal(tokens, without)
    with pytest.raises(RuntimeError, match="another decode"):
        decoder.states(turn, 7, len(ids))


def test_weights_written_in_place_act(sampler, decoder):
    """Packed weights are still the model's own: what Roles.refresh writes is what is read."""
    sampler.eos_id = None
    before = decode(decoder, sampler, Decoding(10))[3]
    for name, parameter in sampler.model.named_parameters():
        if name.endswith(("k_proj.weight", "up_proj.weight", "c_attn.weight")):
            parameter.mul_(-0.5)
    ids, mask, tokens, logprobs = decode(decoder, sampler, Decoding(10))
    again = token_logprobs(causal_logits(sampler.model, ids, mask, 10), tokens)
    assert (again - logprobs).abs().max() < 1e-5
    assert (before - logprobs).abs().max() > 1e-2


def test_it_stops_when_it_sees_that_all_rows_have_ended(sampler, decoder):
    """Three rows, so that one fills up their bucket."""
    job = (Decoding(10), PROMPTS[:1] * 3, SEEDS[:1] * 3)
    first = decode(decoder, sampler, *job)[2][:1]
    sampler.eos_id = int(first[0, 2])
    length = int(completion_mask(first, sampler.eos_id).sum())
    assert decode(decoder, sampler, *job)[2].shape[1] == length
    assert decode(decoder, sampler, *job, look_every=4)[2].shape[1] == 4


def test_the_sampler_gives_the_same_through_either_decoder(sampler, monkeypatch):
    """Also the width, where rows end between two looks."""
    sampler.eos_id = int(sampler.sample(PROMPTS, SEEDS, Decoding(12)).completion_ids[2, 3])
    plain = [sampler.sample(PROMPTS[-n:], SEEDS[-n:], Decoding(12)) for n in (3, 1)]
    monkeypatch.setattr(Sampler, "device", torch.device("cuda"))
    decoder = sampler._graphs()
    monkeypatch.undo()
    monkeypatch.setattr(Sampler, "_graphs", lambda self: decoder)
    for n, theirs in zip((3, 1), plain, strict=True):
        ours = sampler.sample(PROMPTS[-n:], SEEDS[-n:], Decoding(12))
        assert torch.equal(ours.completion_ids, theirs.completion_ids) and torch.equal(ours.ended, theirs.ended)
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=0)
    assert plain[1].completion_ids.shape[1] <= 4


def test_a_model_with_an_adapter_has_no_graphs(sampler):
    assert fused_step(sampler.model) is not None
    attach(sampler.model, Lora(r=2), "policy")  # in place: the class of the model inside is the same
    assert fused_step(sampler.model) is None


def test_a_model_without_graphs_says_so_once(tiny_causal, monkeypatch, capsys):
    monkeypatch.setattr(Sampler, "device", torch.device("cuda"))
    model, tokenizer = tiny_causal("gpt2")
    model.config.activation_function = "relu"
    assert Sampler(model, tokenizer)._graphs() is None and Sampler(model, tokenizer)._graphs() is None
    assert capsys.readouterr().err.count("token by token") == 1


def test_one_decode_at_a_time(sampler, decoder):
    ids, mask = sampler.pad(PROMPTS)
    first = decoder.decode(ids, mask, SEEDS, None, Decoding(5))
    with torch.no_grad():
        next(first)
        next(decoder.decode(ids, mask, SEEDS, None, Decoding(5)))
        with pytest.raises(RuntimeError, match="another decode"):
            next(first)


def test_draws_in_blocks_follow_the_distribution():
    """Chi-squared of 100,000 draws over 300 tokens in three blocks; 299 degrees of freedom, p = .001 at 380."""
    logits = torch.full((3 * BLOCK,), -torch.inf)
    logits[:300] = torch.randn(300, generator=torch.Generator().manual_seed(0))
    uniforms = row_uniforms([0], 100_000)[0]
    tokens, logprobs = choose_in_blocks(logits.expand(100_000, -1), uniforms, Decoding())
    expected = logits.softmax(0)
    observed = torch.bincount(tokens, minlength=3 * BLOCK)
    assert observed[300:].sum() == 0
    assert float(((observed - 100_000 * expected)[:300].square() / (100_000 * expected[:300])).sum()) < 380
    torch.testing.assert_close(logprobs, expected.log()[tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoding", [Decoding(), Decoding(1, 0.0), Decoding(1, 0.5, 7), Decoding(1, 1.0, 0, 0.6)])
def test_blocks_choose_as_choose_does(decoding, dtype):
    logits = (3 * torch.randn(20_000, 2 * BLOCK, generator=torch.Generator().manual_seed(1))).to(dtype)
    uniforms = row_uniforms([1], 20_000)[0]
    ours, logprobs = choose_in_blocks(logits, uniforms, decoding)
    theirs, expected = choose(logits, uniforms, decoding)
    same = ours == theirs
    assert same.float().mean() > 0.9995  # a draw within rounding of a boundary may fall on either side
    torch.testing.assert_close(logprobs[same], expected[same], atol=1e-5, rtol=1e-5)


def test_blocks_never_draw_the_impossible():
    logits = torch.full((1000, 2 * BLOCK), -torch.inf)
    logits[:, 2], logits[:, 4], logits[:, BLOCK] = 0.0, 1.0, -100.0
    uniforms = torch.linspace(0, 1 - 2**-24, 1000)
    assert set(choose_in_blocks(logits, uniforms, Decoding())[0].tolist()) <= {2, 4, BLOCK}


def test_buckets_hold_what_they_are_for():
    for n in range(1, 1100):
        assert n <= row_bucket(n) < max(2 * n, n + 64) and n <= slot_bucket(n) <= max(n + 31, 1.25 * n)
    assert len({slot_bucket(n) for n in range(1, 1025)}) <= 20
