"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685): small matrices beside frozen weights, in a folder of their own.

Training adds one to a model and saves nothing else. Whoever reads the folder gets the base model with the adapter
merged into its weights: an ordinary model of the same size and speed. The work is done by peft.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from dyadlm.errors import UserError
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.extension import COMPANIONS
from dyadlm.registration import LORA_TARGETS
from dyadlm.shipped import place_of_model
from dyadlm.state_file import weights_identity

if TYPE_CHECKING:
    import numpy as np
    from peft import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# In the header of the weights: which base they were trained beside (`weights_identity`).
BASE_IDENTITY = "base_weights"


def require_peft() -> None:
    """Raise `UserError` where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(
            "LoRA adapters need the package peft, which is not installed; pip install 'dyadlm[peft]'."
        ) from error


def add_adapter(model: PreTrainedModel, base: str, rank: int, alpha: float, dropout: float) -> list[str]:
    """Freeze a model and put a new adapter beside its linear maps. Returns the names of these maps' kinds.

    base: the folder of the model's weights or its name, to be kept with the adapter. alpha: the adapter's product is
    scaled by alpha / rank. In dyadlm models `LORA_TARGETS` are adapted, in others all linear maps but the output's.
    """
    require_peft()
    from peft import LoraConfig

    targets: list[str] | str = list(LORA_TARGETS) if isinstance(model.config, DyadConfig) else "all-linear"
    options: Any = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets}
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    identity = _identity(model)
    model.add_adapter(config)
    config = _adapter_of(model)
    config.base_model_name_or_path = str(Path(place_of_model(base)).resolve())  # peft would ask the hub for a name
    cast(Any, model).adapter_base_identity = identity
    return sorted({name.rpartition(".")[2] for name in config.target_modules or ()})


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether `add_adapter` was called on the model."""
    return hasattr(model, "adapter_base_identity")


def adapter_parameters(model: PreTrainedModel) -> int:
    """How many parameters the adapter of a model has; 0 where there is none."""
    if not is_adapted(model):
        return 0
    trained = {name: weight for name, weight in model.named_parameters() if not name.startswith(COMPANIONS)}
    return sum(weight.numel() for weight in trained.values() if weight.requires_grad)


def base_identity(model: PreTrainedModel) -> str:
    """What tells the frozen weights of an adapted model from those of others."""
    return cast(str, cast(Any, model).adapter_base_identity)


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write `ADAPTER_CONFIG` and `ADAPTER_WEIGHTS`, in the form of peft; the base's identity stands in the header."""
    adapter: dict[str, torch.Tensor] = model.get_adapter_state_dict()
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt", BASE_IDENTITY: base_identity(model)})
    config = _adapter_of(model)
    training, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = training


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Read what `save_adapter` wrote into a model with an adapter of the same form. Raises `UserError` otherwise."""
    from peft import set_peft_model_state_dict

    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / ADAPTER_WEIGHTS} cannot be read ({error}); take another checkpoint.") from error
    own = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    wanted = {name: tensor.shape for name, tensor in model.get_adapter_state_dict().items()}
    if {name: tensor.shape for name, tensor in own.items()} != wanted:
        raise UserError(f"The adapter in {folder} is of another form than this run's; take another checkpoint.")
    set_peft_model_state_dict(model, own)


def adapter_folder(path_or_name: str | Path) -> Path | None:
    """The folder of an adapter, downloaded if it is named on the hub; None: it is no adapter.

    Raises `UserError` for an adapter that is not in safetensors, or that stands beside a whole model.
    """
    path_or_name = place_of_model(path_or_name)
    path = Path(path_or_name)
    if path.is_dir() and not (path / ADAPTER_CONFIG).is_file():
        return None
    found = find_adapter_config_file(str(path_or_name))
    if found is None:
        return None
    folder = Path(found).parent
    if not path.is_dir():
        for name in ("config.json", ADAPTER_WEIGHTS):  # the one must not be there, the other has to be
            cached_file(
                str(path_or_name), name, _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )  # fmt: skip
    if (folder / "config.json").is_file():
        raise UserError(
            f"{path_or_name} holds a whole model and an adapter, so that it is not clear which is meant; move "
            f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} into a folder of their own."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{path_or_name} holds no {ADAPTER_WEIGHTS}; save the adapter in safetensors.")
    return folder


def base_of_adapter(path_or_name: str | Path) -> str | None:
    """The folder or name of the base model, if this is an adapter; None: it is none.

    Raises `UserError` for an adapter that cannot be used.
    """
    folder = adapter_folder(path_or_name)
    if folder is None:
        return None
    file = folder / ADAPTER_CONFIG
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        base = fields["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError("it names no base model")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); name the base model in base_model_name_or_path.") from error
    if fields.get("layer_replication"):
        raise UserError(
            f"{file} repeats layers of its base, which is not supported; merge the adapter with peft first."
        )
    if fields.get("megatron_config"):  # peft would import the module that the file names
        raise UserError(f"{file} asks for Megatron, which is not supported; merge it with peft first.")
    return str(folder / base) if not Path(base).is_absolute() and (folder / base).is_dir() else base


def require_kinds(file: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError where a file holds whole numbers for a weight of floating point, which torch would convert."""
    with safe_open(str(file), framework="pt") as saved:
        for name in sorted(weights.keys() & set(saved.keys())):
            kind = saved.get_slice(name).get_dtype()
            if weights[name].is_floating_point() and not kind.startswith(("F", "BF")):
                raise ValueError(f"{name} is {kind}, not of floating point")


def merge_adapter(base: PreTrainedModel, path_or_name: str | Path) -> PreTrainedModel:
    """The base model with the adapter of a folder or name merged into its weights, in evaluation mode.

    base: in the dtype to merge in, best float32. Raises `UserError` if the adapter is none, or of another model.
    """
    require_peft()
    from peft import PeftModel, get_peft_model_state_dict

    folder = adapter_folder(path_or_name)
    assert folder is not None, "the caller knows that it is an adapter"
    file = folder / ADAPTER_WEIGHTS
    _require_same_base(base, file)
    try:
        with warnings.catch_warnings():
            # What matters of them is said in a sentence.
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(base, str(folder))
            with safe_open(str(file), framework="pt") as saved:
                odd = set(saved.keys()) ^ set(get_peft_model_state_dict(adapted))
            require_kinds(file, get_peft_model_state_dict(adapted))
            if odd:
                raise ValueError(f"{min(odd)} is missing on one side")
            _require_mergeable(base)
            merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft, torch and safetensors each have their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"The adapter in {path_or_name} cannot be merged into {base.name_or_path} ({reason}); see that "
            f"base_model_name_or_path in its {ADAPTER_CONFIG} names its base, or merge the two with peft."
        ) from error
    return cast(PreTrainedModel, merged).requires_grad_(True).eval()


def _require_mergeable(adapted: PreTrainedModel) -> None:
    """Raise ValueError where peft would merge into a weight that stands in two places."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tied = getattr(adapted.config, "tie_word_embeddings", False)
    ends = (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    if tied and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ValueError("it changes embeddings that the base uses twice, as input and as output")


def _require_same_base(base: PreTrainedModel, file: Path) -> None:
    try:
        with safe_open(str(file), framework="pt") as saved:
            wanted = (saved.metadata() or {}).get(BASE_IDENTITY)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged ({error}); take another checkpoint.") from error
    if wanted is not None and wanted != _identity(base):
        raise UserError(
            f"The adapter in {file.parent} was trained beside other weights than those of {base.name_or_path}; name "
            f"its base model in base_model_name_or_path of {ADAPTER_CONFIG}."
        )


def _identity(model: PreTrainedModel) -> str:
    """By some numbers of every weight."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def sample(name: str, places: "np.ndarray") -> "np.ndarray":
        flat = weights[name].reshape(-1)
        return flat[torch.from_numpy(places).to(flat.device)].float().cpu().numpy()

    return weights_identity({name: tuple(weight.shape) for name, weight in weights.items()}, sample, every=True)


def _adapter_of(model: PreTrainedModel) -> "LoraConfig":
    return cast("LoraConfig", cast(Any, model).peft_config["default"])
