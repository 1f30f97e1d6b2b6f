"""Loading, saving and initialisation, as transformers asks for them."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from dyadlm.model.configuration import DyadConfig


class DyadPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the models of this family."""

    config: DyadConfig
    config_class = DyadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DyadBlock"]  # noqa: RUF012 - the name and form transformers reads
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linear maps keep the variance and the embedding is small.

        What a part of ours needs beyond that is in its method `initialize`, called after its children.
        """
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm) and module.weight is not None:
            init.ones_(module.weight)
        elif callable(initialize := getattr(module, "initialize", None)):
            initialize()
