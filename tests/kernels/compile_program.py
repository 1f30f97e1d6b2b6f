"""Compiles every kernel for a GPU of compute capability 9.0, which needs none (run by `test_compilation.py`).

What the interpreter takes, the compiler may not. `python compile_program.py` prints one line for each kernel.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dyadlm.kernels import segments, windows

POINTERS = {"index": "*i64", "weight": "*fp32", "scales": "*fp32", "weight_slope": "*fp32"}


def compiled(kernel: Any, pointers: dict[str, str], *, num_warps: int, num_stages: int = 3, **constants: Any) -> None:
    """Compile a kernel; arguments that are neither pointers nor constants are int32."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    binary = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    print(kernel.__name__, constants, len(binary.asm["cubin"]))


for tokens, written in (("*bf16", "*fp32"), ("*fp16", "*fp16")):
    for rank, level in ((54, 0), (100, 5)):
        own = {"x": tokens, "features": written, "slope": written, "x_slope": tokens}
        tile = {"rank": rank, "width": 2**level, **windows._tile(rank)}
        shared = {"share": "*fp32", "share_before": "*fp32"}
        compiled(windows._features_kernel, POINTERS | own | shared, **tile)
        compiled(windows._features_kernel, POINTERS | own, share=None, share_before=None, **tile)
        compiled(windows._gradients_kernel, POINTERS | own, **tile)
PLAN = {"last": "*i64", "complete": "*i64", "ends": "*i64", "counts": "*fp32"}
for tokens, written in (("*bf16", "*fp32"), ("*fp16", "*fp16")):
    for rank in (54, 100):
        own = PLAN | {"x": tokens, "features": written, "slope": written, "x_slope": tokens}
        tile = {"rank": rank, **segments._tile(rank)}
        compiled(segments._features_kernel, POINTERS | own, least=segments.LEAST, **tile)
        compiled(segments._gradients_kernel, POINTERS | own, **tile)
