"""Mechanisms that no preset but `paper` uses: subclasses of the core's parts, with what was measured of each.

Importing this package registers them. The order matters where one builds on another: later ones come outermost.
"""

from dyadlm.model.block import DyadBlock
from dyadlm.model.boundaries import LEARNED
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.extras.convolution import Convolved
from dyadlm.model.extras.features import LongerMemory, OtherFeatures
from dyadlm.model.extras.forgetting import Forgetting
from dyadlm.model.extras.gated_delta import GatedDelta
from dyadlm.model.extras.gated_slots import GatedSlots
from dyadlm.model.extras.learned_boundaries import LearnedBoundaries
from dyadlm.model.extras.model_space import ModelSpace
from dyadlm.model.extras.outer_products import OuterProducts
from dyadlm.model.extras.planning import ModelForecasters, ModelPlanner
from dyadlm.model.extras.prefix import PrefixLevels
from dyadlm.model.extras.selector import Deciding, Selected
from dyadlm.model.extras.unweighted import Unweighted
from dyadlm.model.slots import IdentitySlots, plans_alike
from dyadlm.model.tower import Tower
from dyadlm.model.variants import register, register_part


def _has_learned(config: DyadConfig) -> bool:
    return LEARNED in (config.semantic_levels or ())


register(Tower, lambda config: not config.salience, Unweighted)
register(Tower, lambda config: config.level_feature != "product+pair", OtherFeatures)
register(Tower, lambda config: config.semantic_memory > 1, LongerMemory)
register(Tower, lambda config: config.transport_space == "model", ModelSpace)
register(Tower, lambda config: "prefix" in config.alignments, PrefixLevels)
register(Tower, lambda config: config.forgetting, Forgetting)
register(Tower, _has_learned, LearnedBoundaries)
register(Tower, lambda config: "delta" in (config.mixers or ()), GatedDelta)
register(Tower, lambda config: "outer" in (config.mixers or ()), OuterProducts)
register(Tower, lambda config: config.selector != "none", Selected)
register(DyadBlock, lambda config: config.decision_slots, Deciding)
register(DyadBlock, lambda config: "convolution" in (config.mixers or ()), Convolved)
register(IdentitySlots, lambda config: not plans_alike(config), GatedSlots)
register_part("forecasters", lambda config: config.planner != "none", ModelForecasters)
register_part("planner", lambda config: config.planner != "none", ModelPlanner)
