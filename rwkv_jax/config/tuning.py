"""How a run fine-tunes a model: adapters of its matrices, some of its parameters, or the state it begins with."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rwkv_jax.checks import checker, is_number, is_whole, require_choices

AdapterKind = Literal["lora", "rslora", "dora", "pissa", "miss", "bat"]
"""Equations in `rwkv_jax.models.adapted`."""

TunedQuantization = Literal["int8", "int4", "bfloat16"]
"""Number formats of a frozen base's matrices."""

KINDS_WITH_ALPHA: tuple[AdapterKind, ...] = ("lora", "rslora", "dora")
"""Kinds whose product has a factor, alpha / rank, or alpha / sqrt(rank) for rslora."""

NO_MATRICES = (
    "a state of {} is no matrix for each head, as in RWKV-5, 6 and 7, which alone is tuned; train an adapter instead"
)

OFFICIAL_TARGETS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """What is trained of a model that initial_weights names, its base; with nothing set, all of it."""

    adapter: AdapterKind | None = None
    """Trains small matrices beside frozen ones: lora (arXiv 2106.09685), rslora (2312.03732), dora (2402.09353), pissa
    (2404.02948), miss (DiSHA, Bone) or bat (2409.15371). None trains no adapter."""
    rank: int = 32
    """r of the adapter; the block size for miss and bat, for which twice LoRA's rank has as many parameters."""
    alpha: float | None = None
    """LoRA's product is scaled by alpha / rank, that of rslora by alpha / sqrt(rank). None is the rank. The other kinds
    have no such factor."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are set to zero in training."""
    targets: tuple[str, ...] = OFFICIAL_TARGETS
    """Adapted matrices by their names in a layer, such as att.key, or patterns such as ffn.* of them."""
    layers: tuple[int, ...] = ()
    """Layers that have an adapter, from 0; none given: all."""
    also: tuple[str, ...] = ()
    """Parameters trained in full besides: ln (all norms), time (all small vectors of token shifts, decay and bonus), or
    patterns of official names, such as blocks.*.att.w0."""
    quantize: TunedQuantization | None = None
    """Format of the frozen base's matrices (QLoRA, arXiv 2305.14314); low-rank maps stay in float32."""
    state: bool = False
    """Trains the state in which every text begins: a matrix for each head (RWKV-5, 6 and 7). RWKV-LM: train_type."""
    state_shifts: bool = False
    """Trains the token shifts' part of that state, too."""
    state_rate: float = 0.3
    """Factor on the learning rate of the state: it learns from 3e-4 to 3e-5 at the rates that are the optimizer's
    defaults. Released models of RWKV-7 get worse from 3e-3 on; the official rates of RWKV-6 were 1 to 0.01."""
    initial_state: str | None = None
    """File or run of a tuned state, or file of a text's state, from which the state is trained on; None begins with
    zeros."""
    initial_prompt: str | None = None
    """Text that the model reads first; the state after it is trained on."""
    allow_other_base: bool = False
    """Goes on with a base that is not the one the run was begun with."""
    decay: bool = False
    """Whether optimizer.weight_decay applies to adapters, too."""

    @property
    def is_partial(self) -> bool:
        """Whether a part is trained and the rest, the base, is frozen."""
        return self.adapter is not None or bool(self.also) or self.state

    @property
    def factor(self) -> float:
        """What an adapter's product is scaled by."""
        if self.adapter not in KINDS_WITH_ALPHA:
            return 1.0
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.adapter == "rslora" else self.rank)

    def __post_init__(self) -> None:
        require_choices(self, "tuning")
        check = checker(self, "tuning")
        if self.adapter is None:
            for field in dataclasses.fields(self):
                if field.name in ("rank", "alpha", "dropout", "targets", "layers", "decay"):
                    is_default = getattr(self, field.name) == field.default
                    check(is_default, field.name, "is of an adapter; set tuning.adapter, or leave it out")
        check(is_whole(self.rank) and self.rank >= 1, "rank", "must be a whole number from 1")
        if self.alpha is not None:
            check(is_number(self.alpha) and 0 < self.alpha < float("inf"), "alpha", "must be greater than zero")
            check(
                self.adapter in KINDS_WITH_ALPHA,
                "alpha",
                f"tuning.adapter = {self.adapter!r} has no such factor; leave it out, or take {KINDS_WITH_ALPHA}",
            )
        check(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", "must be from 0 to less than 1")
        check(
            not self.dropout or self.adapter != "bat",
            "dropout",
            "bat changes the matrix itself, so its product has no input of its own; leave it out",
        )
        check(bool(self.targets), "targets", "name at least one matrix, such as att.key, or leave it out")
        for name in ("targets", "also"):
            values = getattr(self, name)
            check(all(values) and len(set(values)) == len(values), name, "must be names, each once")
        valid = all(is_whole(layer) and layer >= 0 for layer in self.layers)
        check(valid and len(set(self.layers)) == len(self.layers), "layers", "must be numbers from 0, each once")
        check(
            self.quantize is None or self.is_partial,
            "quantize",
            "the whole model is trained, so no part can be in another format; set tuning.adapter, or leave it out",
        )
        check(self.state or not self.state_shifts, "state_shifts", "is a part of the state; set tuning.state, too")
        if not self.state:
            for field in dataclasses.fields(self):
                if field.name in ("state_rate", "initial_state", "initial_prompt"):
                    is_default = getattr(self, field.name) == field.default
                    check(is_default, field.name, "is of a tuned state; set tuning.state, too")
        is_rate = is_number(self.state_rate) and 0 < self.state_rate < float("inf")
        check(is_rate, "state_rate", "must be greater than zero")
        check(
            self.initial_state is None or self.initial_prompt is None,
            "initial_prompt",
            "tuning.initial_state is where the state begins; leave one of them out",
        )
        check(self.initial_prompt != "", "initial_prompt", "is empty; give a text, or leave it out")
        check(
            self.is_partial or not self.allow_other_base,
            "allow_other_base",
            "the whole model is trained, and no base stays; leave it out",
        )
