"""Adapters that share one base in memory, any weighted sum of them acting; to switch costs no copy of a weight.

A stack is the LoRAs that lie in it, those under its top one included, each a component that is loaded once however many
stacks hold it. Deltas of LoRA add, so a stack is its components at weight 1, and a mix of stacks

    W + sum_k w_k sum_{c in stack k} (alpha_c / r_c) B_c A_c

is its components at the sums of their weights (Hu et al. 2021, section 4.1). No factor is changed or rounded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..data.tokenize import PLAIN_CHAT
from ..errors import UserError
from .adapter_files import load_adapter, load_stack
from .adapters import lora_layers
from .backbone import Backbone, load_backbone
from .catalog import Entry, resolve
from .stacks import PEFT_WEIGHTS, Stack, read_facts, read_stack


@dataclass(frozen=True)
class Loaded:
    """A stack on the base: PEFT names of its components from the base upwards, and the chat template it is asked by.

    `odd`: why it cannot be mixed; empty for plain LoRA.
    """

    parts: tuple[str, ...]
    template: str | None
    odd: str = ""


class Mixer:
    """A frozen base and the stacks loaded on it; `use` says which of them act, on every pass until the next `use`."""

    def __init__(self, backbone: Backbone, shared: bool = True) -> None:
        """`shared`: whether adapters of this base may join; not where `backbone` is a stack that is merged already."""
        self.name, self.tokenizer, self.fingerprint = backbone.name, backbone.tokenizer, backbone.fingerprint
        self.shared = shared
        # Layers with adapters take the place of its own inside this very module, which a sampler may hold.
        self.model: Any = backbone.model
        self.template: str | None = backbone.tokenizer.chat_template
        self.loaded: dict[str, Loaded] = {}
        self._peft: Any = backbone.model
        self._layers: dict[str, Any] = {}
        self._scaling: dict[str, dict[str, float]] = {}  # component -> layer -> alpha / r

    @classmethod
    def open(cls, name: str, device: str = "auto") -> Self:
        """The base under a model or an adapter, the adapter loaded but not yet acting.

        A stack whose delta does not add to others' (DoRA over another adapter, whole layers, prefixes) is merged and is
        a base of its own, which nothing can join. Raises UserError for what is no causal model or stack.
        """
        entry = resolve(name)
        stack = _causal(name, entry)
        if stack is None:
            return cls(load_backbone(name, device=device))
        if _alone(Path(entry.path), stack):
            return cls(load_stack(name, device=device)[0], shared=False)
        mixer = cls(load_backbone(stack.base, device=device))
        mixer.load(name)
        return mixer

    def load(self, name: str) -> Loaded:
        """Load an adapter's stack, unless it is here; it acts from `use` on. Raises UserError naming the adapter."""
        if name in self.loaded:
            return self.loaded[name]
        entry = resolve(name)
        stack = _causal(name, entry)
        if stack is None:
            raise UserError(f"{name}: is a model, not an adapter; `peftlab chat {name}` opens it")
        folder = Path(entry.path)
        reason = "is merged and shares its base with none" if not self.shared else _alone(folder, stack)
        if reason:
            who = name if self.shared else self.name
            raise UserError(f"{name}: cannot join {self.name}: {who} {reason}; open it in a chat of its own")
        if stack.fingerprint and stack.fingerprint != self.fingerprint:
            raise UserError(f"{name}: stands on another base than {self.name}; it was trained on {stack.base}")
        folders = (*stack.under, folder)
        parts = tuple(self._component(place) for place in folders)
        template = PLAIN_CHAT if stack.extra.get("chat_template") == "plain" else self.template
        odd = next(filter(None, map(_odd, folders)), "")
        self.loaded[name] = Loaded(parts, template, odd)
        return self.loaded[name]

    def shares(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The components in a weighted sum of loaded stacks, each with the sum of its weights."""
        found: dict[str, float] = {}
        for name, weight in weights.items():
            for part in self.loaded[name].parts:
                found[part] = found.get(part, 0.0) + weight
        return found

    def use(self, weights: Mapping[str, float]) -> None:
        """Make exactly this weighted sum of loaded stacks act; the bare base for an empty one."""
        shares = self.shares(weights)
        for part, share in shares.items():
            for place, scale in self._scaling[part].items():
                self._layers[place].scaling[part] = scale * share
        for layer in self._layers.values():  # as `activate` does, which walks the whole model to find them
            layer._active_adapter, layer._disable_adapters = list(shares), not shares

    def mix(self, weights: Mapping[str, float]) -> None:
        """Load every stack of a mix. Raises UserError naming one that is not plain LoRA."""
        for name in weights:
            if odd := self.load(name).odd:
                raise UserError(f"mix: {name} {odd}; only plain LoRA can be mixed, and /adapter {name} uses it whole")

    def _component(self, folder: Path) -> str:
        """The PEFT name of an adapter in a folder, by its content; loaded where it is not yet."""
        digest = hashlib.sha256()
        for file in (PEFT_WEIGHTS, "adapter_config.json"):
            digest.update((folder / file).read_bytes())
        part = f"part-{digest.hexdigest()[:16]}"
        if part not in self._scaling:
            self._peft = load_adapter(self._peft, folder, part, self.fingerprint)
            self._layers = lora_layers(self._peft)
            self._scaling[part] = {n: layer.scaling[part] for n, layer in self._layers.items() if part in layer.lora_A}
            self.use({})  # a fresh one acts at once
            self.model.eval()
        return part


def check_member(base: str, name: str, mixed: bool) -> None:
    """UserError where the adapter `name` cannot speak on `base`, alone or `mixed`; hashes are read, no weights load."""
    stack = _causal(name, resolve(name))
    if stack is None:
        raise UserError(f"adapter: {name} is a model; give it as `base`")
    if stack.base != base:
        raise UserError(f"adapter: {name} stands on {stack.base}, not on {base}")
    folder = Path(resolve(name).path)
    if mixed and (odd := _alone(folder, stack) or next(filter(None, map(_odd, (*stack.under, folder))), "")):
        raise UserError(f"mix: {name} {odd}; only plain LoRA can be mixed")


def _causal(name: str, entry: Entry) -> Stack | None:
    """The stack of an adapter that continues text, None of a base model; UserError for anything else."""
    stack = read_stack(Path(entry.path)) if entry.kind == "adapter" else None
    kind = stack.kind if stack else entry.kind
    if kind != "causal":
        raise UserError(f"{name}: is a {kind}, which cannot continue text; try `peftlab predict {name}`")
    return stack


def _odd(folder: Path) -> str:
    """Why the adapter in a folder is not plain LoRA; empty where it is."""
    about = read_facts(folder)
    kinds = {"use_rslora": "uses rsLoRA", "use_dora": "uses DoRA", "lora_bias": "has biases in its LoRA"}
    return next((told for key, told in kinds.items() if about.get(key)), "")


def _alone(folder: Path, stack: Stack) -> str:
    """Why a stack's delta is none that adds to others' on the bare base; empty where it is."""
    for place in (*stack.under, folder):
        about = read_facts(place)
        if about.get("peft_type") != "LORA":
            return f"is {about.get('peft_type')}, not LoRA"
        if about.get("modules_to_save") or about.get("bias", "none") != "none":
            return "trains whole layers or biases of its base"
        # Its magnitudes are those of the weights below it, others merged; of the lowest these are the bare base's.
        if about.get("use_dora") and place != (*stack.under, folder)[0]:
            return "uses DoRA over another adapter"
    return ""
