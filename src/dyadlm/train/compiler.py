"""torch.compile: what it needs, and a sentence in place of its errors."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from dyadlm.errors import RunFailed, UserError, first_line


def require_compiler(option: str = "train.compile") -> None:
    """Raise `UserError` where torch.compile would find no compiler of C++, which it needs on a CPU. option: what asks
    for it."""
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else ["g++", "clang++", "c++"])):
        raise UserError(
            f"{option} needs a C++ compiler, and there is none here; install one (g++ or clang++), "
            f"or leave {option} out."
        )


@contextlib.contextmanager
def compiling(option: str = "train.compile", kind: type[UserError] | type[RunFailed] = RunFailed) -> Iterator[None]:
    """Around what compiles a model and runs it: without masked ends of rows, and with errors of the compiler as one
    sentence, an error of that kind."""
    from torch._dynamo.exc import TorchDynamoException  # slow to import
    from torch._inductor import config

    # The last elements of a row may be computed in vectors with a mask. In torch 2.13 on a CPU, gradients of a Mamba-2
    # with 360 channels in bfloat16 are then wrong, or NaN: two channels are read from memory that nothing has written.
    scalar_ends = {"cpp.enable_loop_tail_vec": False} if hasattr(config.cpp, "enable_loop_tail_vec") else {}
    try:
        with config.patch(scalar_ends):
            yield
    except TorchDynamoException as error:
        raise kind(f"torch.compile cannot take this model here ({first_line(error)}); leave {option} out.") from error
