"""Loss on real text: nats per token and bits per byte, alike for every Hugging Face causal language model."""

from dyadlm.data.encoding import prefix_token
from dyadlm.evaluate.evaluation import (
    EvaluationResult,
    evaluate,
    require_same_vocabulary,
    require_vocabulary,
)
from dyadlm.evaluate.streams import Stream

__all__ = [
    "EvaluationResult",
    "Stream",
    "evaluate",
    "prefix_token",
    "require_same_vocabulary",
    "require_vocabulary",
]
