"""Whether a family is what it says: causal, as many parameters as asked for, and equal when it is read in pieces."""

from dataclasses import dataclass

import torch

from dyadlm.diagnose.audit import Audit, audit
from dyadlm.errors import UserError
from dyadlm.zoo import build
from dyadlm.zoo.families import find_family
from dyadlm.zoo.family import Family
from dyadlm.zoo.sizes import count_parameters

LENGTH = 256


@dataclass(frozen=True)
class Verdict:
    """What was found. parameters: of the model that was to have `wanted`. faults: in sentences; none if it is sound."""

    family: str
    wanted: int
    parameters: int
    audit: Audit
    faults: list[str]


def check(name: str, parameters: int = 1_000_000) -> Verdict:
    """Audit a small model of a family, and build one of the wanted size.

    Raises:
        UserError: no such family, an excluded one, or a missing package.
    """
    family = find_family(name)
    model = build(name, length=LENGTH, **smallest(family))
    if not family.sized:  # counts that have counted nothing say the same of everything
        model.train()(torch.randint(0, 256, (8, LENGTH), generator=torch.Generator().manual_seed(0)))
        model.eval()
    found = audit(model, name)
    faults = [
        f"{each.name}: {each.sentence}"
        for each in found.checks
        if each.status == "failed" and matters(family, each.name)
    ]
    size = 0
    try:
        size = count_parameters(build(name, length=LENGTH, parameters=parameters))
    except UserError as error:
        faults.append(str(error))
    return Verdict(name, parameters, size, found, faults)


def smallest(family: Family) -> dict[str, int]:
    """Sizes of a small model; some families alternate between kinds of layers, or fit wide steps alone."""
    return {"width": max(32, family.step), "layers": 3 if family.name == "griffin" else 2}


def matters(family: Family, check: str) -> bool:
    """Whether a failed check of the audit speaks against comparing the family."""
    return check != "left padding" and (check != "cache" or family.decodes != "nothing")
