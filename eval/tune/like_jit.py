"""Compile kernels ahead of time, without a GPU, exactly as a launch would compile them."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compile_like_jit(kernel: JITFunction, arguments: dict[str, Any], target: GPUTarget) -> CompiledKernel:
    """Compile ahead of time with exactly the argument specialisation that a launch would give.

    Divisibility by 16 and unit integers come from the JIT's own binder: without them the same kernel shows spills that
    no launch has.
    """
    backend = make_backend(target)
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        **arguments
    )
    packed = kernel._pack_args(backend, options, bound, specialization, options)
    parsed, signature, constexprs, attributes = packed
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_type(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=dict(parsed.__dict__))
