"""Final states of a causal model's passes by CUDA graphs, with the gradients of its adapters.

Of a pass of some thousand tokens a GPU runs each kernel sooner than Python launches the next. So a pass is recorded
once a kind, forward and backward, and then replayed. A kind is a role, whether it learns, and a size; sizes are rounded
up, by rows and leading columns that no other token sees. The first pass of a kind runs kernel by kernel, on the stream
of captures, and sets up what libraries keep; the second is captured.

A row may hold several documents: a token sees those before it of its own, and itself.

Shapes: B rows of T tokens, in a kind of R >= B rows and S >= T tokens; D width of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.graphs import aside, capturing
from ..ops.masks import position_ids
from .lean import ATTENTION

# Kinds that are remembered; beyond them all are forgotten.
KINDS = 64
# Tokens up to which a pass without a gradient is worth a graph; above, the device is busy for longer than launches are.
CAPTURED_TOKENS = 1 << 14
Acting = Callable[[], AbstractContextManager[None]]
Kind = tuple[str | None, bool, int, int]


def capturable(model: Any) -> bool:
    """Whether a causal model (not yet a PeftModel) is of a class whose forward asks the device nothing."""
    if model.config._attn_implementation not in ("sdpa", ATTENTION):
        return False
    name = type(model).__name__
    plain_rotary = name == "LlamaForCausalLM" and model.model.rotary_emb.rope_type == "default"
    return name == "GPT2LMHeadModel" or plain_rotary


def bucket(rows: int, tokens: int, multiple: int = 8) -> tuple[int, int]:
    """Rows and tokens of the kind that takes these: a `multiple`, and one of 16 or an eighth of a longer text."""
    step = max(16, 1 << max(0, tokens.bit_length() - 3))
    return -(-rows // multiple) * multiple, -(-tokens // step) * step


def padded(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and documents, each (B, T), of rows of one document, where mask (B, T); each pad is its own."""
    own = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return position_ids(mask), torch.where(mask, 0, own)


def packed(positions: Tensor) -> Tensor:
    """Documents (B, T) of rows in which each begins at position 0."""
    return (positions == 0).cumsum(-1)


class CapturedStates:
    """What the trunk of a causal model gives, by graphs; `body` is its forward. Parameters must stay where they lie.

    `multiple`: rows are rounded up to one of it.
    """

    def __init__(self, body: Callable[..., Any], device: torch.device, multiple: int = 8) -> None:
        self.body, self.multiple = body, multiple
        self.stream = torch.cuda.Stream(device)
        self.passes: dict[Kind, Pass] = {}
        self.turns: dict[tuple[str | None, bool], Turn] = {}

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        documents: Tensor,
        role: str | None,
        acting: Acting,
        learned: Sequence[nn.Parameter] = (),
    ) -> Tensor:
        """States (B, T, D) of ids, positions and documents, each (B, T), with the adapter `role`; `acting` is the
        context in which it acts.

        `learned`: that adapter's parameters, which get gradients where they are taken. One pass of a role at a time:
        its states, and what their gradient is made of, are there until the next begins.
        """
        learned = learned if torch.is_grad_enabled() else ()
        rows, tokens = bucket(len(ids), ids.shape[1], self.multiple)
        share = role, bool(learned)
        kind = *share, rows, tokens
        if len(self.passes) >= KINDS and kind not in self.passes:
            torch.cuda.synchronize(self.stream.device)
            self.passes.clear()
            self.turns.clear()
        if kind not in self.passes:
            if share not in self.turns:
                self.turns[share] = Turn(learned)
            self.passes[kind] = Pass(self.body, rows, tokens, self.stream, self.turns[share])
        one = self.passes[kind]
        with torch.cuda.device(self.stream.device):
            one.take(ids, positions, documents)
            return one.states(acting)[: len(ids), tokens - ids.shape[1] :]


class Turn:
    """What the passes of a role share: what learns, the memory between forward and backward, the last one's number."""

    def __init__(self, learned: Sequence[nn.Parameter]) -> None:
        self.learned = list(learned)
        self.gradients = [torch.zeros_like(parameter) for parameter in learned]
        # What autograd asks a replay's gradient for. A parameter would tie the stream of the replay to its node, and
        # no pass of it could be captured on another stream as long as that node lives.
        self.anchor = torch.zeros((), requires_grad=bool(self.learned))
        self.pool = torch.cuda.graph_pool_handle()
        self.number = 0


class Pass:
    """One kind of pass: what it reads and makes, at addresses that stay, and the graphs between."""

    def __init__(self, body: Callable[..., Any], rows: int, tokens: int, stream: Any, turn: Turn) -> None:
        device = stream.device
        self.body, self.stream, self.turn = body, stream, turn
        self.ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.seen = torch.zeros(rows, 1, tokens, tokens, dtype=torch.bool, device=device)
        self.before = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        self.alone = torch.arange(-tokens, 0, device=device).repeat(rows, 1)
        self.begun = False
        self.graphs: list[torch.cuda.CUDAGraph] = []  # forward, and backward where it learns
        self.made = self.slopes = torch.empty(0)

    def take(self, ids: Tensor, positions: Tensor, documents: Tensor) -> None:
        """Put rows into place. Places around them are documents of their own: no row of attention is empty."""
        rows, first = len(ids), self.ids.shape[1] - ids.shape[1]
        of = self.alone.clone()
        of[:rows, first:] = documents
        for place, values in ((self.ids, ids), (self.positions, positions)):
            place.zero_()
            place[:rows, first:] = values
        self.seen.copy_((of[:, None, :, None] == of[:, None, None]) & self.before)

    def states(self, acting: Acting) -> Tensor:
        """Final states (R, S, D) of what was taken."""
        if not self.begun:
            self.begun = True
            with aside(self.stream), acting():
                return self._run()
        if not self.graphs:
            with acting():
                self._capture()
        self.turn.number += 1
        if not self.turn.learned:
            self.graphs[0].replay()
            return self.made
        replayed: Tensor = _Replay.apply(self.turn.anchor, self)
        return replayed

    def _run(self) -> Tensor:
        states: Tensor = self.body(
            input_ids=self.ids, attention_mask=self.seen, position_ids=self.positions, use_cache=False
        ).last_hidden_state
        return states

    def _capture(self) -> None:
        pool = self.turn.pool
        with capturing(self.stream, pool) as forward:
            made = self._run()
        graphs, self.made = [forward], made.detach()
        if self.turn.learned:
            self.slopes = torch.zeros_like(self.made)
            with capturing(self.stream, pool) as backward:
                gradients = torch.autograd.grad(made, self.turn.learned, self.slopes)
                torch._foreach_copy_(self.turn.gradients, gradients)
            graphs.append(backward)
        self.graphs = graphs

    def add_gradients(self, slopes: Tensor) -> None:
        """Adds to `.grad` of what learns the gradient of sum(slopes * states), for slopes (R, S, D)."""
        self.slopes.copy_(slopes)
        self.graphs[1].replay()
        learned, gradients = self.turn.learned, self.turn.gradients
        there = [parameter.grad for parameter in learned if parameter.grad is not None]
        if len(there) == len(learned):
            torch._foreach_add_(there, gradients)
            return
        for parameter, gradient in zip(learned, torch._foreach_mul(gradients, 1.0), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


class _Replay(torch.autograd.Function):
    """The states of a captured pass, for whose gradient autograd asks since `anchor` has one."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, one: Pass) -> Tensor:
        ctx.one, ctx.number = one, one.turn.number
        one.graphs[0].replay()
        return one.made.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        turn = ctx.one.turn
        if ctx.number != turn.number:
            raise RuntimeError(
                "another pass of this role began before this one's backward, or it has had one: they share one memory"
            )
        turn.number += 1
        ctx.one.add_gradients(gradient)
        return None, None
