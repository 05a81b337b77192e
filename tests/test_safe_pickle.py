"""The unpickler of strangers' files: plain data comes through unchanged, everything else is refused and named."""

import builtins
import collections
import io
import os
import pickle
import struct
import subprocess

import numpy as np
import pytest

from training.recipes.safe_pickle import UnsafePickleError, safe_load

PLAIN = {
    "name_train": ["03001627_a", "é", ""],
    "numbers": [0, -1, 2**80, 1.5, float("inf"), True, None, 1 + 0j == 1],
    "bytes": [b"", b"\x00\xff", bytearray(b"abc")],
    "containers": ((), (1,), [[]], {1, 2}, frozenset([3]), {"a": {}}),
    "ordered": collections.OrderedDict(b=1, a=2),
}
ARRAYS = [
    np.arange(12, dtype=np.float32).reshape(4, 3),
    np.asfortranarray(np.arange(12, dtype=">i8").reshape(4, 3)),
    np.zeros((0, 3), dtype=np.int32),
    np.array(7.5),
    np.array([True, False]),
    np.array(["a", "bc"]),
    np.array([[1, 2], [3, 4]], dtype=np.uint8)[:, ::-1],
    np.array([[0, 1, 2], [2, 3, 4, 5]], dtype=object),
]


def load(content: bytes):
    return safe_load(io.BytesIO(content))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_containers_numbers_strings_and_arrays_come_through_unchanged(protocol):
    content = pickle.dumps([PLAIN, ARRAYS, np.float32(0.5), np.int64(-3)], protocol)
    loaded, trusting = load(content), pickle.loads(content)
    assert loaded[0] == trusting[0] == PLAIN
    assert len(loaded[1]) == len(ARRAYS)
    for array, expected in zip(loaded[1], trusting[1], strict=True):
        assert array.dtype == expected.dtype and array.shape == expected.shape
        assert array.tolist() == expected.tolist()
    assert loaded[2:] == trusting[2:] and [number.dtype for number in loaded[2:]] == [np.float32, np.int64]


def test_what_was_read_can_be_handed_on_as_plain_arrays():
    again = pickle.loads(pickle.dumps(load(pickle.dumps(ARRAYS[0], 4))))
    assert type(again) is np.ndarray and np.array_equal(again, ARRAYS[0])


def test_arrays_written_by_numpy_1_are_read():
    content = pickle.dumps(ARRAYS[0], 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert np.array_equal(load(content), ARRAYS[0])


class Calls:
    """Pickles to a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Plain:
    pass


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("planted", "name"),
    [
        (Calls(os.system, "touch planted"), f"{os.name}.system"),
        (Calls(builtins.eval, "open('planted', 'w')"), "builtins.eval"),
        (Calls(builtins.getattr, "", "join"), "builtins.getattr"),
        (Calls(subprocess.Popen, ["touch", "planted"]), "subprocess.Popen"),
        (Calls(np.load, "planted"), "numpy"),
        (Calls(np.fromfile, "planted"), "numpy"),
        (os.system, f"{os.name}.system"),
        (Plain(), ""),
        (np.random.default_rng(0), "numpy.random"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_everything_else_is_refused_named_and_does_not_run(protocol, planted, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafePickleError, match="asks for") as refusal:
        load(pickle.dumps({"vertices_train": [np.zeros(3)], "name_train": planted}, protocol))
    assert name in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch planted'\ntR.",  # GLOBAL, REDUCE
        b"(S'touch planted'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch planted'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0dtouch planted\x85R.",  # STACK_GLOBAL
        b"\x80\x02cos\nsystem\n)\x81.",  # NEWOBJ
    ],
    ids=["global", "inst", "obj", "stack_global", "newobj"],
)
def test_no_opcode_gets_past_the_list_of_what_is_admitted(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafePickleError, match=r"asks for os\.system"):
        load(content)
    assert list(tmp_path.iterdir()) == []


def array_state(shape: tuple, dtype: str, content: object) -> bytes:
    """A pickle of an array with a state of one's own."""
    head = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    kind = f"cnumpy\ndtype\n(S'{dtype}'\nI00\nI01\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb".encode()
    shape_text = b"(" + b"".join(b"I%d\n" % n for n in shape) + b"t"
    return head + b"(I1\n" + shape_text + kind + b"I00\n" + pickle.dumps(content, 2)[2:-1] + b"tb."


def test_the_hand_made_array_is_an_array():
    assert load(array_state((2,), "i4", struct.pack("<2i", 5, 6))).tolist() == [5, 6]


@pytest.mark.parametrize(
    ("shape", "dtype", "content"),
    [
        ((10**9, 10**9), "f8", b"\0" * 16),
        ((4,), "f8", b"\0" * 16),
        ((-1,), "f8", b"\0" * 8),
        ((1000,), "O8", [1]),
        ((1,), "O8", b"\0" * 8),
        ((1,), "f8", "text"),
        ((1,), "V8", b"\0" * 8),
        ((1,), "M8", b"\0" * 8),
    ],
)
def test_an_array_that_lies_about_its_size_or_type_is_refused(shape, dtype, content):
    with pytest.raises(UnsafePickleError, match="the pickle has"):
        load(array_state(shape, dtype, content))


def test_a_function_of_the_unpickler_cannot_be_changed():
    state = pickle.dumps({"_function": os.name}, 2)[2:-1]
    with pytest.raises(UnsafePickleError, match="change a function"):
        load(b"c_codecs\nencode\n" + state + b"b.")
    assert load(pickle.dumps(b"\xff", 2)) == b"\xff"


@pytest.mark.parametrize(
    "content", [b"", b"nothing", pickle.dumps([1, 2, 3])[:-4], b"\x80\x04\x95" + b"\xff" * 8 + b"."]
)
def test_a_file_that_is_no_pickle_is_a_clear_error(content):
    with pytest.raises(ValueError, match="not a readable pickle"):
        load(content)
