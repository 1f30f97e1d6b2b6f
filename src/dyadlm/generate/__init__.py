"""Text in, text out, with the state of the model in hand."""

from dyadlm.generate.loading import load_model
from dyadlm.generate.sampling import Sampling
from dyadlm.generate.session import Session, generate_text, open_session
from dyadlm.generate.streaming import Listener, Surprise, lines

__all__ = ["Listener", "Sampling", "Session", "Surprise", "generate_text", "lines", "load_model", "open_session"]
