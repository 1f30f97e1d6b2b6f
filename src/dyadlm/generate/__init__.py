"""Text in, text out, with the state of the model in hand. Names are imported when they are first used."""

from typing import TYPE_CHECKING

from dyadlm.lazy import attach

if TYPE_CHECKING:
    from dyadlm.generate.engine_reader import EngineModel, engine_model
    from dyadlm.generate.pretrained import load_model
    from dyadlm.generate.sampling import Sampling
    from dyadlm.generate.session import Session, generate_text, open_session
    from dyadlm.generate.streaming import Listener, Surprise, lines

__getattr__, __dir__ = attach(
    __name__,
    {
        "EngineModel": "dyadlm.generate.engine_reader",
        "Listener": "dyadlm.generate.streaming",
        "Sampling": "dyadlm.generate.sampling",
        "Session": "dyadlm.generate.session",
        "Surprise": "dyadlm.generate.streaming",
        "engine_model": "dyadlm.generate.engine_reader",
        "generate_text": "dyadlm.generate.session",
        "lines": "dyadlm.generate.streaming",
        "load_model": "dyadlm.generate.pretrained",
        "open_session": "dyadlm.generate.session",
    },
)

__all__ = [
    "EngineModel",
    "Listener",
    "Sampling",
    "Session",
    "Surprise",
    "engine_model",
    "generate_text",
    "lines",
    "load_model",
    "open_session",
]
