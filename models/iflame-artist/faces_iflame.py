"""Faces of a mesh as generate() makes them."""

import atexit
import threading
from collections.abc import Iterator
from queue import Empty, Queue
from typing import Any

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from .mesh_files_iflame import is_mesh

# The threads that generate, by the events that have them stop at their next token.
_generating: dict[threading.Event, threading.Thread] = {}


class FaceStreamer(BaseStreamer):
    """Hands over each face of the mesh that `generate()` makes as soon as it is complete.

    It is to faces what transformers' `TextIteratorStreamer` is to text: `generate(streamer=streamer)` runs in a thread
    and `for face in streamer` in another; `stream_faces` owns the thread for you. A face is an array (3 vertices, 3)
    float64 in the units and axes of `tokenizer.decode_mesh`. Together the faces are those of `decode_mesh` of
    all ids, in the same order and winding: degenerate and repeated ones are left out, and at the first id that is no
    coordinate the mesh ends. It can be used again once `generate()` has ended.

    Where the program ends before the mesh, a generation in a daemon thread stops at its next token, by a SystemExit
    within that thread; for any other thread Python waits.

    Args:
        tokenizer: the `IFlameTokenizer` of the model.
        skip_prompt: leave out the faces that are complete within the prompt.
        timeout: seconds to wait for a face at most; by default for ever.

    Raises, where it is read: TimeoutError where no face came in time, and whatever was handed to `fail`. `put` raises
    ValueError for more than one mesh at a time.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None):
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.timeout = timeout
        self._queue: Queue = Queue()  # faces, exceptions, and None for the end
        self._begin()

    def _begin(self) -> None:
        self._ids: list[int] = []  # of whole and open faces, without padding and start tokens
        self._seen: set[frozenset] = set()
        self._is_prompt = True
        self._mesh_ended = False
        self._ended = False
        self._must_stop = threading.Event()

    @property
    def mesh(self) -> "trimesh.Trimesh":  # noqa: F821
        """The mesh so far, as `decode_mesh` gives it: all that was generated, read or not, and the prompt's faces."""
        return self.tokenizer.decode_mesh(list(self._ids))

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt (1, T), then the ids (1,) of each step; called by `generate()`."""
        if self._ended:
            self._begin()
        if self._is_prompt:
            self._generates_here()
        if self._must_stop.is_set():
            raise SystemExit
        if value.dim() > 1 and value.shape[0] != 1 or value.dim() == 1 and not self._is_prompt and len(value) != 1:
            error = ValueError(
                f"a FaceStreamer follows one mesh, got {value.shape[0]}: leave out num_return_sequences and give one "
                "prompt"
            )
            self.fail(error)
            raise error
        for token in value.flatten().tolist():
            self._take(token)
        self._is_prompt = False

    def _generates_here(self) -> None:
        _generating[self._must_stop] = threading.current_thread()

    def _take(self, token: int) -> None:
        if self._mesh_ended:
            return
        layout = self.tokenizer.format
        if not layout.is_coordinate(token):
            self._mesh_ended = bool(self._ids) or not layout.may_precede_mesh(token)
            return
        self._ids.append(token)
        if not layout.is_whole(len(self._ids)):
            return
        vertices, faces = self.tokenizer.decode_arrays(self._ids[-layout.tokens_per_face :])
        key = frozenset(map(tuple, vertices.tolist()))
        if len(faces) and key not in self._seen:
            self._seen.add(key)
            if not (self.skip_prompt and self._is_prompt):
                self._queue.put(vertices[faces[0]])

    def end(self) -> None:
        """Called by `generate()` when it is done."""
        self._finish(None)

    def fail(self, error: BaseException) -> None:
        """Ends the faces with an error, which is raised where they are read; for the thread that generates."""
        self._finish(error)

    def _finish(self, last: BaseException | None) -> None:
        if not self._ended:
            self._ended = True
            _generating.pop(self._must_stop, None)
            self._queue.put(last)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        try:
            item = self._queue.get(timeout=self.timeout)
        except Empty:
            raise TimeoutError(f"no face came within {self.timeout} seconds") from None
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item


def stream_faces(
    model: Any,
    tokenizer: Any,
    prompt: Any = None,
    *,
    skip_prompt: bool = False,
    timeout: float | None = None,
    **generate_kwargs: Any,
) -> Iterator[np.ndarray]:
    """Generates one mesh in a thread of its own and yields its faces, arrays (3, 3) float64, as a `FaceStreamer` does.

    Args:
        model: an `IFlameForCausalLM`.
        tokenizer: its `IFlameTokenizer`.
        prompt: what the mesh begins with: a mesh as `tokenizer.encode_mesh` takes it, or ids (T,) or (1, T), a list
            or a tensor; by default nothing, that is the start face.
        skip_prompt: leave out the faces of the prompt.
        timeout: seconds to wait for a face at most; by default for ever.
        generate_kwargs: as for `model.generate`, for example `do_sample=True, max_new_tokens=9 * 200`.

    The generation begins with the first face that is asked for. Where the iteration is left early, by `break`, an
    exception or the end of the program, it is stopped at the next token.

    Raises ValueError at once for a prompt that is none and for more than one mesh; while iterating TimeoutError, and
    whatever `generate` raises.
    """
    for name in ("num_return_sequences", "num_beams"):
        if (generate_kwargs.get(name) or 1) != 1:
            raise ValueError(f"faces come of one mesh at a time: leave out {name}")
    if "streamer" in generate_kwargs:
        raise ValueError("stream_faces has a streamer of its own: leave out streamer")
    if prompt is not None:
        if any(generate_kwargs.get(name) is not None for name in ("inputs", "input_ids")):
            raise ValueError("give either prompt or input_ids, and not both")
        generate_kwargs["inputs"] = _prompt_ids(tokenizer, prompt).to(model.device)
    streamer = FaceStreamer(tokenizer, skip_prompt=skip_prompt, timeout=timeout)
    return _run(model, streamer, generate_kwargs)


def _prompt_ids(tokenizer: Any, prompt: Any) -> torch.Tensor:
    ids = torch.as_tensor(tokenizer.encode_mesh(prompt, add_end=False) if is_mesh(prompt) else prompt)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.is_floating_point():
        raise ValueError(f"a prompt is one mesh, or its ids (T,) or (1, T), got {ids.dtype} {tuple(ids.shape)}")
    return ids


def _stop(must_stop: threading.Event, generating: threading.Thread, timeout: float | None = None) -> None:
    """Has a generation stop at its next token, and waits for that, `timeout` seconds at most."""
    must_stop.set()
    if generating is not threading.current_thread():
        generating.join(timeout)


@atexit.register
def _stop_all() -> None:
    """A thread that is within torch when the interpreter is taken down would abort the process."""
    for must_stop, generating in list(_generating.items()):
        _stop(must_stop, generating)


def _run(model: Any, streamer: FaceStreamer, generate_kwargs: dict[str, Any]) -> Iterator[np.ndarray]:
    def work() -> None:
        try:
            streamer._generates_here()
            model.generate(**generate_kwargs, streamer=streamer)
            streamer.end()
        except BaseException as error:
            streamer.fail(error)

    thread = threading.Thread(target=work, name="stream_faces", daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        _stop(streamer._must_stop, thread, streamer.timeout)
