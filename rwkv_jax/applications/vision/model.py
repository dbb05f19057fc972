"""An encoder of images: patches and positions to vectors, layers, and a class or the pixels that were taken out.

The layers are RWKV from both ends with Vision-RWKV's shift in two dimensions (arXiv 2403.02308), or a ViT's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from typing_extensions import override

from rwkv_jax.applications.vision.config import VisionConfig
from rwkv_jax.applications.vision.data import ImageBatch, class_names, make_examples
from rwkv_jax.applications.vision.vit import ViT
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.bidirectional import bidirectional_type, mean_over_rows
from rwkv_jax.models.language_model import PartTransform, identity
from rwkv_jax.models.layers import BiasedLinear, Embedding, uniform, wide_dtype
from rwkv_jax.models.transformer import Transformer
from rwkv_jax.training.application import Application, Forward, Losses, classification_losses, part_of
from rwkv_jax.training.examples import Examples


def encoder_type(config: VisionConfig) -> type[LanguageModel]:
    """The class of the layers."""
    own = config.model.spec.load_model_class()
    return ViT if own is Transformer else bidirectional_type(config.model)


def patches_of(image: Array, patch: int) -> Array:
    """[B, Y, X, channels] -> [B, T, patch patch channels], in raster order."""
    return rearrange(image, "B (Y y) (X x) c -> B (Y X) (y x c)", y=patch, x=patch)


class VisionModel(nnx.Module):
    """BiasedLinear of each patch plus its place, layers, and a head."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs, shard_params: PartTransform = identity) -> None:
        model, vision, dtype = config.model, config.vision, config.model.parameter_dtype
        self.vision = vision
        pixels, patches = vision.patch**2, vision.grid[0] * vision.grid[1]
        self.inputs = shard_params(
            "inputs", BiasedLinear(uniform(rngs.params(), (model.width, pixels), pixels**-0.5, dtype))
        )
        # The last one is that of no patch: what is read in the place of one that is taken out.
        self.places = shard_params("places", Embedding(uniform(rngs.params(), (patches + 1, model.width), 0.02, dtype)))
        self.encoder = encoder_type(config)(
            model, rngs=rngs, shard_params=part_of("encoder", shard_params), has_embedding=False, has_head=False
        )
        outputs = pixels if vision.task == "masked" else len(class_names(vision))
        self.head = shard_params("head", BiasedLinear(jnp.zeros((outputs, model.width), dtype)))

    def hidden(self, image: Array, hidden: Array | None = None, forward: Forward | None = None) -> Array:
        """Vectors of the patches of images [B, Y, X, 1]: [B, T, C].

        Args:
          hidden: bool [B, T], patches that are not read.
        """
        forward = forward or Forward()
        pixels = patches_of(jnp.asarray(image, self.encoder.config.dtype), self.vision.patch)
        x = forward.gather_params("inputs", self.inputs)(pixels)
        places = forward.gather_params("places", self.places).weight[...].astype(x.dtype)
        if hidden is not None:
            x = jnp.where(hidden[..., None], places[-1], x)
        options = forward.of_part("encoder")
        x, _ = self.encoder.hidden(None, inputs_embeds=x + places[:-1], grid=self.vision.grid, **options)
        return x

    def __call__(self, image: Array, hidden: Array | None = None, forward: Forward | None = None) -> Array:
        """Logits of classes [B, classes] of images [B, Y, X, 1]; for masked the pixels of patches [B, T, pixels]."""
        forward = forward or Forward()
        x = self.hidden(image, hidden, forward)
        head = forward.gather_params("head", self.head)
        return head(x if self.vision.task == "masked" else mean_over_rows(x, None)).astype(wide_dtype(x.dtype))

    def losses(self, batch: ImageBatch, forward: Forward) -> Losses:
        """Cross-entropy and accuracy, or for masked the squared error of the pixels taken out.

        The latter's metric is the squared error of the mean of what is left, which needs no model.
        """
        found = self(batch.image, batch.hidden, forward)
        if self.vision.task == "classes":
            return classification_losses(found, batch.label)
        patches, out = patches_of(batch.image, self.vision.patch), batch.hidden[..., None]
        left = jnp.mean(patches, axis=(1, 2), where=~out, keepdims=True)

        def error(guess: Array) -> Array:
            return jnp.mean(jnp.square(patches - guess), axis=(1, 2), where=out)

        return Losses(error(found), {"error_of_mean": error(left)})


class VisionApplication(Application):
    """Images."""

    def __init__(self, config: VisionConfig) -> None:
        self.config: VisionConfig = config

    @property
    @override
    def stacks(self) -> Mapping[str, type[LanguageModel]]:
        return {"encoder": encoder_type(self.config)}

    @override
    def new_model(self, rngs: nnx.Rngs, shard_params: PartTransform = identity) -> VisionModel:
        return VisionModel(self.config, rngs, shard_params)

    @override
    def labels(self) -> tuple[str, ...]:
        return class_names(self.config.vision)

    @override
    def examples(self, report: Callable[[str], None]) -> tuple[Examples, Examples]:
        del report
        return make_examples(self.config.vision)
