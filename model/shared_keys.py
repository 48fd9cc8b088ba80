"""Keys that several methods have in their sections."""

from typing import Any

from pydantic import model_validator

from utils.schema import Count, Index, NotNegative, Number, Positive, Section, Share, key


class PixelLabelKeys(Section):
    """Of `pseudo_labels`: the two backgrounds of the pixel labels, each method's own, and PAR."""

    high: Share
    low: Share
    par_iterations: Index = key(10, "code")
    par_dilations: tuple[Count, ...] = key((1, 2, 4, 8, 12, 24), "code")

    @model_validator(mode="after")
    def _high_is_not_below_low(self) -> "PixelLabelKeys":
        if self.high < self.low:
            self.refuse("high", f"at least pseudo_labels.low = {self.low}")
        return self


class EnergyKeys(Section):
    """Of `loss`: the energy loss."""

    energy_weight: NotNegative = key(1e-7, "code")
    energy_sigma_rgb: Positive = key(15.0, "code")
    energy_sigma_xy: Positive = key(100.0, "code: in full-size pixels")
    energy_scale: Positive = key(0.5, "code")

    @property
    def energy_settings(self) -> dict[str, Any]:
        """These as arguments of `energy_loss`."""
        names = "weight", "sigma_rgb", "sigma_xy", "scale"
        return {name: getattr(self, f"energy_{name}") for name in names}


class AffinityConsistencyWeights(Section):
    """Of `loss.weights`: ACR's terms, which any method with attention can learn from; 0: they are not computed."""

    consistency_affinity: Number = key(0.0, "ours: off; 125 in ACR")

    @property
    def consistent(self) -> bool:
        """Whether the second view is needed."""
        return any(value for name, value in self if name.startswith("consistency_"))


class ConsistencyWeights(AffinityConsistencyWeights):
    consistency_class: Number = key(0.0, "ours: off; 125 in ACR")


class AffinityConsistencyStart(Section):
    """Of `loss.start_after`."""

    consistency_affinity: int = key(-1, "ours")


class ConsistencyStart(AffinityConsistencyStart):
    consistency_class: int = key(-1, "ours")
