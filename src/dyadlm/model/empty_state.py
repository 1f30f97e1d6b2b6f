"""What the state of a model looks like: the names, shapes and dtypes that a file has to have."""

import json
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dyadlm.model.boundaries import Boundaries
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.modeling import DyadForCausalLM
from dyadlm.state_file import weights_identity


def empty_state(config: DyadConfig) -> dict[str, np.ndarray]:
    """The tensors of one row by name; their numbers mean nothing. They are those of a model of zeros after a token."""
    return _empty_state(json.dumps(config.to_dict(), sort_keys=True, default=str))


@lru_cache(maxsize=4)
def _empty_state(fields: str) -> dict[str, np.ndarray]:
    config = DyadConfig.from_dict(json.loads(fields))
    with torch.device("meta"):
        model: Any = DyadForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            tensor.zero_()
        for part in model.modules():
            if isinstance(part, Boundaries):
                part.known = True  # which tokens begin what means nothing here
        cache = model(torch.zeros(1, 1, dtype=torch.long), use_cache=True, logits_to_keep=1).past_key_values
    return {name: tensor.numpy() for name, tensor in cache.tensors().items()}


def identity_of(model: PreTrainedModel) -> str:
    """What tells the weights of a model from those of others, for `DyadCache.save` and `load`, in any dtype."""
    tensors = model.state_dict()
    others = not isinstance(model, DyadForCausalLM)

    def sample(name: str, places: np.ndarray) -> np.ndarray:
        flat = tensors[name].detach().reshape(-1)
        return np.asarray(flat[torch.from_numpy(places).to(flat.device)].float().cpu().numpy())

    return weights_identity({name: tuple(tensor.shape) for name, tensor in tensors.items()}, sample, every=others)
