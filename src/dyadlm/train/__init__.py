"""Training: from settings to a model folder, resumable at any moment."""

from dyadlm.train.cost import dry_run
from dyadlm.train.export import export
from dyadlm.train.gpu_plan import plan
from dyadlm.train.interrupt import RunInterrupted
from dyadlm.train.options import NAMESPACES, DataOptions, TrainOptions
from dyadlm.train.run import TrainResult, train
from dyadlm.train.settings import TrainSettings
from dyadlm.train.training_data import TrainingData

__all__ = [
    "NAMESPACES",
    "DataOptions",
    "RunInterrupted",
    "TrainOptions",
    "TrainResult",
    "TrainSettings",
    "TrainingData",
    "dry_run",
    "export",
    "plan",
    "train",
]
