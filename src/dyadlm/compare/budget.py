"""How long each model trains: tokens, seconds of one core, or floating-point operations."""

import re
from dataclasses import dataclass
from typing import Literal, cast

from dyadlm.errors import UserError

SUFFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
LARGEST = 1e30
KINDS = ("tokens", "seconds", "flops")
_AMOUNT = re.compile(r"(?P<number>\d+(\.\d*)?(e\+?\d+)?)(?P<suffix>[kMGTP]?)")


def parse_amount(text: str, name: str) -> float:
    """`5M`, `300`, `1e15` as a number. Raises `UserError` for any other text, and for numbers that are not above 0."""
    match = _AMOUNT.fullmatch(text)
    amount = 0.0 if match is None else float(match["number"]) * SUFFIXES[match["suffix"]]
    if not 0 < amount < LARGEST:
        raise UserError(f"{name} is a number above 0, such as 300, 5M or 1e15, not {text!r}.")
    return amount


@dataclass(frozen=True)
class Budget:
    """The same amount for every model. kind: of what."""

    kind: Literal["tokens", "seconds", "flops"]
    amount: float

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """`tokens=5M`, `seconds=300` or `flops=1e15`. Raises `UserError`."""
        kind, equals, amount = text.partition("=")
        if kind not in KINDS or not equals:
            raise UserError(f"A budget is tokens=N, seconds=N or flops=N, such as tokens=5M, not {text!r}.")
        return cls(cast(Literal["tokens", "seconds", "flops"], kind), parse_amount(amount, f"--budget {kind}"))

    def tokens(self, seconds_per_token: float, flops_per_token: float) -> int:
        """How many tokens that is for a model of this speed and cost. Raises `UserError` for one without operations."""
        if self.kind == "flops" and not flops_per_token:
            raise UserError(
                "A family that only counts has no operations to budget; leave it out, or give tokens=N or seconds=N."
            )
        return int(self.amount / {"tokens": 1.0, "seconds": seconds_per_token, "flops": flops_per_token}[self.kind])

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:.15g}"
