"""What a family of models is: its name, its source, how one of a given size is built, or why none is."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from transformers import PreTrainedModel

from dyadlm.errors import UserError


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
        return [name for name in self.packages if find_spec(name) is None]

    def make(self, sizes: Sizes) -> PreTrainedModel:
        """One model. Raises `UserError` where the family is excluded, or a package is missing."""
        if self.build is None:
            raise UserError(f"{self.name} is not compared: {self.excluded}")
        if self.missing:
            raise UserError(f"{self.name} needs {', '.join(self.missing)}; run: pip install 'dyadlm[zoo]'")
        return self.build(sizes)
