"""The families of levels, one kind of window a file."""

from dyadlm.model.levels.family import LevelFamily, LevelFeatures, Weights
from dyadlm.model.levels.nodes import NodeLevels
from dyadlm.model.levels.segments import SegmentLevels
from dyadlm.model.levels.sliding import SlidingLevels

__all__ = ["LevelFamily", "LevelFeatures", "NodeLevels", "SegmentLevels", "SlidingLevels", "Weights"]
