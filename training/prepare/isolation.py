"""Work on untrusted files in child processes, which are stopped when they take too much time or memory.

A child answers one request after the other. If it hangs, outgrows its limit or crashes, only that request fails.
"""

import contextlib
import gc
import logging
import multiprocessing
import multiprocessing.connection
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import psutil

from training.prepare.rejection import CRASH, MEMORY_LIMIT, TIME_LIMIT, Rejected, as_rejected, ran_out_of_memory

try:
    import resource
except ImportError:  # Windows: memory is watched from outside alone
    resource = None

# A fork of a clean server with the imports done: quick, and free of this process's threads.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT = multiprocessing.get_context(_METHOD)
_START_TIMEOUT_SECONDS = 120
_WATCH_INTERVAL_SECONDS = 0.2  # between two measurements of the children's time and memory
_TASKS_PER_MESSAGE = 8
_MAX_TASKS_AHEAD = 32  # tasks per process that may be ahead of the oldest unfinished one
_MAX_ATTEMPTS = 2  # a crash may have been the fault of what the process did before, or of the machine


class Limits(NamedTuple):
    """What one request may take."""

    seconds: float
    memory: int  # bytes, above what the process takes at its start


def preload(*modules: str) -> None:
    """Name modules that children need, so that they are imported once; before the first child starts."""
    if _METHOD == "forkserver":
        _CONTEXT.set_forkserver_preload(list(modules))


class LimitedProcess:
    """
    A child process that answers requests with the function that `make_handler`, importable, makes in the child.

    An answer is what that function returned, or a [`Rejected`] if it raised.
    """

    def __init__(self, make_handler: Callable[[], Callable[[Any], Any]], limits: Limits):
        self.limits = limits
        self.connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, make_handler, limits), daemon=True)
        self._process.start()
        theirs.close()
        try:
            if not self.connection.poll(_START_TIMEOUT_SECONDS):
                raise EOFError
            self._first_memory = self.connection.recv()
        except EOFError as error:
            self.kill()
            raise RuntimeError("a process that reads meshes does not start; see above for its error") from error
        self._since = 0.0

    def send(self, requests: list[Any]) -> None:
        """Hand over requests, each of which is answered in turn. Raises OSError if the child is dead."""
        self._since = time.monotonic()
        self.connection.send(requests)

    def receive(self) -> Any:
        """The next answer. Blocks. Raises EOFError or OSError if the child is dead."""
        answer = self.connection.recv()
        self._since = time.monotonic()
        return answer

    def excess(self) -> Rejected | None:
        """What the request at work takes too much of, if it does."""
        if time.monotonic() - self._since > self.limits.seconds:
            return _too_slow(self.limits)
        try:
            memory = psutil.Process(self._process.pid).memory_info().rss
        except psutil.Error:
            return None
        return _too_large(self.limits) if memory > self._first_memory + self.limits.memory else None

    def call(self, request: Any) -> Any:
        """The answer to one request, within the limits. Raises [`Rejected`], after which the process is gone."""
        try:
            self.send([request])
            while not self.connection.poll(_WATCH_INTERVAL_SECONDS):
                if (excess := self.excess()) is not None:
                    self.kill()
                    raise excess
            return self.receive()
        except (EOFError, OSError) as error:
            raise self.cause_of_death() from error

    def kill(self) -> None:
        """End the child."""
        self._process.kill()
        self._process.join()
        self.connection.close()

    def cause_of_death(self) -> Rejected:
        """What a child that died by itself died of."""
        self._process.join(timeout=5)
        code = self._process.exitcode
        self.kill()
        if hasattr(signal, "SIGALRM") and code == -signal.SIGALRM:
            return _too_slow(self.limits)
        ending = signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"
        return Rejected(CRASH, f"the process that read it ended with {ending}")


class Pool:
    """Processes that answer the requests of tasks, in parallel; answers come in the order of the tasks."""

    def __init__(self, make_handler: Callable[[], Callable[[Any], Any]], num_workers: int, limits: Limits):
        self._make_handler = make_handler
        self._num_workers = num_workers
        self._limits = limits
        self._tasks: dict[LimitedProcess, deque[int]] = {}  # what each process has still to answer

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self._tasks:
            process.kill()
        self._tasks.clear()

    def map(self, tasks: Iterable[Any], request_of: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
        """
        Every task with its answer, a [`Rejected`] if it failed; with None where `request_of` gives None.

        Takes tasks only as fast as they are answered. A request on which a process crashes, or for which its memory
        does not suffice, is tried once more in a fresh process.
        """
        tasks = enumerate(tasks)
        known: dict[int, Any] = {}  # tasks that have not been given back yet
        answers: dict[int, Any] = {}
        attempts: dict[int, int] = {}
        again: deque[int] = deque()
        window = _MAX_TASKS_AHEAD * self._num_workers
        next_back, exhausted, measured = 0, False, 0.0

        def next_batch() -> list[int]:
            nonlocal exhausted
            if again:
                return [again.popleft()]
            batch: list[int] = []
            while len(batch) < _TASKS_PER_MESSAGE and len(known) < window and not exhausted:
                number, task = next(tasks, (None, None))
                if number is None:
                    exhausted = True
                    break
                known[number] = task
                if request_of(task) is None:
                    answers[number] = None
                else:
                    batch.append(number)
            return batch

        def settle(process: LimitedProcess, answer: Any, is_alive: bool) -> None:
            """Take an answer for the task at the head of a process's list, or note what the process was ended for."""
            numbers = self._tasks[process]
            number = numbers.popleft()
            answers[number] = answer
            if isinstance(answer, Rejected) and answer.kind in (CRASH, MEMORY_LIMIT):
                attempts[number] = attempts.get(number, 0) + 1
                if attempts[number] < _MAX_ATTEMPTS:
                    del answers[number]
                    again.append(number)
                if is_alive:
                    process.kill()
                is_alive = False
            if not is_alive:
                again.extend(numbers)
                del self._tasks[process]

        while True:
            while next_back in answers:
                attempts.pop(next_back, None)
                yield known.pop(next_back), answers.pop(next_back)
                next_back += 1
            idle = [process for process, numbers in self._tasks.items() if not numbers]
            while len(self._tasks) - len(idle) < self._num_workers and (batch := next_batch()):
                process = idle.pop() if idle else self._start()
                self._tasks[process] = deque(batch)
                try:
                    process.send([request_of(known[number]) for number in batch])
                except OSError:
                    settle(process, process.cause_of_death(), is_alive=False)
            busy = {process.connection: process for process, numbers in self._tasks.items() if numbers}
            if not busy:
                if exhausted and not again and next_back not in answers:
                    assert not known, "a task was lost"
                    return
                continue
            ready = multiprocessing.connection.wait(list(busy), timeout=_WATCH_INTERVAL_SECONDS)
            for connection in ready:
                process = busy[connection]
                try:
                    settle(process, process.receive(), is_alive=True)
                except (EOFError, OSError):
                    settle(process, process.cause_of_death(), is_alive=False)
            if time.monotonic() - measured < _WATCH_INTERVAL_SECONDS:
                continue
            measured = time.monotonic()
            for connection in busy.keys() - set(ready):
                process = busy[connection]
                if (excess := process.excess()) is not None and not connection.poll():
                    process.kill()
                    settle(process, excess, is_alive=False)

    def _start(self) -> LimitedProcess:
        process = LimitedProcess(self._make_handler, self._limits)
        self._tasks[process] = deque()
        return process


def _too_slow(limits: Limits) -> Rejected:
    return Rejected(TIME_LIMIT, f"reading it takes more than {limits.seconds:g} seconds (see --time_limit)")


def _too_large(limits: Limits) -> Rejected:
    return Rejected(MEMORY_LIMIT, f"reading it takes more than {limits.memory / 2**30:.3g} GiB (see --memory_limit)")


def _serve(connection: Any, make_handler: Callable[[], Callable[[Any], Any]], limits: Limits) -> None:
    """What runs in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its children
    warnings.simplefilter("ignore")
    logging.disable()
    handler = make_handler()
    memory = psutil.Process().memory_info()
    if resource is not None:
        # Linux counts what is written to; elsewhere libraries count too, of which those of a GPU take gigabytes.
        of_data = sys.platform == "linux"
        kind, used = (resource.RLIMIT_DATA, memory.data) if of_data else (resource.RLIMIT_AS, memory.vms)
        _, hard = resource.getrlimit(kind)
        wanted = used + limits.memory
        with contextlib.suppress(OSError, ValueError):  # macOS may refuse; memory is watched from outside too
            resource.setrlimit(kind, (wanted if hard < 0 else min(wanted, hard), hard))
    gc.collect()
    gc.freeze()
    try:
        connection.send(memory.rss)
        while True:
            for request in connection.recv():
                if hasattr(signal, "setitimer"):  # the end of a child whose parent does not end it
                    signal.setitimer(signal.ITIMER_REAL, 2 * limits.seconds + 2)
                _answer(connection, handler, request, limits)
                gc.collect()  # readers leave cycles of large arrays
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)
    except (EOFError, OSError):
        return  # the parent is gone


def _answer(connection: Any, handler: Callable[[Any], Any], request: Any, limits: Limits) -> None:
    try:
        answer = handler(request)
    except Exception as error:
        answer = _too_large(limits) if ran_out_of_memory(error) else as_rejected(error)
    try:
        connection.send(answer)
    except MemoryError:
        connection.send(_too_large(limits))
