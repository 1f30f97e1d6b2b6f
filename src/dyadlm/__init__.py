"""Causal language models without attention, on a causal pyramid of centroids over the past.

`import dyadlm` makes the model known to `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`. It loads neither torch
nor transformers: a name below is imported when it is first used.
"""

from typing import TYPE_CHECKING

from dyadlm import registration
from dyadlm.errors import RunFailed, UserError
from dyadlm.lazy import attach
from dyadlm.version import __version__

if TYPE_CHECKING:
    from dyadlm.model import DyadCache, DyadConfig, DyadForCausalLM, DyadModel, DyadOutput

__getattr__, __dir__ = attach(
    __name__,
    dict.fromkeys(("DyadCache", "DyadConfig", "DyadForCausalLM", "DyadModel", "DyadOutput"), "dyadlm.model"),
)
registration.when_auto_classes_load()

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
