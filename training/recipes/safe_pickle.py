"""An unpickler for files of strangers: it builds containers, numbers, strings and numpy arrays, and runs nothing.

Whatever a pickle asks for by name is answered by a function of this file or refused. numpy's own functions are not
lent out: they trust the sizes that a pickle states.
"""

import math
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

# Python objects, booleans, whole and real numbers, bytes and text.
_DTYPE_KINDS = "ObiufSU"


class UnsafePickleError(pickle.UnpicklingError):
    """The pickle asks for something that is not data."""


class _Function:
    """A function that a pickle may call and not otherwise touch."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickleError("the pickle tries to change a function")


class _Dtype:
    """Stands for numpy.dtype while a pickle is read; of its state only the byte order counts."""

    __slots__ = ("value",)

    def __init__(self, text: Any, *_: Any):
        if not isinstance(text, str) or len(text) > 16:
            raise UnsafePickleError(f"the pickle has an array of the type {text!r}")
        self.value = np.dtype(text)
        if self.value.kind not in _DTYPE_KINDS or self.value.itemsize == 0:
            raise UnsafePickleError(f"the pickle has an array of the type {text!r}")

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise UnsafePickleError("the pickle has an array of a compound type")
        if state[1] not in ("<", ">", "|", "="):
            raise UnsafePickleError(f"the pickle has an array of the byte order {state[1]!r}")
        self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray):
    """A numpy array that checks what a pickle says of its size before numpy believes it."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnsafePickleError("the pickle has a damaged array")
        _, shape, dtype, fortran, content = state
        size = _size(shape)
        if not isinstance(dtype, _Dtype):
            raise UnsafePickleError("the pickle has an array without a type")
        expected, length = (list, size) if dtype.value.kind == "O" else (bytes, size * dtype.value.itemsize)
        if not isinstance(content, expected) or len(content) != length:
            raise UnsafePickleError(f"the pickle has an array of the shape {shape} with other than {length} bytes")
        super().__setstate__((1, shape, dtype.value, bool(fortran), content))

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _size(shape: Any) -> int:
    if not isinstance(shape, tuple) or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
        raise UnsafePickleError("the pickle has an array of an impossible shape")
    return math.prod(shape)


def _reconstruct(*_: Any) -> np.ndarray:
    return np.empty(0).view(_Array)


def _scalar(dtype: Any, content: Any = None) -> Any:
    if not isinstance(dtype, _Dtype) or dtype.value.kind == "O" or not isinstance(content, bytes):
        raise UnsafePickleError("the pickle has a damaged number")
    if len(content) != dtype.value.itemsize:
        raise UnsafePickleError("the pickle has a number of the wrong size")
    return np.frombuffer(content, dtype.value)[0]


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    if not isinstance(dtype, _Dtype) or dtype.value.kind == "O" or not isinstance(content, (bytes, bytearray)):
        raise UnsafePickleError("the pickle has a damaged array")
    if _size(shape) * dtype.value.itemsize != len(content) or order not in ("C", "F"):
        raise UnsafePickleError("the pickle has an array of the wrong size")
    return np.frombuffer(content, dtype.value).reshape(shape, order=order)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How pickles of the protocols 0 to 2 spell bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError("the pickle has damaged bytes")
    return text.encode("latin1")


def _no_bytes(*arguments: Any) -> bytes:
    """The same for no bytes at all."""
    if arguments:
        raise UnsafePickleError("the pickle has damaged bytes")
    return b""


def _bytearray(content: Any = b"", encoding: Any = "latin1") -> bytearray:
    return bytearray(content if isinstance(content, bytes) else _encode(content, encoding))


_ADMITTED = {
    ("numpy", "ndarray"): _reconstruct,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _no_bytes,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): _bytearray,
    ("collections", "OrderedDict"): dict,
}
for _package in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_package}.multiarray", "_reconstruct"] = _reconstruct
    _ADMITTED[f"{_package}.multiarray", "scalar"] = _scalar
    _ADMITTED[f"{_package}.numeric", "_frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Function:
        # pickles of the protocols 0 to 2 use the names of Python 2
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        function = _ADMITTED.get((module, name))
        if function is None:
            raise UnsafePickleError(
                f"the pickle asks for {module}.{name}; only containers, numbers, strings and numpy arrays are admitted"
            )
        return _Function(function)


def safe_load(file: BinaryIO) -> Any:
    """
    The content of a pickle of containers, numbers, strings and numpy arrays.

    Time and memory are not limited here: a hostile pickle can take much of both, so run it where they are.

    Raises:
        UnsafePickleError: the pickle asks for anything else, which the message names. Nothing of it has run.
        ValueError: the file is no pickle, or a damaged one.
    """
    try:
        return _Unpickler(file).load()
    except (UnsafePickleError, MemoryError):
        raise
    except Exception as error:  # the unpickler raises whatever the damaged bytes make it stumble over
        raise ValueError(f"not a readable pickle: {error or type(error).__name__}") from error
