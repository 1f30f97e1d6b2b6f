"""Causal language models without attention, on a dyadic pyramid of phase-transported centroids.

`import dyadlm` registers the model with `AutoConfig` and `AutoModelForCausalLM`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dyadlm.errors import RunFailed, UserError
from dyadlm.model import DyadCache, DyadConfig, DyadForCausalLM, DyadModel, DyadOutput
from dyadlm.version import __version__

AutoConfig.register(DyadConfig.model_type, DyadConfig, exist_ok=True)
AutoModel.register(DyadConfig, DyadModel, exist_ok=True)
AutoModelForCausalLM.register(DyadConfig, DyadForCausalLM, exist_ok=True)

__all__ = [
    "DyadCache",
    "DyadConfig",
    "DyadForCausalLM",
    "DyadModel",
    "DyadOutput",
    "RunFailed",
    "UserError",
    "__version__",
]
