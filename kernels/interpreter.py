"""Triton's interpreter with bfloat16 that rounds as the hardware does, and without work done twice.

The interpreter keeps bfloat16 as its 16 bits and then calculates with these bits as if they were whole
numbers. Here every operation widens to float32 first and rounds to nearest even after.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace as with_fields
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 of the numbers that 16-bit patterns stand for."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(numbers: np.ndarray) -> np.ndarray:
    """16-bit patterns of the nearest bfloat16, ties to even."""
    wide = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = wide.view(np.uint32)
    near = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), near).astype(np.uint16)


def _is_narrow(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widened(handle.data), tl.float32) if _is_narrow(handle) else handle


def _narrow(numbers: np.ndarray) -> TensorHandle:
    return TensorHandle(rounded(numbers), tl.bfloat16)


@contextmanager
def corrected() -> Iterator[None]:
    """Within it the interpreter's operations are right; for checks and tests, never for a run."""
    stack = ExitStack()
    stock: dict[str, Callable[..., Any]] = {}

    def replace(name: str) -> Callable[[Callable[..., Any]], None]:
        def with_function(function: Callable[..., Any]) -> None:
            stock[name] = getattr(InterpreterBuilder, name)
            stack.enter_context(patch.object(InterpreterBuilder, name, function))

        return with_function

    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor: Any, *rest: Any) -> None:
        patch_tensor(tensor, *rest)
        # Triton 3.6 converts an array of one number, which numpy no longer does by itself.
        tensor.__index__ = lambda self: self.handle.data.item()

    stack.enter_context(patch.object(interpreter, "_patch_lang_tensor", with_index))
    _save_time(stack)

    @replace("binary_op")
    def _(self, lhs, rhs, op):
        if not (_is_narrow(lhs) or _is_narrow(rhs)) or op in BITWISE:
            return stock["binary_op"](self, lhs, rhs, op)
        out = op(_wide(lhs).data, _wide(rhs).data)
        return _narrow(out) if out.dtype.kind == "f" else TensorHandle(out, tl.int1)

    @replace("unary_op")
    def _(self, arg, op):
        return _narrow(op(_wide(arg).data)) if _is_narrow(arg) else stock["unary_op"](self, arg, op)

    @replace("ternary_op")
    def _(self, lhs, rhs, other, op):
        # A choice moves bits; only arithmetic needs the numbers.
        if op is np.where or not (_is_narrow(rhs) or _is_narrow(other)):
            return stock["ternary_op"](self, lhs, rhs, other, op)
        return _narrow(op(*(_wide(x).data for x in (lhs, rhs, other))))

    @replace("create_fma")
    def _(self, x, y, z):
        if not _is_narrow(x):
            return stock["create_fma"](self, x, y, z)
        return _narrow(_wide(x).data * _wide(y).data + _wide(z).data)

    @replace("cast_impl")
    def _(self, src, dst_type):
        before, after = src.dtype.scalar, dst_type.scalar
        if (before == tl.bfloat16) == (after == tl.bfloat16):
            return stock["cast_impl"](self, src, dst_type)
        if after == tl.bfloat16:
            return _narrow(np.asarray(src.data).astype(np.float32))
        numbers = widened(src.data)
        return TensorHandle(numbers.astype(interpreter._get_np_dtype(dst_type)), after)

    @replace("create_fp_to_fp")
    def _(self, src, dst_type, rounding_mode):
        before, after = src.dtype.scalar, dst_type.scalar
        if (before == tl.bfloat16) != (after == tl.bfloat16):
            return self.cast_impl(src, dst_type)
        return stock["create_fp_to_fp"](self, src, dst_type, rounding_mode)

    @replace("create_dot")
    def _(self, a, b, d, input_precision, max_num_imprecise_acc):
        # Accumulates in float32, as tensor cores do.
        if not any(x.dtype.scalar in (tl.bfloat16, tl.float16) for x in (a, b)):
            return stock["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
        out = np.matmul(*(_wide(x).data.astype(np.float32) for x in (a, b))) + _wide(d).data
        return _narrow(out) if _is_narrow(d) else TensorHandle(out.astype(d.data.dtype), d.dtype.scalar)

    with stack:
        yield


def _save_time(stack: ExitStack) -> None:
    """Leaves out what the interpreter does anew at every call. Mutates it until the stack ends."""
    # Which attributes of a module are operations is looked up at every call of every device function.
    names: dict[object, list[str]] = {}

    def patch_operations(pkg: Any, builder: Any, *scope: Any) -> None:
        if pkg not in names:
            names[pkg] = [name for name in dir(pkg) if tl.core.is_builtin(getattr(pkg, name, None))]
        for name in names[pkg]:
            member = getattr(pkg, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(pkg, name, member, builder, *scope)

    stack.enter_context(patch.object(interpreter, "_patch_builtin", patch_operations))
    patch_language = interpreter._patch_lang

    def patch_language_once(function: Any) -> Any:
        # A launch has done so for the functions that its kernel calls.
        if tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load):
            return patch_language(function)
        return interpreter._LangPatchScope()

    stack.enter_context(patch.object(interpreter, "_patch_lang", patch_language_once))
    stock_dtype = interpreter._get_np_dtype
    dtype_of_scalar = cache(stock_dtype)

    def dtype_of(kind: Any) -> np.dtype:
        return dtype_of_scalar(kind) if type(kind) is tl.dtype else stock_dtype(kind)

    stack.enter_context(patch.object(interpreter, "_get_np_dtype", dtype_of))
    # Sums and products of integers are computed twice to see an overflow, which small shapes never have.
    builder = interpreter.interpreter_builder
    options = with_fields(builder.options, sanitize_overflow=False)
    stack.enter_context(patch.object(builder, "options", options))
