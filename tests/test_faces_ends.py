"""What is left of a generation when nobody reads its faces on: nothing, whether the program goes on or ends."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from small_models import BOS, EOS, PAD, small_model
from transformers.generation import StoppingCriteria

from iflame_hf import FaceStreamer, IFlameTokenizer, stream_faces

TESTS = Path(__file__).resolve().parent

BEGIN = """
import sys, threading, time
import torch
from transformers import StoppingCriteria, pipeline
from small_models import small_model
from iflame_hf import FaceStreamer, IFlameTokenizer, stream_faces

class Work(StoppingCriteria):  # each step works for a while within torch, where a large model always is
    matrix = torch.rand(700, 700)
    def __call__(self, input_ids, scores, **kwargs):
        for _ in range(10):
            self.matrix @ self.matrix
        return torch.zeros(len(input_ids), dtype=torch.bool)

torch.set_num_threads(1)
model, tokenizer = small_model(), IFlameTokenizer()
endless = {"max_new_tokens": 9 * 9000, "suppress_tokens": [129, 130, 131], "stopping_criteria": [Work()]}
"""

STREAMS = """
class Reader: pass
reader = Reader(); reader.itself = reader
reader.faces = stream_faces(model, tokenizer, timeout=30, **endless)
generator = pipeline("mesh-generation", model=model, tokenizer=tokenizer, device="cpu")
placed = {name: value for name, value in endless.items() if name != "max_new_tokens"}
streams = [reader.faces, stream_faces(model, tokenizer, **endless), generator.stream(max_faces=9000, **placed)]
for faces in streams: next(faces)
"""

DAEMON_THREADS = """
streamer, read = FaceStreamer(tokenizer), threading.Event()
model.generate(max_new_tokens=27, streamer=streamer)
list(streamer)
threading.Thread(target=model.generate, kwargs={**endless, "streamer": streamer}, daemon=True).start()
next(streamer)
def follow():
    for face in stream_faces(model, tokenizer, **endless): read.set()
threading.Thread(target=follow, daemon=True).start()
assert read.wait(60)
"""


def run(program):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", f"{BEGIN}\n{program}\n"], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("program", [STREAMS, DAEMON_THREADS], ids=["streams", "daemon threads"])
def test_a_program_that_ends_while_faces_come_ends_well(program):
    ended = run(f"{program}\nprint('read', flush=True)\nsys.exit()")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "read\n", "")


def test_an_error_of_the_program_is_what_it_ends_with():
    ended = run(f"{STREAMS}\nraise KeyError('chair')")
    assert ended.returncode == 1 and ended.stderr.rstrip().endswith("KeyError: 'chair'")
    assert "terminate" not in ended.stderr and ended.stderr.count("Traceback") == 1


def test_a_thread_that_python_waits_for_reads_all_its_faces_after_the_main_thread_has_ended():
    ended = run("""
def follow():
    while threading.main_thread().is_alive(): time.sleep(0.01)
    print(len(list(stream_faces(model, tokenizer, **short))) == expected > 5)
short = {"max_new_tokens": 90, "suppress_tokens": [129, 130, 131]}
expected = len(list(stream_faces(model, tokenizer, **short)))
threading.Thread(target=follow).start()""")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")


def test_an_iteration_that_is_forgotten_half_read_leaves_no_thread():
    """By the last name that goes, and within a cycle, which is found at some time, by any thread."""

    class Reader:
        pass

    steps = []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            steps.append(input_ids.shape[1])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model, tokenizer, before = small_model(), IFlameTokenizer(), threading.active_count()
    options = {"max_new_tokens": 9 * 700, "suppress_tokens": [PAD, BOS, EOS], "stopping_criteria": [Watch()]}
    faces = stream_faces(model, tokenizer, **options)
    next(faces)
    del faces
    assert threading.active_count() == before
    reader = Reader()
    reader.itself, reader.faces = reader, stream_faces(model, tokenizer, **options)
    next(reader.faces)
    del reader
    gc.collect()
    end = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert steps and max(steps) < 9 * 700


def test_a_generation_that_ended_is_not_kept():
    kept = []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == 12:
                kept.append(weakref.ref(threading.current_thread()))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model, tokenizer = small_model(), IFlameTokenizer()
    options = {"suppress_tokens": [PAD, BOS, EOS], "stopping_criteria": [Watch()]}
    list(stream_faces(model, tokenizer, max_new_tokens=18, **options))
    next(stream_faces(model, tokenizer, max_new_tokens=9 * 700, **options))
    for daemon in (True, False):
        streamer = FaceStreamer(tokenizer)
        given = {"max_new_tokens": 18, "streamer": streamer, **options}
        thread = threading.Thread(target=model.generate, kwargs=given, daemon=daemon)
        thread.start()
        thread.join()
    del thread
    gc.collect()
    assert len(kept) == 4 and not any(thread() for thread in kept)
