"""Which class stands for a part of the model: the plain one, with the variants that a configuration asks for.

Parts that a plain model does not have are optional parts: `part_of` makes them where a configuration asks for them.

The core names no variant. The modules in `SOURCES` register them when they are imported, before the first model is
built; each variant is a subclass that changes a method or two.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from torch import nn

from dyadlm.model.configuration import DyadConfig

SOURCES = ["dyadlm.model.extras"]
Part = TypeVar("Part")
Condition = Callable[[DyadConfig], bool]
_registered: list[tuple[type, Condition, type]] = []
_combined: dict[tuple[type, ...], Any] = {}
_parts: dict[str, tuple[Condition, Callable[[DyadConfig], nn.Module]]] = {}


def register(base: type, applies: Condition, variant: type) -> None:
    """Let `variant`, a subclass of `base`, stand for it wherever a configuration says so. Later ones come outermost."""
    _registered.append((base, applies, variant))


def register_part(name: str, applies: Condition, make: Callable[[DyadConfig], nn.Module]) -> None:
    """Let a model have a part of this name wherever a configuration says so."""
    _parts[name] = (applies, make)


def part_of(name: str, config: DyadConfig) -> Any:
    """The optional part of this name, or None for a configuration that does not ask for it."""
    for source in SOURCES:
        import_module(source)
    applies, make = _parts[name]
    return make(config) if applies(config) else None


def variant_of(base: type[Part], config: DyadConfig) -> type[Part]:
    """`base` itself, or the class that combines all variants of it which apply."""
    for source in SOURCES:
        import_module(source)
    kinds = tuple(kind for part, applies, kind in reversed(_registered) if part is base and applies(config))
    if len(kinds) < 2:
        return kinds[0] if kinds else base
    return _combination(base, kinds)


def _combination(base: type, kinds: tuple[type, ...]) -> Any:
    """A class with all of these variants. There is one for each, and pickles find it by what it combines."""
    if kinds not in _combined:

        def reduce(self: Any) -> tuple[Any, ...]:
            return _blank, (base, kinds), self.__getstate__() if hasattr(self, "__getstate__") else vars(self)

        _combined[kinds] = type(base.__name__, kinds, {"__module__": base.__module__, "__reduce__": reduce})
    return _combined[kinds]


def _blank(base: type, kinds: tuple[type, ...]) -> Any:
    kind = _combination(base, kinds)
    return kind.__new__(kind)
