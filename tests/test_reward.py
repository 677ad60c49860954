"""Reward models: the loss, scores under padding, ensembles on one base, folders that load or are refused by name."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from peftlab.errors import UserError
from peftlab.models.adapter_files import load_stack, save_adapter
from peftlab.models.adapters import Lora, adapter_parameters, attach
from peftlab.models.backbone import load_backbone
from peftlab.models.heads import ScalarHead, reward_head
from peftlab.models.reward_model import RewardModel, RewardNet
from peftlab.models.reward_scale import Scale
from peftlab.models.stacks import Stack, stack_over
from peftlab.ops.losses import bradley_terry_loss
from peftlab.rewards.learned import learned
from peftlab.rewards.parts import Reward, RewardPart
from peftlab.runs.checkpoint import write_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["the film", "a movie was bad and not very", "it", "i"]
ANSWERS = [" is good", " great plot and fun", " x", " was awful , but the actor and the scene"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.causal_folder(tmp_path_factory.mktemp("base") / "gpt2")


def model_of(base: Path, members: int = 1, **scale) -> RewardModel:
    """A reward model whose LoRAs and heads are random, not fresh."""
    backbone = load_backbone(str(base), device="cpu")
    net = RewardNet.fresh(backbone, Lora(r=4), members)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for member, _ in enumerate(net.heads):
            for parameter in net.learned(member).values():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model = RewardModel("mine", net, backbone.tokenizer, 64, Scale(((1.0, 0.0),) * members))
    fitted = Scale.fitted(model.logits(PROMPTS, ANSWERS), **scale)
    return RewardModel("mine", net, backbone.tokenizer, 64, fitted)


def saved(base: Path, folder: Path, members: int = 1, **scale) -> RewardModel:
    model = model_of(base, members, **scale)
    model.save(folder, Stack("reward", str(base), load_backbone(str(base), device="cpu").fingerprint))
    return model


def test_the_gradient_of_bradley_terry_is_that_of_finite_differences():
    scores = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    margin = torch.rand(6, dtype=torch.float64)

    def loss(both: torch.Tensor) -> torch.Tensor:
        return bradley_terry_loss(both[0], both[1], margin, centre=0.01)

    assert torch.autograd.gradcheck(loss, (scores,))
    loss(scores).backward()
    step = 1e-6
    for side, pair in itertools.product(range(2), range(6)):
        ends = []
        for sign in (1, -1):
            moved = scores.detach().clone()
            moved[side, pair] += sign * step
            ends.append(float(loss(moved)))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(scores.grad[side, pair]), abs=1e-7)


def test_bradley_terry_knows_differences_and_centring_knows_levels():
    chosen, rejected = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    plain = bradley_terry_loss(chosen, rejected)
    assert torch.allclose(bradley_terry_loss(chosen + 7, rejected + 7), plain)
    assert bradley_terry_loss(chosen + 7, rejected + 7, centre=0.01) > bradley_terry_loss(chosen, rejected, centre=0.01)
    assert torch.allclose(bradley_terry_loss(chosen, rejected, torch.tensor([0.3, 0.3])),
                          bradley_terry_loss(chosen - 0.3, rejected))
    assert float(bradley_terry_loss(chosen, chosen)) == pytest.approx(0.6931472)


def test_heads_start_as_told():
    assert not any(p.any() for p in ScalarHead(32).parameters())
    head = reward_head(10_000).requires_grad_(False)
    assert float(head.linear.weight.std()) == pytest.approx(10_001**-0.5, rel=0.05)
    assert float(head.linear.bias) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.ones(2, 10_000, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny.llama_folder(tmp_path_factory.mktemp("base") / "llama")


@pytest.mark.parametrize(("kind", "members"), [("base", 1), ("base", 3), ("llama", 1)])
def test_a_batch_scores_as_its_rows_do_alone_padded_on_either_side(request, kind, members):
    model = model_of(request.getfixturevalue(kind), members)
    together = model.logits(PROMPTS, ANSWERS)
    alone = torch.cat([model.logits([p], [a]) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    assert torch.allclose(together, alone, atol=1e-5, rtol=0)
    assert together.std(0).min() > 0.1, "the scores differ, so agreeing says something"
    rows = model.token_ids(PROMPTS, ANSWERS)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    for member in range(members):
        model.net.use(member)
        assert torch.allclose(model.net(ids, mask), together[:, member], atol=1e-5, rtol=0)
    assert torch.equal(model.logits(PROMPTS[::-1], ANSWERS[::-1]).flip(0), together)


def test_the_score_is_read_at_the_eos_that_ends_every_answer(base):
    model = model_of(base)
    rows = model.token_ids(PROMPTS, ANSWERS)
    assert all(row[-1] == model.tokenizer.eos_token_id and row.count(row[-1]) == 1 for row in rows)
    short = RewardModel("mine", model.net, model.tokenizer, 8)
    (row,) = short.token_ids(["w" * 30], [" good"])
    assert len(row) == 8 and model.tokenizer.decode(row).endswith(" good<eos>")
    (row,) = short.token_ids(["the"], ["w" * 30])
    assert len(row) == 8 and row[-1] == model.tokenizer.eos_token_id


def test_members_share_the_bases_storage_and_nothing_else(base):
    backbone = load_backbone(str(base), device="cpu")
    before = {p.data_ptr() for p in backbone.model.parameters()}
    size = sum(p.numel() for p in backbone.model.parameters())
    net = RewardNet.fresh(backbone, Lora(r=4), members=5)
    own = [{p.data_ptr() for p in net.learned(member).values()} for member in range(5)]
    assert all(not (a & b) for a, b in itertools.combinations(own, 2))
    frozen = {p.data_ptr() for p in net.parameters()} - set().union(*own)
    assert frozen == before
    learned_size = sum(p.numel() for member in range(5) for p in net.learned(member).values())
    assert sum(p.numel() for p in {p.data_ptr(): p for p in net.parameters()}.values()) == size + learned_size
    for member in range(5):
        net.learn(member)
        assert {p.data_ptr() for p in net.parameters() if p.requires_grad} == own[member]
    heads = [head.linear.weight for head in net.heads]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(heads, 2))


def test_only_a_loras_dropout_acts_in_training(base):
    net = RewardNet.fresh(load_backbone(str(base), device="cpu"), Lora(r=4, dropout=0.5))
    net.train()
    training = {name for name, module in net.named_modules() if module.training}
    assert training and all(".lora_dropout" in name for name in training)
    net.eval()
    assert not any(module.training for module in net.modules())


def test_combining_and_scaling():
    logits = torch.randn(200, 4) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + torch.tensor([0.0, 9.0, -3.0, 1.0])
    logits += 3 * torch.randn(200, 1) * torch.tensor([1.0, 5.0, 0.1, 2.0])
    scales = {c: Scale.fitted(logits, c, 0.5) for c in ("mean", "min", "mean-std")}
    for scale in scales.values():
        scores = scale.scores(logits)
        assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
        assert float(scores.var()) == pytest.approx(1, abs=1e-4)
    raw = {c: scale.raw(logits) for c, scale in scales.items()}
    assert (raw["min"] <= raw["mean"]).all() and (raw["mean-std"] <= raw["mean"]).all()
    same = logits[:, :1].expand(-1, 3)
    for c in ("mean", "min", "mean-std"):
        assert torch.allclose(Scale.fitted(same, c).raw(same), Scale.fitted(same).raw(same), atol=1e-5)
    one = Scale.fitted(logits[:, 1:2])
    assert torch.equal(one.raw(logits[:, 1:2]), logits[:, 1])


@pytest.mark.parametrize(("members", "combine"), [(1, "mean"), (3, "mean-std")])
def test_a_saved_model_scores_bit_for_bit_as_before(base, tmp_path, members, combine):
    model = saved(base, tmp_path / "adapter", members, combine=combine, std_weight=0.7)
    loaded = RewardModel.load(str(tmp_path), device="cpu")
    assert loaded.scale == model.scale
    assert torch.equal(loaded.scores(PROMPTS, ANSWERS), model.scores(PROMPTS, ANSWERS))
    scores = model.scores(PROMPTS, ANSWERS)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5) and float(scores.std()) == pytest.approx(1, abs=1e-5)


def test_it_stands_on_the_sft_adapter_merged_below_it(base, tmp_path):
    backbone, under = load_stack(str(base), device="cpu")
    policy = attach(backbone.model, Lora(r=4), "policy", base=str(base))
    with torch.no_grad():
        for parameter in adapter_parameters(policy, "policy").values():
            parameter.add_(0.1)
    save_adapter(policy, "policy", tmp_path / "sft", stack_over(str(base), under, backbone.tokenizer))
    merged, below = load_stack(str(tmp_path / "sft"), device="cpu")
    model = RewardModel("mine", RewardNet.fresh(merged, Lora(r=4)), merged.tokenizer, 64)
    model.save(tmp_path / "rm", stack_over(str(tmp_path / "sft"), below, merged.tokenizer))
    shutil.rmtree(tmp_path / "sft")  # a copy lies in the folder
    loaded = RewardModel.load(str(tmp_path / "rm"), device="cpu")
    assert torch.equal(loaded.scores(PROMPTS, ANSWERS), model.scores(PROMPTS, ANSWERS))
    bare = RewardModel("bare", RewardNet.fresh(load_backbone(str(base), device="cpu"), Lora(r=4)), merged.tokenizer, 64)
    assert not torch.allclose(bare.scores(PROMPTS, ANSWERS), model.scores(PROMPTS, ANSWERS), atol=1e-3)


def head_with(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(folder / "head.safetensors") | tensors, folder / "head.safetensors")
    write_manifest(folder)


def no_head(folder: Path) -> None:
    (folder / "head.safetensors").unlink()


def no_head_by_its_manifest(folder: Path) -> None:
    no_head(folder)
    write_manifest(folder)


def a_nan(folder: Path) -> None:
    head_with(folder, **{"linear.bias": torch.tensor([float("nan")])})


def a_wide_head(folder: Path) -> None:
    head_with(folder, **{"linear.weight": torch.zeros(1, 33)})


def a_flipped_bit(folder: Path) -> None:
    data = bytearray((folder / "head.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "head.safetensors").write_bytes(data)


def facts(folder: Path, **changes: object) -> None:
    told = json.loads((folder / "stack.json").read_text()) | changes
    (folder / "stack.json").write_text(json.dumps({k: v for k, v in told.items() if v is not None}))
    write_manifest(folder)


REFUSALS = {
    "head.safetensors is missing": no_head,
    "has no head.safetensors": no_head_by_its_manifest,
    "linear.bias holds NaN": a_nan,
    r"linear.weight is \(1, 33\), expected \(1, 32\)": a_wide_head,
    "head.safetensors does not match its sha256": a_flipped_bit,
    "is another one": lambda folder: facts(folder, fingerprint="0123456789abcdef"),
    "max_length 'long'": lambda folder: facts(folder, max_length="long"),
    "how to scale": lambda folder: facts(folder, members=None),
    "scales no reward": lambda folder: facts(folder, temperature=0),
    "not a reward model": lambda folder: facts(folder, kind="causal"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_a_folder_that_is_not_whole_is_refused_by_name(base, tmp_path, why):
    saved(base, tmp_path / "rm")
    REFUSALS[why](tmp_path / "rm")
    with pytest.raises(UserError, match=why) as told:
        RewardModel.load(str(tmp_path / "rm"), device="cpu")
    assert str(tmp_path / "rm") in str(told.value)


def test_a_member_without_its_head_is_refused(base, tmp_path):
    saved(base, tmp_path / "rm", members=3)
    (tmp_path / "rm/member-1/head.safetensors").unlink()
    with pytest.raises(UserError, match="member-1/head.safetensors is missing"):
        RewardModel.load(str(tmp_path / "rm"), device="cpu")


def test_other_kinds_and_other_uses_are_refused(base, tmp_path):
    with pytest.raises(UserError, match="not a reward model"):
        RewardModel.load(str(base), device="cpu")
    saved(base, tmp_path / "rm")
    with pytest.raises(UserError, match="scores answers"):
        load_stack(str(tmp_path / "rm"), device="cpu")


def test_it_is_a_part_of_a_reward(base):
    model = model_of(base)
    total, parts = Reward((RewardPart("learned", learned(model), weight=2.0),))(PROMPTS, ANSWERS, [None] * 4)
    assert torch.equal(parts["learned"], model.scores(PROMPTS, ANSWERS))
    assert torch.equal(total, 2 * parts["learned"])
