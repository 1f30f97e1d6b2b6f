"""The models that a study has kept, to be measured further."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from dyadlm.compare.cell import Cell, Recipe, new_model
from dyadlm.compare.content import read_object
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


def load_model(folder: Path, family: str, seed: int = 0) -> PreTrainedModel:
    """The model of a family that a comparison in this folder has trained on the whole budget, in evaluation mode.

    Raises:
        UserError: no study, no such model, or weights that are not its own.
    """
    recipe = load_recipe(folder)
    cells = [cell for cell in kept_cells(folder, family) if cell.seed == seed]
    if not cells:
        raise UserError(f"{folder} has no trained {family} with seed {seed}; train it with `dyadlm compare`.")
    cell = cells[-1]
    file = folder / "cells" / f"{cell.file_name}.safetensors"
    model = new_model(recipe, cell)
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
