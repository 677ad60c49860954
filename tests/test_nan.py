"""NaN and infinity at every site of a real run: it stops at that step, before the update, and says where."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch

from peftlab.errors import LabError
from peftlab.models.roles import Roles
from peftlab.recipes import RECIPES, load
from peftlab.recipes.launch import launch
from peftlab.rl import ppo as ppo_module
from peftlab.rl import rollout as rollout_module
from peftlab.rl.trainer import PolicyTrainer
from peftlab.runs.atomic import read_rows
from peftlab.runs.rundir import RunDir
from peftlab.sampling.sampler import Sampler
from peftlab.training.trainer import LabCallback, LabTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

SUPERVISED = [verb for verb in RECIPES if "max_steps" in load(verb).CONFIG.model_fields]
POLICY = [verb for verb in RECIPES if verb not in SUPERVISED]
BAD = 3  # the step that meets the fault; checkpoints are written after each step before it
REWARD = "def count_e(prompts, completions, records):\n    return [float(c.count('e')) for c in completions]\n"


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("nan")
    shop = tiny.workshop(root) | {"root": str(root)}
    (root / "nan_rewards.py").write_text(REWARD)
    launch("classify", None, tiny.overrides(shop, "classify"), root, "judge")
    return shop


@pytest.fixture(autouse=True)
def at_home(shop, monkeypatch) -> None:
    """Rewards are looked up in the working directory."""
    monkeypatch.chdir(shop["root"])


def go(shop: dict[str, str], verb: str, runs: Path, *more: str) -> dict:
    fields = load(verb).CONFIG.model_fields
    rl = ["steps=4", "save_every=1", "reward=nan_rewards:count_e"]
    pairs = ["max_steps=4", "save_every=1"] if "max_steps" in fields else rl
    pairs += [f"judge={shop['root']}/judge"] if "judge" in fields else []
    return launch(verb, None, tiny.overrides(shop, verb, *pairs, *more), runs, verb)


class Fault:
    """Where a run is, and what its weights were when the bad step began.

    `later`: how many of the bad step's numbers stay good before one is spoilt.
    """

    def __init__(self, value: float = math.nan, later: int = 0) -> None:
        self.value, self.later, self.active = value, later, False
        self.on_the_way: list[str] = []
        self.before: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def at(self, step: int, weights: dict[str, torch.Tensor]) -> None:
        """Called as a step begins, with the parameters that learn."""
        self.active = step == BAD
        self.weights = weights
        if self.active:
            self.before = {name: tensor.detach().clone() for name, tensor in weights.items()}

    def spoil(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, in the bad step with one entry spoilt."""
        if not self.active:
            return tensor
        if self.later:
            self.later -= 1
            self.on_the_way = self.moved()
            return tensor
        spoilt = tensor.clone()
        spoilt.view(-1)[-1] = self.value
        return spoilt

    def moved(self) -> list[str]:
        return [name for name, tensor in self.weights.items() if not torch.equal(tensor, self.before[name])]


def assert_stopped(run: Path, error: LabError, site: str) -> None:
    """The message names step and site, on one line; the checkpoint before is whole, and nothing else was made."""
    assert f"step {BAD}: " in str(error) and site in str(error) and "\n" not in str(error)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["reason"], summary["artifacts"]) == ("failed", str(error), {})
    newest, skipped = RunDir(run, run.name, "", resumed=False).checkpoints.newest_verified()
    assert (newest.step, skipped) == (BAD - 1, [])
    assert not (run / "adapter").exists() and not (run / "model").exists()
    assert max(row["step"] for row in read_rows(run / "metrics.jsonl")) == BAD - 1


def in_turn(sites: list[tuple[str, str]], other: float) -> list[tuple[str, str, float]]:
    """Each (verb, site) with NaN and, the next one, with an infinity."""
    return [(verb, site, (math.nan, other)[i % 2]) for i, (verb, site) in enumerate(sites)]


@pytest.mark.parametrize(
    ("verb", "site", "value"),
    in_turn([(verb, site) for verb in SUPERVISED for site in ("loss", "gradient", "parameter")], math.inf),
)
def test_a_supervised_run_stops(shop, tmp_path, monkeypatch, verb, site, value):
    fault = Fault(value)
    with monkeypatch.context() as patch:
        spoil_training(site, fault, patch)
        with pytest.raises(LabError) as caught:
            go(shop, verb, tmp_path)
    assert_stopped(tmp_path / verb, caught.value, "train/loss" if site == "loss" else list(fault.weights)[-1])
    if site != "parameter":  # that one is the update
        assert not fault.moved()


@pytest.mark.parametrize(
    ("verb", "site", "value"),
    in_turn([(verb, site) for verb in ("sft", "classify") for site in ("loss", "gradient", "parameter")], math.inf),
)
def test_a_fused_optimizer_is_not_waited_for_and_keeps_the_weights(shop, tmp_path, monkeypatch, verb, site, value):
    """As on a GPU: of 200 steps the third is neither logged nor saved, and what it met is told before the fourth."""
    fault, steps, made = Fault(value), [], LabTrainer.training_step
    init = torch.optim.AdamW.__init__

    def training_step(self, *args, **kwargs):
        steps.append((self.state.global_step + 1, self.look is not None))
        return made(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda *a, **k: init(*a, **k | {"fused": True, "foreach": None}))
    monkeypatch.setattr(LabTrainer, "training_step", training_step)
    with monkeypatch.context() as patch:
        spoil_training(site, fault, patch)
        with pytest.raises(LabError) as caught:
            go(shop, verb, tmp_path, "max_steps=200", "save_every=0", "epochs=200")
    assert steps == [(1, False), (2, False), (3, True), (4, True)], "the first was logged, which waits"
    assert f"step {BAD}: " in str(caught.value)
    assert ("train/loss" if site == "loss" else list(fault.weights)[-1]) in str(caught.value)
    if site != "parameter":
        assert "its update was not made" in str(caught.value) and not fault.moved()


def spoil_training(site: str, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    """Makes `site` of a supervised run bad in the bad step."""
    compute, updated = LabTrainer.compute_loss, LabCallback.on_optimizer_step

    def compute_loss(self, model, inputs, *args, **kwargs):
        fault.at(self.state.global_step + 1, self.learned)
        loss = compute(self, model, inputs, *args, **kwargs)
        if fault.active:
            row = self.data_collator([self.train_dataset[row] for row in self._rows_of_step(BAD)])
            assert all(torch.equal(row[name], inputs[name]) for name in row if name in inputs), "the rows it names"
        if site == "gradient" and fault.active:
            list(fault.weights.values())[-1].register_hook(fault.spoil)
        return fault.spoil(loss) if site == "loss" else loss

    def after_update(self, *args, **kwargs):
        if site == "parameter" and fault.active:
            name, parameter = list(fault.weights.items())[-1]
            parameter.data = fault.spoil(parameter.data)
        updated(self, *args, **kwargs)

    patch.setattr(LabTrainer, "compute_loss", compute_loss)
    patch.setattr(LabCallback, "on_optimizer_step", after_update)


# Site -> what the message calls it. Each is spoilt where it is made.
SITES = {
    "score": "score",
    "logprob": "logprob",
    "ref_logprob": "ref_logprob",
    "value": "value",
    "exact_kl": "exact_kl",
    "kl_coef": "reward",
    "gradient": "policy/grad_norm",
    "parameter": "its update made",
    "new_logprob": "policy/",  # minus infinity is a ratio of 0 and a finite loss, but an infinite KL
}
PPO_ONLY = {"advantage": "advantage", "policy_loss": "policy/loss", "value_loss": "value/loss"}


def spoil_site(site: str, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    """Makes `site` bad in the bad step."""
    collect, sample = PolicyTrainer.collect, Sampler.sample
    backward, apply = PolicyTrainer.backward, PolicyTrainer.apply

    def collecting(self, prompts):
        fault.at(self.steps_done + 1, self.roles.state())
        if site == "score":
            score = self.reward
            patch.setattr(self, "reward", lambda *asked: (fault.spoil(score(*asked)[0]), {}))
        rollout = collect(self, prompts)
        if site == "kl_coef" and fault.active:
            self.kl.coef = fault.value
        return rollout

    def sampling(self, *args):
        samples = sample(self, *args)
        name = "logprobs" if site == "logprob" else "readings"
        if getattr(samples, name) is not None:
            object.__setattr__(samples, name, fault.spoil(getattr(samples, name)))
        return samples

    def differentiating(self, *args, **kwargs):
        if fault.active:
            next(iter(self.roles.policy_parameters().values())).register_hook(fault.spoil)
        return backward(self, *args, **kwargs)

    def applying(self, stats):
        numbers = apply(self, stats)
        if fault.active:
            with torch.no_grad():
                parameter = next(iter(self.roles.policy_parameters().values()))
                parameter.copy_(fault.spoil(parameter))
        return numbers

    def wrapped(real):
        def spoilt(*args, **kwargs):
            made = real(*args, **kwargs)
            return (fault.spoil(made[0]), *made[1:]) if isinstance(made, tuple) else fault.spoil(made)

        return spoilt

    patch.setattr(PolicyTrainer, "collect", collecting)
    if site == "logprob":
        patch.setattr(Sampler, "sample", sampling)
    elif site == "ref_logprob":
        patch.setattr(Roles, "reference_logprobs", wrapped(Roles.reference_logprobs))
    elif site == "value":  # a shared critic's are read while sampling
        patch.setattr(Sampler, "sample", sampling)
        patch.setattr(Roles, "values", wrapped(Roles.values))
    elif site == "exact_kl":
        patch.setattr(rollout_module, "exact_kl", wrapped(rollout_module.exact_kl))
    elif site == "gradient":
        patch.setattr(PolicyTrainer, "backward", differentiating)
    elif site == "parameter":
        patch.setattr(PolicyTrainer, "apply", applying)
    elif site in ("advantage", "policy_loss", "value_loss"):
        name = {"advantage": "gae", "policy_loss": "ppo_policy_loss"}.get(site, site)
        patch.setattr(ppo_module, name, wrapped(getattr(ppo_module, name)))
    elif site == "new_logprob":
        patch.setattr(Roles, "policy_tokens", wrapped(Roles.policy_tokens))


@pytest.mark.parametrize(
    ("verb", "site", "value"),
    in_turn([(v, site) for v in POLICY for site in (SITES | (PPO_ONLY if v == "ppo" else {}))], -math.inf),
)
def test_a_policys_run_stops(shop, tmp_path, monkeypatch, verb, site, value):
    fault = Fault(value)
    with monkeypatch.context() as patch:
        spoil_site(site, fault, patch)
        with pytest.raises(LabError) as caught:
            go(shop, verb, tmp_path)
    assert_stopped(tmp_path / verb, caught.value, (SITES | PPO_ONLY)[site])
    assert not fault.moved()


@pytest.mark.parametrize("site", ["new_logprob", "parameter"])
@pytest.mark.parametrize("verb", POLICY)
def test_a_fault_in_a_later_minibatch_takes_the_earlier_ones_back(shop, tmp_path, monkeypatch, verb, site):
    """Of four minibatches in two epochs, three move the weights before it is met."""
    fault = Fault(later=3)
    with monkeypatch.context() as patch:
        spoil_site(site, fault, patch)
        with pytest.raises(LabError) as caught:
            go(shop, verb, tmp_path, "epochs=2", f"minibatch_size={4 if verb == 'ppo' else 6}", "epoch_kl_stop=9")
    assert_stopped(tmp_path / verb, caught.value, SITES[site])
    assert fault.on_the_way and not fault.moved()
    assert str(caught.value).endswith("; the weights are those before the step")
    if site == "new_logprob":
        assert "in minibatch 2 of epoch 2" in str(caught.value)
    assert "not updated" not in str(caught.value)
