"""Models behind HTTP: the API of OpenAI, and sessions whose state has constant size. Names are imported when used.

The packages of the extra `serve` are imported where they are used: none of them is needed before `app` and `running`.
"""

from typing import TYPE_CHECKING

from dyadlm.lazy import attach

if TYPE_CHECKING:
    from dyadlm.serve.app import create_app
    from dyadlm.serve.running import run
    from dyadlm.serve.served import ServedModel
    from dyadlm.serve.settings import Limits

__getattr__, __dir__ = attach(
    __name__,
    {
        "Limits": "dyadlm.serve.settings",
        "ServedModel": "dyadlm.serve.served",
        "create_app": "dyadlm.serve.app",
        "run": "dyadlm.serve.running",
    },
)

__all__ = ["Limits", "ServedModel", "create_app", "run"]
