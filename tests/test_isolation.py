"""Processes for untrusted work: limits hold, crashes cost one request, nothing is lost, repeated or reordered."""

import os
import signal
import threading
import time

import pytest
from limited_handlers import make_handler

from training.prepare.isolation import LimitedProcess, Limits, Pool
from training.prepare.rejection import CRASH, MEMORY_LIMIT, TIME_LIMIT, Rejected

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits of memory are those of POSIX")
LIMITS = Limits(seconds=60, memory=2**29)


def answers_of(requests: list, num_workers: int = 2, limits: Limits = LIMITS) -> list:
    with Pool(make_handler, num_workers, limits) as pool:
        results = list(pool.map(requests, lambda request: request))
    assert [request for request, _ in results] == requests
    return [answer for _, answer in results]


@pytest.mark.parametrize(
    ("request_", "limits", "kind"),
    [
        (("sleep", 600), Limits(1, 2**29), TIME_LIMIT),
        (("hold the interpreter",), Limits(1, 2**29), TIME_LIMIT),
        (("allocate",), LIMITS, MEMORY_LIMIT),
        (("grow",), Limits(60, 2**27), MEMORY_LIMIT),
        (("segfault",), LIMITS, CRASH),
        (("exit", 3), LIMITS, CRASH),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and isinstance(value[0], str) else "",
)
def test_a_request_that_hangs_grows_or_crashes_fails_alone(request_, limits, kind):
    start = time.monotonic()
    before, failed, *after = answers_of([1, request_, 2, 3, 4], 1, limits)
    assert isinstance(failed, Rejected) and failed.kind == kind, failed
    assert [answer[0] for answer in (before, *after)] == [1, 2, 3, 4]
    assert time.monotonic() - start < 45


def test_a_crash_is_named_and_an_exception_keeps_its_message():
    segfault, status, failure = answers_of([("segfault",), ("exit", 3), ("fail", "no such luck")], 1)
    assert "SIGSEGV" in segfault.reason and "status 3" in status.reason
    assert failure.reason == "no such luck"


def test_a_request_on_which_a_process_crashes_once_is_tried_again(tmp_path):
    first, second = answers_of([("crash once", str(tmp_path / "mark")), 5], 1)
    assert first == "survived" and second[0] == 5


def test_answers_larger_than_a_pipe_pass_both_ways():
    assert answers_of([("large", 2**22)] * 20) == [b"x" * 2**22] * 20
    assert [len(answer[0]) for answer in answers_of([b"y" * 2**22] * 20)] == [2**22] * 20


def test_killed_workers_lose_repeat_and_reorder_nothing():
    requests = list(range(600))
    pids, is_over = set(), threading.Event()

    def kill_now_and_then() -> None:
        for _ in range(4):
            if is_over.wait(0.25):
                return
            alive = sorted(pids)
            for pid in alive[-1:]:
                pids.discard(pid)
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_now_and_then)
    seen = []
    with Pool(make_handler, 2, LIMITS) as pool:
        killer.start()
        for request, answer in pool.map(iter(requests), lambda request: request):
            assert answer[0] == request
            pids.add(answer[1])
            seen.append((request, answer[1]))
    is_over.set()
    killer.join()
    assert [request for request, _ in seen] == requests
    assert len({pid for _, pid in seen}) > 2, "no worker was killed"


def test_tasks_are_taken_only_as_fast_as_they_are_answered():
    taken = 0

    def tasks():
        nonlocal taken
        for number in range(100_000):
            taken += 1
            yield number

    with Pool(make_handler, 1, LIMITS) as pool:
        for number, _ in pool.map(tasks(), lambda number: number):
            assert taken - number <= 64
            if number == 200:
                break


def test_a_task_without_a_request_keeps_its_place():
    with Pool(make_handler, 2, LIMITS) as pool:
        results = list(pool.map(range(50), lambda number: number if number % 3 else None))
    assert [number for number, _ in results] == list(range(50))
    assert all((answer is None) == (number % 3 == 0) for number, answer in results)


def test_a_call_ends_a_process_that_takes_too_long_and_says_what_another_died_of():
    process = LimitedProcess(make_handler, Limits(0.5, 2**29))
    assert process.call(1)[0] == 1
    with pytest.raises(Rejected) as slow:
        process.call(("sleep", 600))
    assert slow.value.kind == TIME_LIMIT
    with pytest.raises(Rejected) as dead:
        LimitedProcess(make_handler, LIMITS).call(("segfault",))
    assert dead.value.kind == CRASH


def test_a_hanging_process_that_nobody_looks_after_ends_by_itself():
    process = LimitedProcess(make_handler, Limits(0.1, 2**29))
    pid = process.call(1)[1]
    process.send([("hold the interpreter",)])
    assert process.connection.poll(30), "nobody looks at the limit, and the process goes on"
    assert process.cause_of_death().kind == TIME_LIMIT
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
