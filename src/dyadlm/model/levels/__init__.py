"""The families of levels, one kind of window a file."""

from dyadlm.model.levels.family import SIDE_BY_SIDE, LevelFamily, LevelFeatures, Weights
from dyadlm.model.levels.nodes import NodeLevels
from dyadlm.model.levels.segments import SegmentLevels
from dyadlm.model.levels.sliding import SlidingLevels

__all__ = ["SIDE_BY_SIDE", "LevelFamily", "LevelFeatures", "NodeLevels", "SegmentLevels", "SlidingLevels", "Weights"]
