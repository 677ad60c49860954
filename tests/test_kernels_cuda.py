"""Our own kernels on a GPU: each makes what torch makes of the same, in parts of bfloat16 where states are float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peftlab.ops.kernels import fitting, kernels_of
from peftlab.ops.logprobs import state_logprobs
from peftlab.ops.masks import UNSEEN
from peftlab.ops.split import AlignedHead, SplitHead
from peftlab.sampling.between import Fused, Plain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = torch.device("cuda")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=[0, 8], ids=["bare", "ones"])
def fused(request, dtype) -> Fused:
    kernels = kernels_of(DEVICE, dtype)
    assert kernels is not None
    return Fused(kernels, request.param)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def require_rows(made: Tensor, fused: Fused, expected: Tensor) -> None:
    """`made` is the expected rows (N, D), in parts where they are float32, and columns of ones."""
    parts, width = fused.kernels.parts, expected.shape[1]
    assert made.dtype == torch.bfloat16 and made.shape == (len(expected), parts * width + fused.ones)
    assert (made[:, parts * width :] == 1).all()
    if parts == 1:
        torch.testing.assert_close(made[:, :width].float(), expected.float(), atol=1e-2, rtol=2e-2)
        return
    high, low, again = made[:, : 3 * width].unflatten(1, (3, width)).unbind(1)
    assert torch.equal(high, again)
    torch.testing.assert_close(high.float(), expected, atol=1e-6, rtol=2**-8)
    torch.testing.assert_close(high.float() + low.float(), expected, atol=1e-5, rtol=2**-15)


@pytest.mark.parametrize("rows, width", [(1, 4), (3, 36), (256, 576), (70, 3072)])
def test_columns_and_norms_are_torchs(fused, dtype, rows, width):
    plain, x = Plain(), drawn(rows, 2 * width, dtype=dtype) * 3
    require_rows(fused.gated(x), fused, plain.gated(x.float()).to(dtype))
    x = x[:, :width].contiguous()
    require_rows(fused.gelu(x), fused, plain.gelu(x.float()).to(dtype))
    layer, root = nn.LayerNorm(width).to(DEVICE, dtype), nn.RMSNorm(width).to(DEVICE, dtype)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    nn.init.normal_(root.weight)
    root.variance_epsilon = 1e-6
    for norm in (layer, root):
        require_rows(fused.norm(x, norm), fused, plain.norm(x, norm))


@pytest.mark.parametrize("shape", [(1, 4), (3, 7, 36), (70, 3072)])
def test_gates_and_their_gradients_are_torchs(dtype, shape):
    kernels = kernels_of(DEVICE, dtype)
    assert kernels is not None
    gate, up, slopes = (drawn(*shape, dtype=dtype, seed=seed) * 3 for seed in range(3))
    wide = [x.float().requires_grad_(True) for x in (gate, up)]
    expected = nn.functional.silu(wide[0]) * wide[1]
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2e-2}
    torch.testing.assert_close(kernels.gated(gate, up).float(), expected, **near)
    for ours, theirs in zip(
        kernels.gated_slopes(gate, up, slopes), torch.autograd.grad(expected, wide, slopes.float()), strict=True
    ):
        torch.testing.assert_close(ours.float(), theirs, **near)


@pytest.mark.parametrize("rows, width, words", [(1, 4, 1), (3, 36, 33), (70, 50264, 50257), (5, 1024, 1024)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_softmax_is_torchs(dtype, rows, width, words, temperature):
    kernels = kernels_of(DEVICE, dtype)
    assert kernels is not None
    logits, tokens = drawn(rows, width, dtype=dtype) * 4, torch.arange(rows, device=DEVICE) % words
    logits[0] -= 30.0  # a softmax asks for differences alone
    bare = torch.distributions.Categorical(logits=logits[:, :words].double() / temperature)
    expected = bare.log_prob(tokens).float(), bare.entropy().float()
    masses = (logits.double() / temperature - logits[:, :words].double().amax(-1, keepdim=True) / temperature).exp()
    masses[:, words:] = 0
    near = {"atol": 2e-5, "rtol": 1e-5}
    before = logits.clone()
    *found, totals = kernels.softmax(logits, tokens, temperature, words, False)
    assert torch.equal(logits, before)
    torch.testing.assert_close(tuple(found), expected, **near)
    torch.testing.assert_close(totals, masses.sum(-1).float(), **near)
    again = kernels.softmax(logits, tokens, temperature, words, True)
    assert all(map(torch.equal, again, (*found, totals)))
    near = near if dtype == torch.float32 else {"atol": 1e-3, "rtol": 2**-8}
    torch.testing.assert_close(logits.float(), masses.float(), **near)


def test_a_softmax_hides_no_number_that_is_not_finite(dtype):
    kernels, tokens = kernels_of(DEVICE, dtype), torch.zeros(3, dtype=torch.long, device=DEVICE)
    assert kernels is not None
    logits = drawn(3, 2048, dtype=dtype)
    logits[0, 1500], logits[1, 7] = torch.nan, torch.inf
    for found in kernels.softmax(logits, tokens, 1.0, 2048, True):
        assert found.isfinite().tolist() == [False, False, True]


def test_a_token_beyond_the_words_has_no_log_probability(dtype):
    kernels, tokens = kernels_of(DEVICE, dtype), torch.tensor([-1, 5, 6, 900], device=DEVICE)
    assert kernels is not None
    logprobs, *others = kernels.softmax(drawn(4, 8, dtype=dtype), tokens, 1.0, 6, False)
    assert logprobs.isfinite().tolist() == [False, True, False, False] and all(x.isfinite().all() for x in others)


def test_log_probabilities_and_their_gradients_are_those_of_the_logits(dtype):
    states, head = drawn(40, 64, dtype=dtype) / 8, drawn(1003, 64, dtype=dtype, seed=1)
    tokens = torch.arange(40, device=DEVICE)
    wide = [x.detach().float().requires_grad_(True) for x in (states, head)]
    expected = torch.log_softmax(wide[0] @ wide[1].t() / 1.3, -1)
    (slopes,) = torch.autograd.grad(expected[range(40), tokens].sum(), wide[0])
    near = {"atol": 2e-3, "rtol": 2e-3} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    for quick in [AlignedHead(head, dtype)] + [SplitHead(head)] * (dtype == torch.float32):
        learned = states.clone().requires_grad_(True)
        logprobs, entropies = state_logprobs(learned, head, tokens, 1.3, quick)
        torch.testing.assert_close(logprobs, expected[range(40), tokens].detach(), **near)
        torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(-1).detach(), **near)
        torch.testing.assert_close(torch.autograd.grad(logprobs.sum(), learned)[0].float(), slopes, **near)


def test_rows_that_stand_apart_are_split(fused, dtype):
    x = drawn(5, 52, dtype=dtype)[:, 8:44]
    assert fitting(x) and not any(fitting(other) for other in (x[:, 1:5], x[:, :7], x.t(), x[:, :4].reshape(4, 5)))
    require_rows(fused.rows(x), fused, x)
    for wrong in (torch.inf, -torch.inf, torch.nan):
        made = fused.rows(torch.full((1, 4), wrong, device=DEVICE, dtype=dtype))
        assert torch.equal(made[:, :4].float().isnan(), torch.full((1, 4), wrong != wrong, device=DEVICE))


@pytest.mark.parametrize(
    "heads, groups, width, rotary", [(12, 12, 64, False), (9, 3, 64, True), (2, 1, 12, True), (5, 1, 44, True)]
)
@pytest.mark.parametrize("slots, at", [(32, 0), (96, 40), (1024, 1023)])
def test_a_token_attends_to_the_slots_up_to_its_own(fused, dtype, heads, groups, width, rotary, slots, at):
    rows, plain = 6, Plain()
    x = drawn(rows, heads + 2 * groups, width, dtype=dtype)
    cache = drawn(2, rows, groups, slots, width, dtype=dtype, seed=1)
    cosine, sine = (drawn(rows, width, dtype=dtype, seed=seed) for seed in (2, 3))
    unseen = torch.full((rows, slots), UNSEEN, device=DEVICE, dtype=dtype)
    for row in range(rows):
        unseen[row, row % (at + 1) : at + 1] = 0
    slot, turned = torch.tensor([at], device=DEVICE), (cosine, sine) if rotary else None
    exact_cache = cache.float().clone()
    given = None if turned is None else (cosine.float(), sine.float())
    expected = plain.attend(x.float().clone(), given, exact_cache, unseen.float(), slot, slots)
    assert fused.seen(heads, cache, 32) == slots
    require_rows(fused.attend(x, turned, cache, unseen, slot, 32), fused, expected.to(dtype))
    torch.testing.assert_close(cache.float(), exact_cache, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=1e-2)


@pytest.mark.parametrize("slots, heads, width", [(8192, 9, 16), (64, 2, 18)])
def test_what_its_kernel_does_not_take_is_attended_to_by_torch(fused, dtype, slots, heads, width):
    x, cache = drawn(2, heads + 2, width, dtype=dtype), torch.zeros(2, 2, 1, slots, width, device=DEVICE, dtype=dtype)
    unseen = torch.full((2, slots), UNSEEN, device=DEVICE, dtype=dtype)
    unseen[:, 5] = 0
    made = fused.attend(x, None, cache, unseen, torch.tensor([5], device=DEVICE), 32)
    assert fused.seen(heads, cache, 32) == 32
    require_rows(made, fused, x[:, heads + 1 :].expand(2, heads, width).reshape(2, -1))
