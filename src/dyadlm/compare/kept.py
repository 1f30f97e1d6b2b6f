"""The models that a study has kept, to be measured further."""

import math
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from dyadlm.compare.cell import Cell, Recipe, new_model
from dyadlm.compare.content import is_whole, read_object
from dyadlm.compare.study import EARLIER, RECIPE
from dyadlm.errors import UserError, first_line


def load_recipe(folder: Path) -> Recipe:
    """What the models of a study share. Raises `UserError` where the folder holds no study."""
    try:
        content = EARLIER | read_object(folder / RECIPE)
        fields = {name: content[name] for name in Recipe.__dataclass_fields__}
    except (UserError, KeyError) as error:
        raise UserError(f"{folder} holds no study ({error}); name the --output of `dyadlm compare`.") from error
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Recipe(**fields | lists)


def kept_cells(folder: Path, family: str) -> list[Cell]:
    """The cells of a family that were trained on the whole budget, by seed. Raises `UserError` where one is damaged."""
    found = []
    for file in sorted((folder / "cells").glob(f"{family}_final_*.json")):
        try:
            cell = Cell(**read_object(file)["cell"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}); run the same comparison again without it.") from error
        if cell.family == family and cell.final:
            found.append(cell)
    return sorted(found, key=lambda cell: (cell.seed, cell.tokens, cell.rate))


def taken_cells(folder: Path, family: str) -> list[Cell]:
    """Those of the kept cells that a study's figures are of, by seed: of the largest budget, at the rate that was best
    with the first seed."""
    cells = kept_cells(folder, family)
    largest = [cell for cell in cells if cell.tokens == max(one.tokens for one in cells)]
    first = [cell for cell in largest if cell.seed == largest[0].seed]
    rate = min(first, key=partial(_loss, folder)).rate if first else None
    return [cell for cell in largest if cell.rate == rate]


def _loss(folder: Path, cell: Cell) -> float:
    content = read_object(folder / "cells" / f"{cell.file_name}.json")
    if not is_whole(cell, content):
        raise UserError(f"{cell} in {folder} is damaged; run the same comparison again without it.")
    return math.inf if content.get("diverged") else float(content["scores"]["fresh"]["nats"])


def load_model(folder: Path, family: str, seed: int = 0) -> PreTrainedModel:
    """The model of a family that a comparison in this folder has trained on the whole budget, in evaluation mode.

    Raises:
        UserError: no study, no such model, or weights that are not its own.
    """
    load_recipe(folder)  # raises
    cells = [cell for cell in taken_cells(folder, family) if cell.seed == seed]
    if not cells:
        raise UserError(f"{folder} has no trained {family} with seed {seed}; train it with `dyadlm compare`.")
    return load_cell(folder, cells[0])


def load_cell(folder: Path, cell: Cell) -> PreTrainedModel:
    """The model of one of the kept cells, as `load_model`."""
    file = folder / "cells" / f"{cell.file_name}.safetensors"
    model = new_model(load_recipe(folder), cell)
    try:
        missing, unexpected = model.load_state_dict(load_file(file), strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{file} does not hold the weights of {cell} ({first_line(error)}).") from error
    own = {parameter.data_ptr() for name, parameter in model.named_parameters() if name not in missing}
    lost = [name for name, tensor in model.state_dict().items() if name in missing and tensor.data_ptr() not in own]
    if lost or unexpected:
        raise UserError(f"{file} does not hold the weights of {cell} ({', '.join([*lost, *unexpected][:3])}).")
    model.train(False)
    return model
