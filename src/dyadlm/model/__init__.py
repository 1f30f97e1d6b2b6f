"""What is published with weights: configuration, model, state, and the costs that follow from a configuration."""

import dyadlm.model.extras  # noqa: F401 - registers the variants
from dyadlm.model.cache import DyadCache
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.modeling import DyadForCausalLM, DyadModel
from dyadlm.model.outputs import DyadOutput
from dyadlm.model.presets import PRESETS

__all__ = ["PRESETS", "DyadCache", "DyadConfig", "DyadForCausalLM", "DyadModel", "DyadOutput"]
