"""``--compile``: torch.compile for what an update computes.

Compiled code is made for one batch shape at a time, and no shape is compiled twice. It draws the noise (masks,
dropout) that the plain code draws, and on GPUs the fast code too: results are the same up to rounding, and a run may
go on with it or without.
"""

from collections.abc import Callable
from typing import Any

import torch

from wav2vec2.errors import UserError

BACKEND = "inductor"
# Noise from torch's own generators. Inductor's would save little beside the matrix products, and differ.
OPTIONS = {"fallback_random": True}


def check_compiler(accelerator: str) -> None:
    """Check that the machine has what Inductor needs, which would otherwise fail in the first update.

    Args:
        accelerator: "gpu" or "cpu".

    Raises:
        UserError: it has not.
    """
    if accelerator == "gpu":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError(
                "--compile: torch.compile needs Triton and a GPU that it supports (compute capability 7.0 or above), "
                "which this installation has not; leave out --compile"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # of several kinds, none of them public
        raise UserError(
            f"--compile: torch.compile needs a C++ compiler, which is not found ({type(error).__name__}); install g++, "
            "name one in CXX, or leave out --compile"
        ) from error


def compiled(function: Callable[..., Any], num_shapes: int) -> Callable[..., Any]:
    """``function``, compiled anew for each shape of its inputs, as one graph without a way back to Python.

    Args:
        function: to be compiled.
        num_shapes: how many shapes of batches there will be.
    """
    # Beyond its limit torch gives up. With room to spare, a shape too many shows in the log (compiled_graphs) only.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * num_shapes)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 8 * num_shapes
    )
    # It would cut the graph for the sake of DDP's buckets, which cannot be done where activations are recomputed.
    torch._dynamo.config.optimize_ddp = False
    options = OPTIONS if BACKEND == "inductor" else None
    return torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND, options=options)


def num_compiled_graphs() -> int:
    """Graphs that this process has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
