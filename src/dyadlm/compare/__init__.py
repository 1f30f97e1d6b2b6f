"""Families of models on the same text, by the same trainer, in one command: sizes, tokens and sweeps are equal.

A cell is one model that is trained and scored (`cell`). A study is a sweep of rates for each family, whose best is
settled on the whole budget, and then the seeds at that rate (`study`); its cells run on the cores of a machine or on
a cluster (`dyadlm.workers`). Trained models are kept, to be measured further (`kept`).
"""

from dyadlm.compare.budget import Budget
from dyadlm.compare.cell import Cell, Recipe
from dyadlm.compare.kept import load_model
from dyadlm.compare.study import Study, run_study

__all__ = ["Budget", "Cell", "Recipe", "Study", "load_model", "run_study"]
