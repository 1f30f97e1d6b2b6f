"""What engineer and artist agree on, for one token and in lists.

Dimension letters: V vocabulary.
"""

from collections.abc import Sequence


def consensus(engineer: Sequence[float], artist: Sequence[float], mass: float, weight: float = 1.0) -> list[float]:
    """Probabilities (V,) from those of both (V,): inside the engineer's nucleus of a mass the product, in which the
    artist's have the exponent `weight`, scaled to what the nucleus holds; outside the engineer's."""
    inside: list[int] = []
    held = 0.0
    for token in sorted(range(len(engineer)), key=lambda token: (-engineer[token], token)):
        if held >= mass or engineer[token] == 0.0:
            break
        inside.append(token)
        held += engineer[token]
    agreed = sum(engineer[token] * artist[token] ** weight for token in inside)
    return [
        held * p * q**weight / agreed if token in inside and agreed > 0 else p
        for token, (p, q) in enumerate(zip(engineer, artist, strict=True))
    ]
