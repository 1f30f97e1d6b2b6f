"""Compiles every kernel for a GPU of compute capability 9.0, which needs none (run by `test_compilation.py`).

What the interpreter takes, the compiler may not. `python compile_program.py` prints one line for each kernel.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dyadlm.kernels import segment_gradients, segments, slot_plan, slot_read, windows
from dyadlm.kernels.stretches import tile_of
from dyadlm.ops.slots import PHI

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
PLAN = {"last": "*i64", "complete": "*i64", "ends": "*i64", "counts": "*fp32", "sums": "*fp32"}
for tokens, written in (("*bf16", "*fp32"), ("*fp16", "*fp16")):
    for rank in (54, 100):
        own = PLAN | {"x": tokens, "features": written, "slope": written, "x_slope": tokens}
        tile = {"rank": rank, **tile_of(rank)}
        compiled(segments._stretches_kernel, POINTERS | own, **tile)
        compiled(segments._features_kernel, POINTERS | own, least=segments.LEAST, **tile)
        compiled(segment_gradients._stretches_kernel, POINTERS | own, **tile)
        compiled(segment_gradients._gradients_kernel, POINTERS | own, **tile)
for way_count, documents in ((8, True), (5, False)):
    own = {"words": "*i64", "index": "*i64", "length": "*i64", "left": "*i64", "keys": "*i32", "kinds": "*i32"}
    own |= {"order": "*i64", "found": "*i1", "column": "*i64", "slot": "*i64", "following": "*i32"}
    tile = {"parts": 2, "rows": slot_plan.ROWS, "num_warps": 4}
    state = {"pending": "*i64", "table_tags": "*i64"}
    compiled(slot_plan._items_kernel, own, pending=None, writes=None, phi=PHI, documents=documents, **tile)
    compiled(slot_plan._items_kernel, own | state | {"writes": "*i1"}, phi=PHI, documents=documents, **tile)
    compiled(slot_plan._plan_kernel, own, pending=None, table_tags=None, ways=way_count, **tile)
    compiled(slot_plan._plan_kernel, own | state, ways=way_count, **tile)
for values, stored in (("*bf16", "*fp32"), ("*fp16", "*fp16")):
    for width, each in ((16, False), (5, True)):
        own = {"found": "*i1", "column": "*i64", "slot": "*i64", "following": "*i32", "stored": stored}
        own |= {"values": values, "recalled": values, "slope": values, "value_slope": values}
        tile = {"own": each, "width": width, "num_warps": 4, **slot_read._tile(width)}
        compiled(slot_read._read_kernel, own, **tile)
        compiled(slot_read._read_kernel, own, **tile | {"slot": None, "stored": None})
        compiled(slot_read._gradients_kernel, own, **tile)
