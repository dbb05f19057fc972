"""Settings of runs that read images."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from rwkv_jax.checks import checker, require_choices, require_positive
from rwkv_jax.config import ApplicationConfig

if TYPE_CHECKING:
    from rwkv_jax.applications.vision.model import VisionApplication


@dataclasses.dataclass(frozen=True)
class Vision:
    """The application's own settings."""

    images: Literal["digits", "lines"] = "digits"
    """What is seen: digits, 1797 written ones of 8 x 8 pixels that scikit-learn ships; lines in four directions with
    noise, made by a formula, of any size."""
    size: int = 8
    """Pixels a side; 8 for digits."""
    patch: int = 2
    """Pixels a side of a patch, which divides the size."""
    task: Literal["classes", "masked"] = "classes"
    """What is learned: the image's class, or the pixels of patches that were taken out (pretraining without labels)."""
    masked_share: float = 0.5
    """Share of the patches that are taken out for masked."""
    shift: int = 1
    """Pixels by which an image is moved at most in training, in each direction; 0 moves none."""
    num_examples: int = 512
    """Lines to train on, at least 2, and half as many to hold out; digits are as many as there are."""

    def __post_init__(self) -> None:
        require_choices(self, "vision")
        require_positive(self, "vision", "size", "patch", "num_examples")
        check = checker(self, "vision")
        check(self.size % self.patch == 0, "patch", f"must divide vision.size = {self.size}")
        check(self.images != "digits" or self.size == 8, "size", "digits have 8 pixels a side")
        check(self.images != "lines" or self.num_examples > 1, "num_examples", "must be at least 2: half are held out")
        check(0 < self.masked_share < 1, "masked_share", "must lie between 0 and 1")
        check(0 <= self.shift < self.size, "shift", "must lie from 0 to vision.size - 1")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size // self.patch, self.size // self.patch


@dataclasses.dataclass(frozen=True)
class VisionConfig(ApplicationConfig):
    """A run that reads images with RWKV from both ends, or with `model.architecture` "transformer" a ViT."""

    application = "vision"
    section = "vision"

    vision: Vision = dataclasses.field(default_factory=Vision)

    def __post_init__(self) -> None:
        super().__post_init__()
        patches = self.vision.grid[0] * self.vision.grid[1]
        checker(self)(
            self.training.sequence_length == patches,
            "training.sequence_length",
            f"an image has {patches} patches; set it to {patches}, or change vision.size or vision.patch",
        )

    @override
    def load_application(self) -> VisionApplication:
        from rwkv_jax.applications.vision.model import VisionApplication

        return VisionApplication(self)
