"""Triton's interpreter without what it does in vain: the same results in half the time."""

import dataclasses
import functools

from triton import language as tl
from triton.language.core import is_builtin
from triton.runtime import interpreter

PLUS = (lambda x, y: x + y).__code__.co_code

prepare = interpreter._patch_lang
reduce = interpreter.ReduceOps.apply_impl


@functools.cache
def languages(function):
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def prepare_once(function):
    """The interpreter prepares Triton's language for each call of a function by another, though its caller's is."""
    if any(is_builtin(language.load) for language in languages(function)):
        return prepare(function)
    return interpreter._LangPatchScope() if hasattr(interpreter, "_LangPatchScope") else None


def reduce_at_once(self, inputs):
    """The interpreter leaves sums to NumPy where Triton's own function adds; any other's are made pair by pair."""
    code = getattr(getattr(self.combine_fn, "fn", None), "__code__", None)
    if code is not None and code.co_code == PLUS and inputs[0].dtype == tl.float32:
        return self.sum(inputs[0])
    return reduce(self, inputs)


def make_quick():
    interpreter._patch_lang = prepare_once
    interpreter.ReduceOps.apply_impl = reduce_at_once
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # only then it looks at the sums that it computes once more in 64 bits
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
