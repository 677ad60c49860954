"""Policy, reference and critic on one frozen base, and the merged copy that the sampler reads.

The reference is the base with adapters off. A fresh LoRA has B = 0, so policy and reference start bitwise equal and
the KL at step 0 is exactly 0. Dropout never acts: every pass runs in eval mode.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.logprobs import Quick, RoundedSlopes, entropy, state_logprobs, token_logprobs
from ..ops.split import SplitHead, SplitWeight, splits_pay
from .adapter_files import load_adapter
from .adapters import PolicyLora, activate, adapter_parameters, attach, lora_layers, only
from .backbone import (
    Backbone,
    causal_logits,
    causal_logits_and_states,
    causal_states,
    parameter_bytes,
    trunk,
    unembedding,
)
from .captured import CapturedStates, capturable, padded
from .heads import ScalarHead
from .lean import attend_in_full, keep_less
from .merged import MergedPolicy, merge
from .packed import packable
from .quick_lora import round_gradients, split_products
from .reward_model import CriticStart

POLICY, VALUE = "policy", "value"
Places = tuple[Tensor, ...] | None


class Roles:
    """One base in memory, read in three roles.

    `critic = "shared"` puts the value head on the policy's own final states (one pass serves both); "adapter" gives
    the critic a LoRA of its own, fresh or what `start` says; "none" leaves it out, and every value is 0.
    """

    def __init__(
        self,
        backbone: Backbone,
        lora: PolicyLora,
        critic: Literal["shared", "adapter", "none"] = "shared",
        start: CriticStart | None = None,
    ) -> None:
        self.tokenizer = backbone.tokenizer
        self.critic = critic
        self.twin = _twin(backbone.model)
        self.unembedding = unembedding(backbone.model)
        self.model: Any = attach(backbone.model, lora, POLICY, base=backbone.name)
        if start is not None:
            load_adapter(self.model, start.folder, VALUE, backbone.fingerprint)
        elif critic == "adapter":
            attach(self.model, lora, VALUE)
        head = start.head if start is not None else ScalarHead(backbone.model.config.hidden_size)
        self.head = None if critic == "none" else head.to(backbone.device)
        self.model.requires_grad_(False)
        for parameter in self.policy_parameters().values():
            parameter.requires_grad_(True)
        for parameter in self.critic_parameters().values():
            parameter.requires_grad_(True)
        # Kept, since to find them takes a walk over all modules, and each pass asks.
        self._learned: dict[str | None, list[nn.Parameter]] = {POLICY: list(self.policy_parameters().values())}
        if critic == "adapter":
            self._learned[VALUE] = list(adapter_parameters(self.model, VALUE).values())
        activate(self.model, POLICY)
        self.quick_head: Quick | None = None
        self.captured: CapturedStates | None = None
        self.merged: MergedPolicy | None = None

    def quicken(self, merged: bool = False, gradients: torch.dtype = torch.float32) -> None:
        """For training by reinforcement, from now on: attention to short rows in fewer kernels.

        And on CUDA: float32 products in parts, and passes from graphs, which keep less. These fill `.grad` by
        themselves: of what they make no gradient can be asked by torch.autograd.grad. `merged`: the policy's multiply
        by the weights that the sampler reads; `moved` is to be called whenever the adapter is written to.
        `gradients`, of a CPU: the dtype in which gradients go through the frozen weights.
        """
        base = self.model.get_base_model()
        known = capturable(base)
        if known:  # another class might ask an attention for more than ours gives
            attend_in_full(base)
            attend_in_full(self.twin)
        if gradients != torch.float32:
            round_gradients(self.model, gradients)
            if self.unembedding is not None:
                self.quick_head = RoundedSlopes(self.unembedding, gradients)
        if not splits_pay(self.device) or self.captured is not None:
            return
        split_products(self.model)
        if known:
            keep_less(base)
            if self.device.type == "cuda":
                self.captured = CapturedStates(trunk(self.model), self.device)
        if self.unembedding is None or self.unembedding.dtype != torch.float32:
            return
        if merged and known and packable(self.twin):
            stream = self.captured.stream if self.captured is not None else None
            self.merged = MergedPolicy(self.model, POLICY, self.twin, stream)
            self.quick_head = self.merged.packed.split_head
        else:
            self.quick_head = SplitHead(self.unembedding)

    def moved(self) -> None:
        """The policy's adapter was written to: passes that read it merged merge it again first."""
        if self.merged is not None:
            self.merged.fresh = False

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def precision(self) -> str:
        """How its matrix products are made, by the name of the limit of invariant/first_ratio_error."""
        return "fp32 in parts" if self._parts() else "fp32"

    def _parts(self) -> list[SplitWeight]:
        """What multiplies in parts."""
        layers = lora_layers(self.model).values()
        held = self.quick_head, *(getattr(layer, "split", None) for layer in layers)
        return [part for part in held if isinstance(part, SplitWeight)]

    @property
    def shared_head(self) -> ScalarHead | None:
        """The head that reads values off the policy's states, the sampler's copy of it included; None without one."""
        return self.head if self.critic == "shared" else None

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        return adapter_parameters(self.model, POLICY)

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        if self.head is None:
            return {}
        own = adapter_parameters(self.model, VALUE) if self.critic == "adapter" else {}
        return own | {f"value_head.{n}": p for n, p in self.head.named_parameters()}

    def policy_tokens(
        self, ids: Tensor, mask: Tensor, keep: int, temperature: float = 1.0, counted: Places = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the last `keep` tokens, the policy's log-probabilities and entropies, 0 where the mask is False, and the
        critic's values; V_t is read before token t. Each (B, keep), without logits where the head is a plain product.

        `counted`: rows and columns, of the last `keep` alone, where the mask is True, where they are known: the device
        need not be asked.
        """
        logprobs, entropies, states = self._read(ids, mask, mask[:, -keep:], temperature, POLICY, counted)
        head = self.shared_head
        return logprobs, entropies, self.values(ids, mask, keep) if head is None else head(states)

    @torch.no_grad()
    def reference_logprobs(
        self, ids: Tensor, mask: Tensor, keep: int, temperature: float = 1.0, counted: Places = None
    ) -> Tensor:
        """The reference's log-probabilities (B, keep) of the last `keep` tokens, 0 where the mask is False.

        `counted`: as in `policy_tokens`.
        """
        return self._read(ids, mask, mask[:, -keep:], temperature, None, counted)[0]

    def compared_logprobs(self, ids: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities under policy and reference, both (B, T - 1), of each row's tokens but the first.

        ids, counted: (B, T), padded behind. Tokens that are not counted have 0; only the policy's have a gradient.
        """
        everything = torch.ones_like(counted)
        with torch.no_grad():
            reference, _, _ = self._read(ids, everything, counted[:, 1:], 1.0, None)
        policy, _, _ = self._read(ids, everything, counted[:, 1:], 1.0, POLICY)
        return policy, reference

    def policy(self, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        """Policy logits (B, keep, V)."""
        with self._acting(POLICY):
            return causal_logits(self.model, ids, mask, keep)

    def values(self, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        """The critic's values (B, keep); 0 without one, at no cost."""
        if self.head is None:
            return torch.zeros(len(ids), keep, device=ids.device)
        values: Tensor = self.head(self._states(ids, mask, keep, POLICY if self.critic == "shared" else VALUE))
        return values

    @torch.no_grad()
    def reference(self, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        """Reference logits (B, keep, V): the same base, adapters off."""
        with self._acting(None):
            return causal_logits(self.model, ids, mask, keep)

    @contextmanager
    def _acting(self, role: str | None) -> Iterator[None]:
        """The adapter `role` acts meanwhile, or none."""
        merged = self.merged.acting() if self.merged is not None and role == POLICY else nullcontext()
        with only(self.model, *([role] if role else [])), merged:
            yield

    def _states(self, ids: Tensor, mask: Tensor, keep: int, role: str | None) -> Tensor:
        """`causal_states` with the adapter `role`, or none."""
        acting = partial(self._acting, role)
        if self.captured is None:
            with acting():
                return causal_states(self.model, ids, mask, keep)
        if self.merged is not None and role == POLICY:
            self.merged.follow()
        return self.captured(ids, *padded(mask), role, acting, self._learned.get(role, ()))[:, -keep - 1 : -1]

    def _read(
        self, ids: Tensor, mask: Tensor, counted: Tensor, temperature: float, role: str | None, where: Places = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and final states for the last tokens, with the adapter `role` or none.

        counted (B, keep): which of the last `keep` tokens get the first two; the others have 0. `where` they lie.
        """
        keep = counted.shape[1]
        tokens = ids[:, -keep:]
        if self.unembedding is None:
            with self._acting(role):
                logits, states = causal_logits_and_states(self.model, ids, mask, keep)
            found = token_logprobs(logits, tokens, temperature), entropy(logits.detach(), temperature)
            logprobs, entropies = (part.masked_fill(~counted, 0.0) for part in found)
            return logprobs, entropies, states
        where = where or counted.nonzero(as_tuple=True)  # before the pass: it asks the device
        states = self._states(ids, mask, keep, role)
        found = state_logprobs(states[where], self.unembedding, tokens[where], temperature, self.quick_head)
        nothing = torch.zeros(counted.shape, device=ids.device)
        logprobs, entropies = (nothing.index_put(where, part) for part in found)
        return logprobs, entropies, states

    def refresh(self, role: str | None = POLICY) -> None:
        """Write W + (alpha / r) B A of a role (None: W itself) into the sampler's copy; the base is only read.

        Where the policy is read merged, its next pass writes the policy there again.
        """
        if self.merged is not None and role == POLICY:
            self.merged.renew()
        else:
            merge(self.model, role, self.twin)
            self.moved()

    def state(self) -> dict[str, Tensor]:
        """Everything that learns, for checkpoints."""
        return {n: p.detach() for n, p in (self.policy_parameters() | self.critic_parameters()).items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.policy_parameters() | self.critic_parameters()
        if own.keys() != state.keys():
            raise KeyError(f"checkpoint and model differ: {sorted(own.keys() ^ state.keys())[:3]}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
        self.refresh()

    def frozen_parameters(self) -> dict[str, Tensor]:
        """The base: everything that must be byte-identical after training."""
        return {n: p for n, p in self.model.named_parameters() if not p.requires_grad}

    def frozen_hash(self) -> str:
        """sha256 over every byte of the frozen parameters."""
        return hash_of(self.frozen_parameters())

    def bytes_per_role(self) -> dict[str, int]:
        """Bytes of the shared base, of each role's own tensors, and of the sampler's copy beyond what it shares.

        "parts" are the base's weights once more, as they are multiplied; the sampler's copy has as many of its own, the
        head's left out where the policy is read merged.
        """
        parts = self._parts()
        frozen = self.frozen_parameters()
        shared = {p.data_ptr() for p in frozen.values()}
        reward = [p for name, p in frozen.items() if ".lora_" in name]  # that of a reward model which joined the base
        return {
            "base": parameter_bytes(frozen.values()) - parameter_bytes(reward),
            **({"reward": parameter_bytes(reward)} if reward else {}),
            "policy": parameter_bytes(self.policy_parameters().values()),
            **({"value": parameter_bytes(self.critic_parameters().values())} if self.head is not None else {}),
            **({"parts": sum(part.columns.nbytes for part in parts)} if parts else {}),
            "sampler": parameter_bytes(p for p in self.twin.parameters() if p.data_ptr() not in shared),
        }


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the names and every byte of these, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(name.encode() + data.numpy().tobytes())
    return digest.hexdigest()


def _twin(model: Any) -> Any:
    """A second module tree that owns its linear weights and shares everything else with `model`."""
    from transformers.pytorch_utils import Conv1D

    linear = nn.Linear | Conv1D
    head = model.get_output_embeddings()
    owned = {id(m.weight) for m in model.modules() if isinstance(m, linear) and m is not head}
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()] if id(t) not in owned}
    return copy.deepcopy(model, memo=dict(shared)).requires_grad_(False).eval()
