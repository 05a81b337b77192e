"""Threads of torch while a CPU generates, and afterwards."""

import os
import threading

import pytest
import torch
from small_models import small_model
from threadpoolctl import ThreadpoolController
from transformers import pipeline
from transformers.generation import StoppingCriteria

from iflame_hf import IFlameTokenizer, generate_meshes, stream_faces, threads_iflame
from iflame_hf.host_steps_iflame import HostSteps
from iflame_hf.threads_iflame import spare_a_core


@pytest.fixture(autouse=True)
def four_cores(monkeypatch, tmp_path):
    """A process on four cores, in which torch takes four threads and nobody has chosen another number."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(threads_iflame, "CPU_LIMIT", tmp_path / "cpu.max")
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return small_model()


class Watch(StoppingCriteria):
    """Notes the number of threads in every step."""

    def __init__(self):
        self.found = set()

    def __call__(self, input_ids, scores, **kwargs):
        self.found.add(torch.get_num_threads())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def while_generating(model, **options):
    watch = Watch()
    model.generate(max_new_tokens=3, stopping_criteria=[watch], **options)
    return watch.found


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_one_core_is_left_free_while_generating_and_all_are_used_afterwards(model):
    tokenizer, watch = IFlameTokenizer(), Watch()
    assert while_generating(model) == while_generating(model, num_beams=2) == {3}
    assert in_a_thread(lambda: while_generating(model)) == {3}
    generator = pipeline("mesh-generation", model=model, tokenizer=tokenizer, device="cpu")
    assert torch.get_num_threads() == 4
    for way in (
        lambda: generator(max_faces=1, stopping_criteria=[watch]),
        lambda: list(generator.stream(max_faces=1, stopping_criteria=[watch])),
        lambda: list(stream_faces(model, tokenizer, max_new_tokens=9, stopping_criteria=[watch])),
    ):
        watch.found.clear()
        way()
        assert watch.found == {3}
        assert torch.get_num_threads() == in_a_thread(torch.get_num_threads) == 4


def test_meshes_that_come_one_by_one_leave_a_core_free_while_they_are_made(model, monkeypatch):
    steps, found = HostSteps.step, set()

    def step(self, place):
        found.add(torch.get_num_threads())
        return steps(self, place)

    monkeypatch.setattr(HostSteps, "step", step)
    for mesh in generate_meshes(model, range(3), rows=2, max_faces=2):
        assert mesh.ids[0] == model.config.bos_token_id and torch.get_num_threads() == 4
    assert found == {3}


def test_the_number_is_as_before_after_an_error_and_after_a_stream_that_was_left(model):
    class Broken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyError("the disk fell off")

    with pytest.raises(KeyError):
        model.generate(max_new_tokens=3, stopping_criteria=[Broken()])
    faces = stream_faces(model, IFlameTokenizer(), max_new_tokens=900, suppress_tokens=[129, 130, 131])
    next(faces)
    assert torch.get_num_threads() == 4
    faces.close()
    assert torch.get_num_threads() == in_a_thread(torch.get_num_threads) == 4


def test_generations_at_once_use_the_same_number_and_leave_it_as_it_was(model):
    tokenizer, watch = IFlameTokenizer(), Watch()
    options = {"max_new_tokens": 900, "suppress_tokens": [129, 130, 131], "stopping_criteria": [watch]}
    first, second = (stream_faces(model, tokenizer, **options) for _ in range(2))
    next(first), next(second)
    assert while_generating(model) == {3}
    first.close()
    next(second)
    second.close()
    assert watch.found == {3}
    assert torch.get_num_threads() == in_a_thread(torch.get_num_threads) == 4


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
@pytest.mark.parametrize(("value", "threads"), [("4", 4), (" 4,2", 4), ("", 3), ("many", 3)])
def test_a_number_in_the_environment_is_kept(model, monkeypatch, name, value, threads):
    monkeypatch.setenv(name, value)
    assert while_generating(model) == {threads}


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_fewer_threads_that_were_chosen_in_the_program_are_kept(model, chosen):
    torch.set_num_threads(chosen)
    assert while_generating(model) == {chosen}
    assert torch.get_num_threads() == chosen


@pytest.mark.parametrize(
    ("limit", "cores", "threads"),
    [
        ("max 100000", 4, 3),
        ("300000 100000", 4, 2),
        ("250000 100000", 4, 1),
        ("50000 100000", 4, 1),
        ("900000 100000", 3, 2),
        (None, 1, 1),
    ],
)
def test_a_container_or_a_mask_of_cores_limits_them(monkeypatch, limit, cores, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    if limit:
        threads_iflame.CPU_LIMIT.write_text(f"{limit}\n")
    with spare_a_core(torch.device("cpu")):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 4


def test_where_the_system_binds_no_process_to_cores_all_are_counted(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    with spare_a_core(torch.device("cpu")):
        assert torch.get_num_threads() == 2


def test_a_gpu_needs_no_core_left_free():
    with spare_a_core(torch.device("cuda")):
        assert torch.get_num_threads() == 4


def numpy_threads():
    libraries = ThreadpoolController().select(internal_api="openblas").info()
    return next((each["num_threads"] for each in libraries if "numpy" in each["filepath"]), None)


@pytest.mark.skipif(numpy_threads() is None, reason="numpy computes without OpenBLAS")
def test_numpy_leaves_a_core_free_as_long_as_any_generation_runs(model, monkeypatch):
    with ThreadpoolController().select(internal_api="openblas").limit(limits=4):
        cpu = torch.device("cpu")
        with spare_a_core(cpu):
            assert numpy_threads() == 3
            assert in_a_thread(numpy_threads) == 3
        assert numpy_threads() == 4
        first, second = spare_a_core(cpu), spare_a_core(cpu)
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None)
        assert numpy_threads() == 3
        second.__exit__(None, None, None)
        assert numpy_threads() == 4
        with spare_a_core(torch.device("meta")):
            assert numpy_threads() == 4
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            monkeypatch.setenv(name, "4")
            with spare_a_core(cpu):
                assert numpy_threads() == 4
            monkeypatch.delenv(name)
        with ThreadpoolController().select(internal_api="openblas").limit(limits=1), spare_a_core(cpu):
            assert numpy_threads() == 1, "fewer that were chosen are kept"
        monkeypatch.setattr(threads_iflame, "ThreadpoolController", None)
        with spare_a_core(cpu):
            assert numpy_threads() == 4 and torch.get_num_threads() == 3
