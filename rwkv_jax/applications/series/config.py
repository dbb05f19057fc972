"""Settings of runs that forecast series."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from rwkv_jax.checks import checker, require_choices, require_positive
from rwkv_jax.config import ApplicationConfig

if TYPE_CHECKING:
    from rwkv_jax.applications.series.model import SeriesApplication


@dataclasses.dataclass(frozen=True)
class Series:
    """The application's own settings; what the model reads at once, `training.sequence_length`, is a row's patches."""

    source: str = "sunspots"
    """A data set of statsmodels, sunspots (yearly), co2 (weekly, with gaps), elnino (monthly) or macrodata (quarterly,
    12 channels); waves, made by a formula; or the path of a .csv file with a header, of which each column of numbers is
    a channel and what is empty is missing."""
    kind: Literal["layers", "dlinear"] = "layers"
    """Layers of `model` over patches, or DLinear: a linear map each of the moving average and of the rest, which reads
    nothing of `model` but parameter_dtype."""
    horizon: int = 11
    """Steps that are forecast."""
    patch: int = 12
    """Steps of a patch."""
    stride: int = 4
    """Steps from one patch to the next, at most `patch`."""
    gaps: bool = True
    """Whether the model also reads how long ago each value was observed; DLinear does not."""
    validation: float = 0.15
    """Share of the steps that is held out, after those trained on."""
    test: float = 0.2
    """Share of the steps that no run reads, after those held out."""

    def __post_init__(self) -> None:
        require_choices(self, "series")
        require_positive(self, "series", "horizon", "patch", "stride")
        check = checker(self, "series")
        check(
            self.stride <= self.patch, "stride", f"must be at most series.patch = {self.patch}, or steps are left out"
        )
        check(self.gaps or self.kind == "layers", "gaps", "dlinear reads none in any case; leave it out")
        check(0 < self.validation < 1, "validation", "must lie between 0 and 1")
        check(0 < self.test < 1, "test", "must lie between 0 and 1")
        check(self.validation + self.test < 1, "test", "must leave steps to train on, with series.validation")


@dataclasses.dataclass(frozen=True)
class SeriesConfig(ApplicationConfig):
    """A run that learns to forecast each channel of a series from a window of its past."""

    application = "series"
    section = "series"

    series: Series = dataclasses.field(default_factory=Series)

    @property
    def window(self) -> int:
        """Steps of the past that a forecast reads."""
        return self.series.patch + (self.training.sequence_length - 1) * self.series.stride

    @override
    def load_application(self) -> SeriesApplication:
        from rwkv_jax.applications.series.model import SeriesApplication

        return SeriesApplication(self)
