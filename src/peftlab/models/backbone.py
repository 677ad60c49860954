"""A name becomes a loaded base model with its tokenizer; the one place that calls a causal model's forward."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError, brief
from ..ops.finite import not_finite
from ..ops.masks import last_true, position_ids
from .catalog import resolve
from .freed_memory import keep_freed_memory

Task = Literal["causal", "classifier", "seq2seq"]
# What a task needs: the kinds of model that serve it, and in words.
NEEDS: dict[Task, tuple[tuple[str, ...], str]] = {
    "causal": (("causal",), "a causal language model, for example tiny-gpt2 or smollm2-135m"),
    "classifier": (
        ("causal", "encoder", "classifier", "reward"),
        "an encoder or a causal language model, for example minilm-distilbert",
    ),
    "seq2seq": (("seq2seq",), "an encoder-decoder, for example tiny-t5"),
}
# Left to its default, transformers asks at the terminal whether to run the code in a model's folder.
CODELESS = {"trust_remote_code": False}
TOKENIZER_FILE = re.compile(r"tokenizer|vocab|.*\.model$")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Backbone:
    """A frozen base: `model` in eval mode without gradients, its tokenizer, and the fingerprint of its weights."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def pick_device(device: str = "auto") -> torch.device:
    """"auto" is CUDA, then MPS, then the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device: unknown device {device!r}; use auto, cpu, cuda, cuda:0 or mps") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device: {device!r} is none of this lab's; use auto, cpu, cuda, cuda:0 or mps")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[chosen.type]
    if (chosen.index or 0) >= there:
        found = f"{there} of that kind" if there else "no GPU"
        raise UserError(f"device: {device} was asked for, but torch sees {found}; use device=auto or device=cpu")
    return chosen


def scoring_dtype(device: str = "auto") -> str:
    """The dtype of a model that only scores: bfloat16, but float32 on a CPU that would imitate it, 8 times as slow."""
    imitated = not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return "float32" if imitated and pick_device(device).type == "cpu" else "bfloat16"


def load_backbone(
    name: str, task: Task = "causal", *, device: str = "auto", dtype: str = "float32", num_labels: int | None = 2
) -> Backbone:
    """Load the base model `name` (bundled, wheel, Hub id or folder) for a task, frozen, in eval mode.

    A classifier's head is new, or the model's own of as many labels, and takes its weights from an adapter or from
    training; with `num_labels` None model and head are as they were saved. Raises UserError where the name is unknown,
    the model is of another kind than the task needs, or its folder lacks weights.
    """
    import transformers

    from .quick_layers import quicken_layers

    entry = resolve(name)
    kinds, needs = NEEDS[task]
    if entry.kind not in kinds:
        raise UserError(f"model {name}: is of kind {entry.kind}, but this job needs {needs}")
    source = str(entry.path)
    auto: Any = {
        "causal": transformers.AutoModelForCausalLM,
        "classifier": transformers.AutoModelForSequenceClassification,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }[task]
    tokenizer = load_tokenizer(name, source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    new_head = task == "classifier" and num_labels is not None
    options = {"num_labels": num_labels, "pad_token_id": tokenizer.pad_token_id, "ignore_mismatched_sizes": True}
    with _readable(name, source), quiet_loading():
        model, told = auto.from_pretrained(
            source, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **CODELESS,
            **(options if new_head else {}),
        )
    own = f"{model.base_model_prefix}." if new_head else ""
    lacking = {*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])}
    if missing := sorted(key for key in lacking if key.startswith(own)):
        raise UserError(f"model {name}: the weights in {source} lack {missing[0]} ({len(missing)} missing); restore it")
    if num_labels is None:
        _require_sound(name, model, tokenizer)
    quicken_layers(model).requires_grad_(False).eval()
    keep_freed_memory()
    return Backbone(name, model.to(pick_device(device)), tokenizer, fingerprint(trunk(model)))


def _require_sound(name: str, model: Any, tokenizer: Any) -> None:
    """UserError for a model of other hands that would end in the middle of the work, or answer with NaN."""
    words, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    if words > rows:
        raise UserError(f"model {name}: its tokenizer has {words} tokens, and the model {rows}; save its own with it")
    if bad := not_finite(dict(model.named_parameters())):
        raise UserError(f"model {name}: {bad[0]} holds numbers that are not finite ({len(bad)} such tensors)")


def load_tokenizer(name: str, source: str) -> Any:
    """The tokenizer in the folder `source` of the model `name`. Of none there, transformers makes an empty one."""
    import transformers

    if not any(TOKENIZER_FILE.match(file.name) for file in Path(source).iterdir()):
        raise UserError(f"model {name}: {source} holds no tokenizer; tokenizer.save_pretrained puts it there")
    with _readable(name, source):
        return transformers.AutoTokenizer.from_pretrained(source, **CODELESS)


@contextmanager
def _readable(name: str, source: str) -> Iterator[None]:
    """UserError for a folder that cannot be read; of a damaged one, transformers tells by errors of many kinds."""
    try:
        yield
    except Exception as error:
        told = str(error).strip().partition("\n")[0][:200] if type(error) in (OSError, ValueError) else brief(error)
        raise UserError(
            f"model {name}: cannot be read from {source} ({told}); fetch it again, or use another; code that a "
            "model brings is never run"
        ) from error


def trunk(model: nn.Module) -> nn.Module:
    """The transformer under a task head (GPT2Model under GPT2LMHeadModel); a T5 has no name for it and is its own.

    A PeftModel is asked for its base first: of a Llama-class one, `model` would be the whole model, head and all.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    base = unwrap() if unwrap else model  # the LoRA layers stay in it
    name: Any = getattr(base, "base_model_prefix", None)
    return getattr(base, name, base) if name else base


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that name a base's weights: parameter names, shapes, and 16 values of each, rounded to bfloat16.

    Cheap and the same whatever dtype the base is loaded in. It tells bases apart; it is not a defence against
    someone who forges one.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        step = max(1, value.numel() // 16)
        sample = value.detach().flatten()[::step][:16].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def causal_logits(model: nn.Module, input_ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    """Logits (B, keep, V) that predict the last `keep` tokens of each row: [:, t] predicts token T - keep + t.

    input_ids, mask: (B, T), padded on the left (on the right only behind the tokens of interest). Positions are
    explicit, so padding changes nothing.
    """
    logits: Tensor = model(**_inputs(input_ids, mask), logits_to_keep=_before(input_ids, keep)).logits
    return logits


def causal_logits_and_states(
    model: nn.Module, input_ids: Tensor, mask: Tensor, keep: int
) -> tuple[Tensor, Tensor]:
    """As `causal_logits`, with the final states (B, keep, D) that those logits are read from."""
    output = model(**_inputs(input_ids, mask), logits_to_keep=_before(input_ids, keep), output_hidden_states=True)
    return output.logits, output.hidden_states[-1][:, -keep - 1 : -1]


def causal_states(model: nn.Module, input_ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    """Only the final states (B, keep, D): no logits are computed."""
    states: Tensor = trunk(model)(**_inputs(input_ids, mask)).last_hidden_state
    return states[:, -keep - 1 : -1]


@torch.no_grad()
def unembedding(model: Any) -> Tensor | None:
    """The weight (V, D) by which `model` makes logits of its final states, where that product is all it does to them.

    None for a head with a bias, and for a model that scales or caps its logits: it is asked, by a pass of two tokens
    without dropout.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return None
    ids = torch.arange(2, device=head.weight.device).view(1, 2)
    inputs = _inputs(ids, torch.ones_like(ids, dtype=torch.bool))
    training = [module for module in model.modules() if module.training]
    model.eval()
    plain = torch.equal(model(**inputs).logits, head(trunk(model)(**inputs).last_hidden_state))
    for module in training:
        module.training = True
    return head.weight if plain else None


def last_states(model: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
    """The final state (B, D) at each row's last real token, whatever the padding side. No logits are computed."""
    return at_last(trunk(model)(**_inputs(input_ids, mask)).last_hidden_state, mask)


def at_last(states: Tensor, mask: Tensor) -> Tensor:
    """Of states (B, T, D) those at each row's last real token, (B, D)."""
    return states[torch.arange(len(states), device=states.device), last_true(mask)]


def _before(input_ids: Tensor, keep: int) -> Tensor:
    """The positions that predict the last `keep` tokens."""
    last = input_ids.shape[1] - 1
    return torch.arange(last - keep, last, device=input_ids.device)


def _inputs(input_ids: Tensor, mask: Tensor) -> dict[str, Any]:
    return {
        "input_ids": input_ids,
        "attention_mask": mask.long(),
        "position_ids": position_ids(mask),
        "use_cache": False,
    }


def parameter_bytes(parameters: Any) -> int:
    """Bytes of distinct tensors (shared storage counts once)."""
    return sum({p.data_ptr(): p.numel() * p.element_size() for p in parameters}.values())


class quiet_loading:
    """Silences transformers' progress bars and "newly initialized" notes for one load: an adapter fills the head."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._level = logging.get_verbosity()
        self._bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        if self._bars:
            logging.enable_progress_bar()
