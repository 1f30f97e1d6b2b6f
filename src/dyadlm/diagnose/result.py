"""What a probe finds: figures with units and intervals, curves, and one sentence that reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Better = Literal["lower", "higher", "profile"]  # profile: no direction, to be read as it is


@dataclass(frozen=True)
class Reading:
    """One figure. interval: 95 %, None without anything to resample. note: how to read it, if not plain."""

    value: float
    unit: str
    better: Better
    interval: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """Points of a figure, drawn in the order given. low, high: 95 % interval at each point; of seeds shown as one
    (`pool`), their lowest and highest. log_x, log_y: whether that axis is logarithmic."""

    x: Sequence[float]
    y: Sequence[float]
    x_label: str
    y_label: str
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class ProbeResult:
    """Everything about one probe on one model.

    readings, curves: by name; the first reading is the headline. sentence: one, for people. settings: all that is
    needed to repeat it. not_applicable: why the probe does not apply to this model; there is nothing else then.
    failed: why it could not be run; likewise. left_out: what a small budget cut, in words.
    """

    probe: str
    readings: Mapping[str, Reading] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    sentence: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    not_applicable: str = ""
    failed: str = ""
    left_out: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "ProbeResult":
        """What `to_dict` gave."""
        readings = {
            name: Reading(**{**entry, "interval": tuple(entry["interval"]) if entry["interval"] else None})
            for name, entry in stored["readings"].items()
        }
        curves = {name: Curve(**entry) for name, entry in stored["curves"].items()}
        return cls(**{**stored, "readings": readings, "curves": curves})
