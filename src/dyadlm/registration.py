"""The model among transformers' Auto classes, in whatever order dyadlm and transformers are imported.

Where an Auto class is loaded already, the model is registered at once. Otherwise an import hook waits for the modules
of the Auto classes, and registers the model when they have loaded. The same goes for peft, which is told what LoRA
adapts.
"""

import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def register_configuration() -> None:
    """Make `AutoConfig` know the model."""
    from transformers import AutoConfig

    from dyadlm.model.configuration import DyadConfig

    AutoConfig.register(DyadConfig.model_type, DyadConfig, exist_ok=True)


def register_models() -> None:
    """Make `AutoModel` and `AutoModelForCausalLM` know the model. `dyadlm.model.modeling` calls this at its end."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from dyadlm.model.configuration import DyadConfig
    from dyadlm.model.modeling import DyadForCausalLM, DyadModel

    AutoModel.register(DyadConfig, DyadModel, exist_ok=True)
    AutoModelForCausalLM.register(DyadConfig, DyadForCausalLM, exist_ok=True)
    # By these names Trainer tells whether the targets of label smoothing are to be shifted.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[DyadConfig.model_type] = DyadForCausalLM.__name__


def register_models_unless_loading() -> None:
    """As above, but not amid the import of the model itself, which loads the Auto classes on its way. Then the models
    of the zoo that stand in no library, too."""
    if not any(_is_loading(name) for name in ("dyadlm.model.block", "dyadlm.model.modeling")):
        register_models()
    if not _is_loading("dyadlm.zoo.mixer"):
        from dyadlm.zoo.mixer import register_mixers

        register_mixers()
    if not any(_is_loading(f"dyadlm.zoo.{name}") for name in ("mixer", "kneser_ney")):
        from dyadlm.zoo.kneser_ney import register_kneser_ney

        register_kneser_ney()


def register_adapters() -> None:
    """Let peft know which linear maps LoRA adapts where nobody names any."""
    from peft.utils import constants

    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["dyadlm"] = list(LORA_TARGETS)


LORA_TARGETS = ("gate", "up", "down", "up_tokens")

# What is registered once a module has loaded. The second module imports the first.
REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": register_configuration,
    "transformers.models.auto.modeling_auto": register_models_unless_loading,
    "peft.utils.constants": register_adapters,
}
_search = threading.local()


def when_auto_classes_load() -> None:
    """Register the model with the Auto classes that are loaded, and with the others as soon as they are."""
    if not any(isinstance(finder, _AutoFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoFinder())
    for name, register in REGISTRATIONS.items():
        if name in sys.modules and not _is_loading(name):
            register()


def _is_loading(name: str) -> bool:
    """Whether the import of a module has begun and not ended."""
    module = sys.modules.get(name)
    return module is not None and getattr(module.__spec__, "_initializing", False)


class _AutoFinder(MetaPathFinder):
    """Finds the modules of the Auto classes as the other finders do, and has the model registered afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # The search below comes here again, and is then for the other finders.
        if fullname not in REGISTRATIONS or getattr(_search, "goes_on", False):
            return None
        _search.goes_on = True
        try:
            spec = find_spec(fullname)
        finally:
            _search.goes_on = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads a module as its own loader does, then registers the model."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        REGISTRATIONS[module.__name__]()
