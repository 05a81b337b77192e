"""Many meshes: generate_meshes(), and training/generate.py, whose meshes hang on their seeds alone."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import trimesh
from sampling_processes import Sampler, wait_for_meshes
from small_models import BOS, EOS, PAD, small_model
from transformers import StoppingCriteria

from iflame_cli import making
from iflame_hf import GeneratedMesh, IFlameTokenizer, generate_meshes, many_iflame
from iflame_hf.many_iflame import default_rows
from training import generate
from training.run.resume import lock
from training.sampling.folder import MeshRecord, RecordReader, RecordWriter, read_records

START, END = [BOS] * 9, [EOS] * 9
NUM, MAX_FACES = 24, 8


@pytest.fixture(scope="module")
def model():
    """Meshes of it end early, or with their last face."""
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[EOS] += 3
    return model


@pytest.fixture(scope="module")
def model_folder(model, tmp_path_factory):
    return save(model, tmp_path_factory.mktemp("models") / "small")


def save(model, folder):
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


def by_seed(meshes):
    return {mesh.seed: mesh.ids.tolist() for mesh in meshes}


# The meshes one by one


@pytest.fixture(scope="module")
def alone(model):
    """Each seed's mesh as generate() makes it by itself, to its end face."""
    rows = [model.generate(do_sample=True, seed=seed, max_faces=MAX_FACES)[0].tolist() for seed in range(10)]
    return {seed: row[: row.index(EOS) + 9] for seed, row in enumerate(rows)}


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_a_seed_gives_the_mesh_of_generate_whatever_the_number_of_rows(model, alone, rows):
    seeds = [7, 2, 9, 4, 0, 1, 3, 8, 6, 5]
    meshes = list(generate_meshes(model, seeds, rows=rows, max_faces=MAX_FACES))
    assert sorted(mesh.number for mesh in meshes) == list(range(10))
    assert all(isinstance(mesh, GeneratedMesh) and seeds[mesh.number] == mesh.seed for mesh in meshes)
    assert by_seed(meshes) == alone


def test_ids_go_from_the_start_face_to_the_end_face_without_padding(model):
    lengths = set()
    for mesh in generate_meshes(model, range(NUM), max_faces=MAX_FACES):
        ids = mesh.ids.tolist()
        assert (
            mesh.ended == (len(ids) < 9 * (1 + MAX_FACES + 1))
            and mesh.ids.dtype == torch.int64
            and mesh.ids.device.type == "cpu"
        )
        assert ids[:9] == START and ids[-9:] == END and not {PAD, BOS, EOS} & set(ids[9:-9])
        lengths.add(len(ids))
    assert max(lengths) == 9 * (1 + MAX_FACES + 1) and len(lengths) > 2


def test_without_the_grammar_a_mesh_that_is_cut_off_has_not_ended():
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[[PAD, BOS]] -= 30
        model.lm_head.bias[EOS] += 3
    meshes = list(generate_meshes(model, range(12), max_faces=3, mesh_grammar=False))
    assert {mesh.ended for mesh in meshes} == {True, False}
    for mesh in meshes:
        ids = mesh.ids.tolist()
        assert mesh.ended == (EOS in ids[: 9 * (1 + 3)])
        assert ids.index(EOS) == len(ids) - 1 if EOS in ids else len(ids) == 9 * (1 + 3)


def test_every_mesh_has_its_beginning_alone_or_beside_longer_ones(model):
    start = {mesh.seed: mesh.ids[:-9] for mesh in generate_meshes(model, [0, 1], max_faces=2)}
    prompts = [start[0], START, start[1].tolist(), start[0]]
    meshes = by_seed(generate_meshes(model, range(4), prompt=prompts, max_faces=MAX_FACES))
    for seed, prompt in enumerate(prompts):
        assert meshes[seed][: len(prompt)] == list(map(int, prompt))
        assert by_seed(generate_meshes(model, [seed], prompt=prompt, max_faces=MAX_FACES))[seed] == meshes[seed]
        assert len(meshes[seed]) <= 9 * (1 + MAX_FACES + 1)
    assert meshes[0] != meshes[3]


def test_meshes_come_before_the_next_ones_are_made(model, monkeypatch):
    made = []
    generate = model.generate

    def watched(*inputs, **options):
        made.append(options.get("seed"))
        return generate(*inputs, **options)

    monkeypatch.setattr(model, "generate", watched)
    meshes = generate_meshes(model, [5, 6, 7], rows=2, max_faces=2, cache_implementation="dynamic")
    assert made == [None], "options are looked at at once"
    assert next(meshes).seed == 5 and made[1:] == [[5, 6]]
    assert len(list(meshes)) == 2 and made[1:] == [[5, 6], [7]]
    assert list(generate_meshes(model, [])) == []


def test_a_criterion_that_looks_once_a_face_looks_at_the_engine_and_stops_it(model):
    class Stop(StoppingCriteria):
        looks_once_a_face = True
        faces = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.faces += 1
            return torch.tensor(self.faces == 3)

    stop = Stop()
    meshes = list(generate_meshes(model, range(NUM), rows=4, min_faces=7, max_faces=8, stopping_criteria=[stop]))
    assert stop.faces == 3 and [len(mesh.ids) for mesh in meshes] == [9 * (1 + 3) + 1] * 4
    assert not any(mesh.ended for mesh in meshes)


@pytest.mark.parametrize(
    ("seeds", "options", "reason"),
    [
        (3, {}, r"seeds must be whole numbers, one for each mesh, such as range\(1000\), got 3"),
        ([0, -1], {}, "seed must be a whole number from 0 on"),
        ([0.5], {}, "seed must be a whole number from 0 on"),
        ([0], {"rows": 0}, "rows must be a whole number from 1 on, got 0"),
        ([0], {"max_faces": 2.0}, "max_faces must be a whole number from 1 on, got 2.0"),
        ([0], {"num_return_sequences": 2}, "leave out num_return_sequences: a mesh is made for each seed"),
        ([0], {"do_sample": False}, "leave out do_sample and num_beams"),
        ([0], {"num_beams": 2}, "leave out do_sample and num_beams"),
        ([0], {"prompt": [1] * 9}, "a prompt begins with the start face, 9 times the id 130"),
        ([0], {"prompt": START + END}, "after the start face a prompt holds coordinates alone, 0 to 128"),
        ([0], {"prompt": torch.zeros(2, 9).long()}, "a prompt is the ids of a mesh's beginning"),
        ([0], {"prompt": START + [0] * 18, "max_faces": 2}, "has 2 faces already: max_faces must be more, not 2"),
        ([0, 1], {"prompt": [START]}, "2 seeds need as many prompts, got 1"),
        ([0, 1], {"prompt": [START, [*START, 1]]}, "end in the same place of a face"),
    ],
)
def test_what_cannot_be_is_refused_at_once_in_plain_words(model, seeds, options, reason):
    with pytest.raises(ValueError, match=reason):
        generate_meshes(model, seeds, **options)


def test_the_pipeline_puts_meshes_in_the_order_of_their_seeds(model, monkeypatch):
    from transformers import pipeline

    generator = pipeline("mesh-generation", model=model, tokenizer=IFlameTokenizer(), device="cpu")
    expected = generator(num_meshes=7, max_faces=4, seed=3)
    source = many_iflame._batches
    monkeypatch.setattr(many_iflame, "_batches", lambda *arguments: (each for each in reversed([*source(*arguments)])))
    numbers = [number for number, _ in generator.as_finished(num_meshes=7, max_faces=4, seed=3)]
    assert numbers == [6, 5, 4, 3, 2, 1, 0]
    meshes = generator(num_meshes=7, max_faces=4, seed=3, batch_size=2)
    assert [mesh.metadata for mesh in meshes] == [mesh.metadata for mesh in expected]
    assert [mesh.vertices.tolist() for mesh in meshes] == [mesh.vertices.tolist() for mesh in expected]
    assert [mesh.metadata["seed"] for mesh in meshes] == [3, 4, 5, 6, 7, 8, 9]


def test_the_number_of_rows_is_chosen_by_the_device(model):
    assert default_rows(model) == 8
    assert [default_rows(SimpleNamespace(device=device)) for device in ("cuda", "cuda:1", "mps")] == [64, 64, 8]


# training/generate.py


def command_line(model_folder, out, **options):
    values = {"model": model_folder, "out": out, "num": NUM, "max_faces": MAX_FACES, **options}
    return ["--use_cpu", *(f"--{name}" + ("" if value is None else f"={value}") for name, value in values.items())]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".glb", ".jsonl")}


def records_so_far(folder):
    return [record for path in (folder / ".records").iterdir() for record in read_records(path.read_bytes())]


def records_of(folder):
    return [json.loads(line) for line in (folder / "meshes.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "meshes"
    assert generate.main(command_line(model_folder, out)) == 0
    return out


def test_the_meshes_are_those_of_their_seeds_and_recorded(whole, model):
    tokenizer = IFlameTokenizer()
    records = records_of(whole)
    meshes = {mesh.number: mesh for mesh in generate_meshes(model, range(NUM), top_k=0, max_faces=MAX_FACES)}
    assert [record["number"] for record in records] == list(range(NUM)) and {*os.listdir(whole)} == {
        *(record["file"] for record in records if record["file"]),
        *("generate.json", "meshes.jsonl", ".lock"),
    }
    for record in records:
        expected = tokenizer.decode_mesh(meshes[record["number"]].ids)
        assert record["seed"] == record["number"] and record["faces"] == len(expected.faces)
        assert record["ended"] == (record["faces"] < MAX_FACES)
        assert record["file"] == (f"mesh-{record['number']:06d}.glb" if record["faces"] else None)
        if record["file"]:
            mesh = trimesh.load_mesh(whole / record["file"], process=False)
            assert sorted(map(sorted, mesh.triangles.tolist())) == sorted(map(sorted, expected.triangles.tolist()))
    assert sum(record["file"] is not None for record in records) > NUM // 2
    settings = json.loads((whole / "generate.json").read_text())
    assert settings["seed"] == 0 and settings["max_faces"] == MAX_FACES and settings["dtype"] == "float32"


def test_two_processes_make_the_same_files_byte_for_byte(whole, model_folder, tmp_path):
    sampler = Sampler(tmp_path)
    said = sampler.finish(*sampler.start_ranks([command_line(model_folder, tmp_path / "out", rows=3)] * 2))
    assert "24 meshes to make with 2 x cpu" in said and f"meshes are in {tmp_path / 'out'}" in said
    assert files_of(tmp_path / "out") == files_of(whole)


def test_a_process_of_several_has_its_model_on_its_device(model_folder, one_process_group, monkeypatch):
    """transformers' pipeline leaves it where it is."""
    monkeypatch.setattr(making, "check_device", lambda name: None)
    generator = making.load_generator(str(model_folder), device="meta")
    assert generator.model.device == generator.device == torch.device("meta")


def test_machines_may_have_a_folder_each(whole, model_folder, tmp_path):
    outs = [tmp_path / "one", tmp_path / "deep" / "two"]
    sampler, arguments = Sampler(tmp_path), [command_line(model_folder, out) for out in outs]
    for missing in (24, 0):
        said = sampler.finish(*sampler.start_ranks(arguments))
        assert f"{missing} meshes to make with 2 x cpu" in said
        files = [files_of(out) for out in outs]
        assert files[0] | files[1] == files_of(whole)
        assert len(files[0]) + len(files[1]) == len(files_of(whole)) and "meshes.jsonl" in files[0]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_was_killed_goes_on_with_what_is_missing_alone(whole, model_folder, tmp_path, processes):
    out, sampler = tmp_path / "out", Sampler(tmp_path)
    arguments = command_line(model_folder, out, rows=1)
    running = sampler.start_ranks([arguments] * processes) if processes > 1 else [sampler.start(arguments)]
    wait_for_meshes(out, 4, *running)
    for process in running:
        os.kill(process.pid, signal.SIGKILL)
    for process in running:
        process.join()
    recorded = {record.file for record in records_so_far(out)} - {None}
    there = {name: (out / name).stat().st_ino for name in recorded}
    assert 3 <= len(there) < NUM - 1 and not (out / "meshes.jsonl").exists()
    (out / ".mesh-000023.glb.1.partial").write_bytes(b"glTF")
    assert generate.main(command_line(model_folder, out)) == 0
    assert files_of(out) == files_of(whole)
    assert {name: (out / name).stat().st_ino for name in there} == there
    assert not list(out.glob(".mesh-*")) and not (out / ".records").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_a_word_on_how_to_go_on(whole, model_folder, tmp_path, number, status):
    out, sampler = tmp_path / "out", Sampler(tmp_path)
    process = sampler.start(command_line(model_folder, out, rows=1))
    wait_for_meshes(out, 2, process)
    os.kill(process.pid, number)
    said = sampler.finish(process, status=status, seconds=30)
    there = len(records_so_far(out))
    assert said.endswith(f"stopped: {there} of 24 meshes are in {out}; the same command goes on\n"), said
    assert "Traceback" not in said and there < NUM
    assert generate.main(command_line(model_folder, out)) == 0
    assert files_of(out) == files_of(whole)


def test_more_meshes_follow_those_that_are_there_and_a_lost_file_is_made_again(whole, model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert generate.main(command_line(model_folder, out, num=5)) == 0
    assert len(records_of(out)) == 5
    next(out.glob("mesh-*.glb")).unlink()
    capsys.readouterr()
    assert generate.main(command_line(model_folder, out, rows=2)) == 0
    assert "20 meshes to make with 1 x cpu, 4 are there" in capsys.readouterr().err
    assert files_of(out) == files_of(whole)
    assert generate.main(command_line(model_folder, out)) == 0
    assert "0 meshes to make" in capsys.readouterr().err and files_of(out) == files_of(whole)


def error_of(capsys, arguments, status=1):
    capsys.readouterr()
    assert generate.main(arguments) == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "was"),
    [
        ({"top_p": 0.9}, "--top_p 1.0 (now 0.9)"),
        ({"closing_strength": 2}, "--closing_strength 0.0 (now 2.0)"),
        ({"no-keep_order": None}, "--keep_order True (now False)"),
        ({"seed": 1, "temperature": 0.5}, "--seed 0 (now 1), --temperature 1.0 (now 0.5)"),
        ({"dtype": "bfloat16"}, "--dtype float32 (now bfloat16)"),
        ({"format": "obj"}, "--format glb (now obj)"),
        ({"kv_cache_dtype": "int8"}, "--kv_cache_dtype None (now int8)"),
    ],
)
def test_other_options_are_refused_where_meshes_are(whole, model_folder, capsys, options, was):
    before = files_of(whole)
    said = error_of(capsys, command_line(model_folder, whole, **options))
    assert said == (
        f"generate: {whole} holds meshes made with {was}: give what they were made with to go on, choose another "
        "--out, or give --overwrite to begin anew"
    )
    assert files_of(whole) == before


def test_a_folder_that_was_begun_before_there_was_a_type_of_keys_is_gone_on_with(
    whole, model_folder, tmp_path, capsys
):
    out = shutil.copytree(whole, tmp_path / "out")
    settings = json.loads((out / "generate.json").read_text())
    assert settings.pop("kv_cache_dtype") is None
    (out / "generate.json").write_text(json.dumps(settings))
    assert generate.main(command_line(model_folder, out)) == 0
    assert "0 meshes to make" in capsys.readouterr().err
    assert "--kv_cache_dtype None (now int8)" in error_of(
        capsys, command_line(model_folder, out, kv_cache_dtype="int8")
    )


def test_other_weights_are_refused_too_and_overwriting_begins_anew(whole, model_folder, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    other = save(small_model(seed=1), tmp_path / "other")
    said = error_of(capsys, command_line(other, out))
    assert f"made with the weights of {model_folder} as they were; {other} has others: " in said
    assert generate.main(["--overwrite", *command_line(other, out, num=2, format="ply")]) == 0
    assert {path.suffix for path in out.glob("mesh-*")} == {".ply"} and len(records_of(out)) == 2
    copy = shutil.copytree(model_folder, tmp_path / "elsewhere")
    assert generate.main(command_line(copy, shutil.copytree(whole, tmp_path / "same"))) == 0


def test_what_goes_wrong_is_said_in_a_line(whole, model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    said = error_of(capsys, command_line(tmp_path / "nothing", out))
    assert said.startswith(f"generate: there is no folder {tmp_path / 'nothing'}") and not out.exists()
    (tmp_path / "file").write_text("")
    assert error_of(capsys, command_line(model_folder, tmp_path / "file" / "out")) == (
        f"generate: {tmp_path / 'file' / 'out'}: Not a directory"
    )
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mesh-000000.glb").write_bytes(b"")
    assert "holds meshes of another program" in error_of(capsys, command_line(model_folder, foreign))
    (foreign / "generate.json").write_text("{")
    assert "does not say what the meshes beside it are made with" in error_of(
        capsys, command_line(model_folder, foreign)
    )
    with pytest.raises(SystemExit) as ended:
        generate.main(command_line(model_folder, out, num=0))
    assert ended.value.code == 2 and "must be a whole number from 1 on, got 0" in capsys.readouterr().err
    assert not out.exists()


def test_the_script_runs_as_a_file_from_anywhere_and_ends_in_words(model_folder, tmp_path, monkeypatch, capfd):
    command = [generate.__file__, *command_line(model_folder, "out", num=2, top_p=2)]
    monkeypatch.setattr(sys, "argv", list(command))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(generate.__file__, run_name="__main__")
    assert end.value.code == 2 and capfd.readouterr().err.splitlines()[-1] == (
        "training/generate.py: error: argument --top_p: must be above 0 and at most 1, got 2"
    )
    command[-1] = "--top_p=0.9"
    run = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and len(records_of(tmp_path / "out")) == 2, run.stderr
    assert re.search(r"2 of 2 meshes; \d+\.\d+ meshes/s, \d+ faces/s\n", run.stderr)


def test_one_run_at_a_time_works_in_a_folder(tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr("training.run.resume.RELEASE_SECONDS", 0.1)
    accelerator = Accelerator(cpu=True)
    with lock(tmp_path, accelerator, "generates", "--out"):
        with pytest.raises(ValueError, match=r"another process generates in .* choose another --out$"):
            with lock(tmp_path, accelerator, "generates", "--out"):
                pass


def test_a_mesh_without_a_face_has_a_record_and_is_not_tried_again(tmp_path, capsys):
    empty = small_model()
    with torch.no_grad():
        empty.lm_head.bias[EOS] += 50
    arguments = command_line(save(empty, tmp_path / "empty"), tmp_path / "out", num=3)
    said = "0 meshes are in {}; 3 have no face and no file: try another --seed, or a model that has been trained"
    assert said.format(tmp_path / "out") in error_of(capsys, arguments)
    assert [(record["faces"], record["file"]) for record in records_of(tmp_path / "out")] == [(0, None)] * 3
    assert generate.main(arguments) == 1
    assert "0 meshes to make with 1 x cpu, 3 are there" in capsys.readouterr().err


def test_records_are_read_as_they_come_and_half_a_line_is_none(tmp_path):
    (tmp_path / ".records").mkdir()
    first, second = RecordWriter(tmp_path, 0), RecordWriter(tmp_path, 1)
    records = [MeshRecord(number, number, 3, True, f"mesh-{number:06d}.glb") for number in range(3)]
    first.append(records[0])
    reader = RecordReader(tmp_path)
    assert reader.read() == []
    second.append(records[1])
    whole = json.dumps(asdict(records[2])).encode() + b"\n"
    first.file.write(whole[:20])
    assert reader.read() == [records[1]]
    first.file.write(whole[20:])
    assert reader.read() == [records[2]] and reader.read() == []
    assert list(read_records(whole + b"\nnull\n" + whole[:-1])) == [records[2]]
    first.close()
    second.close()
