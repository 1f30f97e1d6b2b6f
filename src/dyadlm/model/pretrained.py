"""Loading, saving and initialisation, as transformers asks for them."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init

from dyadlm.errors import UserError
from dyadlm.model.configuration import DyadConfig
from dyadlm.shipped import place_of_model


class DyadPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the models of this family."""

    config: DyadConfig
    config_class = DyadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DyadBlock"]  # noqa: RUF012 - the name and form transformers reads
    _is_stateful = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a name of `dyadlm.shipped` is a model, too.

        Raises:
            UserError: a `device_map` that offloads layers to the CPU's memory or the disk. Such layers get their
                weights when their modules are called, and blocks compute with some weights without that.
        """
        place = None if pretrained_model_name_or_path is None else place_of_model(pretrained_model_name_or_path)
        loaded = super().from_pretrained(place, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        away = next((name for name, part in model.named_parameters() if part.device.type == "meta"), None)
        if away is not None and torch.get_default_device().type != "meta":
            raise UserError(
                f"{away} would be offloaded, which dyadlm models do not support; give a device_map without `disk`, and "
                "without `cpu` beside a GPU, or load a narrower dtype."
            )
        return loaded

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, *given: Any, **options: Any
    ) -> Any:
        """As in transformers, but never reentrant: all blocks read the identity channel, whose graph a reentrant
        checkpoint would free with the first of them."""
        function = partial(gradient_checkpointing_func, use_reentrant=False)
        return super()._set_gradient_checkpointing(enable, function, *given, **options)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the engine's copy of the weights is made again when it is needed."""
        return {name: value for name, value in vars(self).items() if name != "_kept_decoder"}

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
