"""Triton's interpreter made trustworthy: products, and bfloat16, which numpy does not know (Triton keeps its bits as uint16).

Unpatched, `tl.dot` of bfloat16 multiplies those integers, and a cast from float32 cuts bits off instead of rounding. What else
the kernels do with bfloat16 (load, store, transpose, cast to float32) only moves bits. Products of float32 come from a BLAS
that adds up in another order for every shape: on tiny shapes that alone exceeds the tolerance now and then. Triton 3.6 makes
loop bounds of arrays with one element, which numpy refuses from 2.4 on. And most of its time goes into patching `tl` anew at
every call of a function and tables of dtypes made anew, here once for the process, and into overflows, which it computes for
every sum and then does not report.
"""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def trust_interpreter() -> None:
    """Patches the interpreter of this process: products in float64, casts to bfloat16 to the nearest even, bounds, time."""
    cast, convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    np_dtypes, make_np_dtype = {}, interpreter._get_np_dtype

    def create_dot(self, a, b, accumulator, *precision):
        a, b = (cast(self, x, tl.float32).data if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        product = a.astype(np.float64) @ b.astype(np.float64) + accumulator.data
        return TensorHandle(product.astype(accumulator.data.dtype), accumulator.dtype.scalar)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(nearest_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    def np_dtype(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = make_np_dtype(dtype)
        return np_dtypes[name]

    interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    tl.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    interpreter._get_np_dtype = np_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
