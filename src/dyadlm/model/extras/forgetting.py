"""Open segments that forget at a rate that depends on the token (`forgetting=True`).

Measured (docs/experiments.md, one seed, 1.5M tokens): +0.002 nats on fresh text, no gain.

Dimension letters: B batch, T time, D width.
"""

from torch import Tensor, nn
from transformers import initialization as init

from dyadlm.model.configuration import DyadConfig
from dyadlm.model.levels import Weights
from dyadlm.model.tower import Tower
from dyadlm.ops.clock import accumulator


class Forgetting(Tower):
    """What a segment keeps at a token is the sigmoid of a linear map of it; at first almost all."""

    forgets = True

    def build_read(self, config: DyadConfig) -> None:
        super().build_read(config)
        self.forgetting = nn.Linear(config.hidden_size, len(self.by_rule) + len(self.learned))

    def initialize(self) -> None:
        super().initialize()
        if hasattr(self, "forgetting"):
            init.zeros_(self.forgetting.weight)
            init.constant_(self.forgetting.bias, -5.0)

    def weight_count(self) -> int:
        return super().weight_count() + self.forgetting.out_features

    def weights(self, x: Tensor) -> list[Weights]:
        kept = -nn.functional.softplus(accumulator(self.forgetting(x)))
        return [weights._replace(log_keep=kept) for weights in super().weights(x)]
