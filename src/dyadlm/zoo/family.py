"""What a family of models is: its name, its source, how one of a given size is built, or why none is."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from transformers import PreTrainedModel

from dyadlm.errors import UserError

DECODES = ("state", "cache", "nothing")


@dataclass(frozen=True)
class Sizes:
    """Sizes of one model. width: D; layers: L; inner: width of the feed-forward parts, where the family has them;
    vocabulary: V; length: T, tokens of a training text."""

    width: int
    layers: int
    inner: int
    vocabulary: int
    length: int


@dataclass(frozen=True)
class Family:
    """One kind of causal language model.

    name: in commands. item: of the project's list of prior art (`docs/zoo.md`). paper: where it is described. build:
    one model of given sizes, float32, new weights. layers: by default. step: of the width, where a size is solved for.
    has_inner: whether `Sizes.inner` changes it. packages: modules that must be installed. decodes: what it keeps while
    it writes: `state` (of constant size), `cache` (which grows) or `nothing` (it reads the text again). excluded: why
    the family is not compared; it has a row all the same. sized: whether a number of parameters can be asked for.
    """

    name: str
    title: str
    item: str
    paper: str
    build: Callable[[Sizes], PreTrainedModel] | None = None
    layers: int = 5
    step: int = 16
    has_inner: bool = True
    packages: tuple[str, ...] = ()
    decodes: str = "cache"
    excluded: str = ""
    sized: bool = True

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if not _installed(name)]

    def make(self, sizes: Sizes) -> PreTrainedModel:
        """One model. Raises `UserError` where the family is excluded, a package is missing, or what is built is no
        model of transformers."""
        if self.build is None:
            raise UserError(f"{self.name} is not compared: {self.excluded}")
        if self.missing:
            raise UserError(f"{self.name} needs {', '.join(self.missing)}; run: pip install 'dyadlm[zoo]'")
        made = self.build(sizes)
        if not isinstance(made, PreTrainedModel):
            raise UserError(f"{self.name} builds a {type(made).__name__}; build a causal model of transformers.")
        return made

    def require_sound(self) -> None:
        """Raise `UserError` where a field has a value that nothing can be done with."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", self.name):
            raise UserError(
                f"A family has a name of up to 64 letters, digits, dots, dashes and underscores, not {self.name!r}."
            )
        if self.decodes not in DECODES:
            raise UserError(f"What {self.name} decodes from is {', '.join(DECODES)}, not {self.decodes!r}.")
        if self.layers < 1 or self.step < 1:
            raise UserError(f"{self.name} needs at least one layer and a step of at least 1.")


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of a package around it
        return False
