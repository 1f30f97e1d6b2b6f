"""Prior art as causal language models: one builder for each family, all of the size that is asked for.

    from dyadlm import zoo

    model = zoo.build("mamba2", length=256, parameters=1_000_000)

Needs nothing beside dyadlm for most families; `pip install 'dyadlm[zoo]'` for the others (`dyadlm zoo list`).
"""

import torch
from transformers import PreTrainedModel

from dyadlm.errors import UserError
from dyadlm.model.configuration import BYTE_VOCABULARY
from dyadlm.zoo.families import FAMILIES, find_family
from dyadlm.zoo.family import Family, Sizes
from dyadlm.zoo.mixer import Mixer, MixerConfig, MixerForCausalLM, register_mixer
from dyadlm.zoo.sizes import count, count_parameters, default_inner, solve

__all__ = [
    "FAMILIES",
    "Family",
    "Mixer",
    "MixerConfig",
    "MixerForCausalLM",
    "Sizes",
    "build",
    "count",
    "count_parameters",
    "find_family",
    "register_family",
    "register_mixer",
    "solve",
]

WIDTH = 128


def build(
    name: str,
    *,
    length: int,
    parameters: int | None = None,
    layers: int | None = None,
    width: int | None = None,
    vocabulary: int = BYTE_VOCABULARY,
    seed: int = 0,
) -> PreTrainedModel:
    """A new model of a family, float32 on the CPU.

    length: tokens of a training text. parameters: how many the model has, to within 2 %; the width is solved for.
    width: instead of that (128 where neither is given). layers: by default those of the family. seed: of the weights.

    Raises:
        UserError: no such family, an excluded one, a missing package, or no such size.
    """
    family = find_family(name)
    if parameters is not None:
        sizes = solve(family, parameters, layers, vocabulary, length)
    else:
        sizes = Sizes(width or WIDTH, layers or family.layers, default_inner(width or WIDTH), vocabulary, length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.make(sizes).float()


def register_family(family: Family) -> None:
    """Add a family of your own to `FAMILIES`, for `build` and `dyadlm.compare`.

    Each process of a comparison must register it: `dyadlm compare --plugin FILE.py` runs that file in each. With
    `run_study`, call this outside of `if __name__ == "__main__"`, and `run_study` inside.
    Raises `UserError` where the name is taken or cannot be that of a file, or where a field has no such value.
    """
    family.require_sound()
    if FAMILIES.get(family.name, family) != family:
        raise UserError(f"There is a family {family.name!r} already; choose another name.")
    FAMILIES[family.name] = family
