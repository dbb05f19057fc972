"""`rwkv convert`: converts weights between formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from rwkv_jax.atomic import refuse_existing
from rwkv_jax.cli.flags import License, PinFlags, Pinned, Quantize, tell_of_state, tokenizer_for
from rwkv_jax.cli.machine import find_devices
from rwkv_jax.config import ConfigError

if TYPE_CHECKING:
    from rwkv_jax.config import ModelConfig
    from rwkv_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert weights to another format; reads official .pth, safetensors, transformers, fla, GGUF and runs."""

    source: tyro.conf.Positional[str]
    """A file or folder of weights, a run folder, or OWNER/NAME[/FILE] on the Hugging Face hub."""
    target: tyro.conf.Positional[Path]
    """FILE.pth, FILE.safetensors, FILE.gguf for llama.cpp (RWKV-6 and 7), or a folder for model.safetensors and the
    tokenizer; must not exist yet."""
    layout: Literal["official", "transformers", "flash-linear-attention", "huggingface"] = "official"
    """Naming of the tensors: transformers reads RWKV-4, flash-linear-attention RWKV-6 and 7; huggingface is that of the
    RWKV organization's folders on the hub, RWKV-7."""
    dtype: Literal["float32", "bfloat16", "float16", "float64", "q8_0"] | None = None
    """dtype to cast tensors to; None keeps them bit for bit. q8_0 is for FILE.gguf: matrices in 8 bits."""
    quantize: Quantize | None = None
    """Quantize matrices, everything else becomes float32; None keeps them as they are. Files in 8 and 4 bits are
    safetensors with official names, which generate, chat and bench read directly."""
    tokenizer: str | None = None
    """Tokenizer to save with the weights: world, bytes or a file; None takes the one saved with the source, and for
    FILE.gguf of a model with 65536 ids World's."""

    with_unused: bool = False
    """Also write layer 0's v0, v1 and v2 of RWKV-7, zeros if the source has none: the official trainer needs them."""

    ema: bool = False
    """Take the averages of a run's weights (training.ema_decay)."""

    resize_vocab: int | None = None
    """Number of ids to give the model: rows of the embedding and the head are cut from the end, or added as the mean of
    all rows. Rows that the tokenizer beside the source uses stay, unless --cut-used."""

    cut_used: bool = False
    """With --resize-vocab, also cut rows of ids that the tokenizer uses."""

    verify: bool = False
    """Compare the source with its checksums first (.pth, safetensors that we wrote), as `rwkv info --verify` does."""

    license: License = None

    pinned: Pinned = dataclasses.field(default_factory=PinFlags)

    def run(self) -> None:
        """Converts, one tensor at a time unless quantizing, and prints what was written."""
        from rwkv_jax.weights.pretrained import convert
        from rwkv_jax.weights.sources import verify_weights

        if self.cut_used and self.resize_vocab is None:
            raise ConfigError("cut_used = True: says which rows --resize-vocab may cut; leave it out")
        place = self.pinned.find(self.source)
        if self.verify and not verify_weights(place):
            raise ConfigError(f"verify = True: {self.source} has no checksums; leave it out")
        if self.quantize is not None:
            model = self._quantize(place, self.quantize)
        else:
            model = convert(
                place,
                self.target,
                layout=self.layout,
                dtype=self.dtype,
                tokenizer=self.tokenizer,
                with_unused=self.with_unused,
                ema=self.ema,
                resize_vocab=self.resize_vocab,
                cut_used=self.cut_used,
                license=self.license,
            )
        print(
            f"{self.target}: {model.title} {model.num_layers} x {model.width}, "
            f"{model.num_parameters() / 1e6:.1f}M parameters, vocabulary {model.vocab_size}, "
            f"{'gguf' if self.target.suffix.lower() == '.gguf' else self.layout} names"
            f"{f', matrices in {self.quantize}' if self.quantize else ''}"
        )
        tell_of_state(self.source, self.target)

    def _quantize(self, place: Path, quantize: Quantize) -> ModelConfig:
        """Loads the quantized model and saves it; rejects what cannot be saved before loading."""
        from rwkv_jax.weights.pretrained import from_pretrained, save_pretrained
        from rwkv_jax.weights.writing import check_license_for

        if self.dtype is not None or self.layout != "official" or self.with_unused:
            raise ConfigError(
                f"quantize = {quantize!r}: decides what tensors are in, and takes official names; leave --dtype, "
                "--layout and --with-unused out"
            )
        if self.resize_vocab is not None:
            raise ConfigError(f"resize_vocab = {self.resize_vocab}: resize first, then quantize that file")
        if self.ema:
            raise ConfigError(f"quantize = {quantize!r}: packs a run's last weights; leave --ema out, or --quantize")
        if self.target.suffix.lower() == ".gguf":
            raise ConfigError(f"quantize = {quantize!r}: GGUF files take --dtype q8_0; leave --quantize out")
        if quantize != "bfloat16" and self.target.suffix.lower() == ".pth":
            raise ConfigError(
                f"quantize = {quantize!r}: .pth files have no place for packed matrices; name FILE.safetensors or a "
                "folder"
            )
        refuse_existing(self.target.expanduser(), label=str(self.target))
        check_license_for(self.target, self.license)
        find_devices()
        tokenizer = self._tokenizer_of_folder(place)  # checked first: loading takes minutes
        model = from_pretrained(place, quantize=quantize)
        save_pretrained(model, self.target, tokenizer=tokenizer, license=self.license, source=place)
        return model.config

    def _tokenizer_of_folder(self, path: Path) -> Tokenizer | None:
        """The tokenizer to save with the weights; None if the target is a file."""
        from rwkv_jax.run_folder import load_run_tokenizer

        if self.target.suffix.lower() in (".pth", ".safetensors"):
            if self.tokenizer is not None:
                raise ConfigError(f"{self.target}: a tokenizer is written beside the weights; name a folder")
            return None
        if not path.is_dir():
            return tokenizer_for(path, self.tokenizer)[0]
        if self.tokenizer is not None:
            raise ConfigError(f"{path}: a run has its own tokenizer; leave --tokenizer out")
        return load_run_tokenizer(path)
