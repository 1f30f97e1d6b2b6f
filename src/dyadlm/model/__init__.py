"""What is published with weights: configuration, model, state, and the costs that follow from a configuration."""

from typing import TYPE_CHECKING

from dyadlm.lazy import attach

if TYPE_CHECKING:
    from dyadlm.model.cache import DyadCache
    from dyadlm.model.configuration import DyadConfig
    from dyadlm.model.modeling import DyadForCausalLM, DyadModel
    from dyadlm.model.outputs import DyadOutput
    from dyadlm.model.presets import PRESETS

# The configuration has to load before the model does: transformers loads its own parts in that order
# (`dyadlm.registration`).
__getattr__, __dir__ = attach(
    __name__,
    {
        "PRESETS": "dyadlm.model.presets",
        "DyadCache": "dyadlm.model.cache",
        "DyadConfig": "dyadlm.model.configuration",
        "DyadForCausalLM": "dyadlm.model.modeling",
        "DyadModel": "dyadlm.model.modeling",
        "DyadOutput": "dyadlm.model.outputs",
    },
)

__all__ = ["PRESETS", "DyadCache", "DyadConfig", "DyadForCausalLM", "DyadModel", "DyadOutput"]
