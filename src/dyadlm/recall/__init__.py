"""Synthetic recall and state tracking: exact tasks, any architecture, one sweep for all."""

from dyadlm.recall.models import Reader, build_model, parse_fields
from dyadlm.recall.study import LEARNING_RATES, Cell, Recipe, Study, measure, score, train, wilson
from dyadlm.recall.tasks import TASKS, Task, parse_task

__all__ = [
    "LEARNING_RATES",
    "TASKS",
    "Cell",
    "Reader",
    "Recipe",
    "Study",
    "Task",
    "build_model",
    "measure",
    "parse_fields",
    "parse_task",
    "score",
    "train",
    "wilson",
]
