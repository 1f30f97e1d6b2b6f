"""Other features of a level than the product and pair of its centroids, and the memory of one more segment.

Measured (docs/experiments.md, three paired seeds): the product and pair of the presets are better than the pair alone
by 0.017 nats, and phase transport, the operator of the paper, adds nothing to the pair that it compares.

Dimension letters: R rank, F parts of a feature.
"""

import torch
from torch import Tensor

from dyadlm.model.tower import Tower
from dyadlm.ops.transport import phase_transport


class OtherFeatures(Tower):
    """The parts that `level_feature` names (paper: phase transport of the current against the previous centroid)."""

    def part_count(self, level: int) -> int:
        return len(self.config.feature_parts)

    def parts(self, current: Tensor, previous: Tensor, paired: Tensor) -> list[Tensor]:
        return [self.part(name, current, previous, paired) for name in self.config.feature_parts]

    def part(self, name: str, current: Tensor, previous: Tensor, paired: Tensor) -> Tensor:
        """One named part, (..., R)."""
        if name == "current":
            return current
        if name == "previous":
            return previous
        if name == "product":
            return current * previous
        change = phase_transport(current, previous) if name == "transport" else current - previous
        # With `early=mask` a change needs two complete windows: one from nothing is no change.
        return change * paired if self.config.early == "mask" else change


class LongerMemory(Tower):
    """Semantic levels show the segment before the last one as well (`semantic_memory=2`)."""

    def part_count(self, level: int) -> int:
        return super().part_count(level) + (level >= len(self.alignments))

    def segment_feature(
        self, level: int, current: Tensor, last: Tensor, earlier: Tensor, paired: Tensor, dtype: torch.dtype
    ) -> Tensor:
        return self.joined(level, [*self.parts(current, last, paired), earlier], dtype)
