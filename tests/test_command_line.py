"""The command `iflame`, as a process and by its main()."""

import configparser
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import webbrowser
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from mesh_fixtures import solids
from safetensors.torch import load_file, save_file
from small_models import BOS, EOS, PAD, small_model
from tqdm import tqdm

from hub_upload import lay_out_cache
from iflame_cli import command_line
from iflame_cli.command_line import build_parser, main
from iflame_cli.generating import Progress
from iflame_cli.tokenizing import measure
from iflame_cli.viewing import MARK
from iflame_hf import IFlameTokenizer, export_mesh

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("generate", "complete", "tokenize", "view")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model that now and then ends a mesh, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "small"
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[[PAD, BOS]] -= 20
        model.lm_head.bias[EOS] -= 1
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def part(tmp_path):
    """The first faces of a generated mesh."""
    tokenizer = IFlameTokenizer()
    mesh = tokenizer.decode_mesh(tokenizer.encode_mesh(solids()["torus"])[: 9 * 9])
    return export_mesh(mesh, tmp_path / "part.glb", winding="kept")


def command():
    """The console script where it is installed."""
    script = shutil.which("iflame", path=os.path.dirname(sys.executable))
    return [script] if script else [sys.executable, "-m", "iflame_cli"]


def process(*arguments, cwd, **settings):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | settings
    return subprocess.run(
        [*command(), *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def generate(model, out, *arguments, faces=5):
    return main(["generate", model, "--out", str(out), "--max-faces", str(faces), "--device", "cpu", *arguments])


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def drop_a_weight(path):
    weights = load_file(path)
    del weights["lm_head.bias"]
    save_file(weights, path, metadata={"format": "pt"})


# Help and wrong use


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_that_can_be_parsed(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    examples = re.findall(rf"^  iflame ({name} .+)$", text.split("examples:")[1], re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        assert build_parser().parse_args(example.split()).command == name


def test_help_comes_without_loading_torch(tmp_path):
    source = (
        "import sys, iflame_cli.command_line as c\n"
        "try:\n    c.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'trimesh'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(f"    {name} " in run.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("", "required: COMMAND"),
        ("polish x", "invalid choice: 'polish'"),
        ("generate", "required: MODEL"),
        ("generate x --num 0", "--num: must be a whole number from 1 on, got 0"),
        ("generate x --num many", "--num: invalid whole_number value: 'many'"),
        ("generate x --temperature 0", "--temperature: must be above 0, got 0"),
        ("generate x --top-p 1.5", "--top-p: must be above 0 and at most 1, got 1.5"),
        ("generate x --temperature nan", "--temperature: must be"),
        ("generate x --format fbx", "--format: invalid choice: 'fbx'"),
        ("complete x", "required: PART"),
        ("complete x y --room-above 1 --bounds 0 0 0 1 1 1", "not allowed with"),
        ("complete x y --room-above -1", "must be at least 0"),
        ("view", "required: DIR|MESH"),
    ],
)
def test_wrong_use_ends_with_2_and_the_reason(arguments, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_the_command_is_a_console_script():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    assert parser["options.entry_points"]["console_scripts"].split("\n")[1:] == [
        "iflame = iflame_cli.command_line:main"
    ]
    packages = {path.parent.name for path in ROOT.glob("iflame_*/__init__.py")}
    assert set(parser["options"]["packages"].split()) == packages == {"iflame_cli", "iflame_hf"}


# generate


def test_generate_writes_numbered_meshes_and_a_record_as_a_process(model, tmp_path):
    arguments = (
        "generate",
        model,
        "--num",
        11,
        "--out",
        "some/meshes",
        "--max-faces",
        5,
        "--seed",
        1,
        "--batch-size",
        4,
    )
    run = process(*arguments, "--device", "cpu", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    out = tmp_path / "some" / "meshes"
    record = json.loads((out / "meshes.json").read_text())
    assert record["seed"] == 1 and record["max_faces"] == 5 and len(record["meshes"]) == 11
    named = [entry["file"] for entry in record["meshes"]]
    written = {f"mesh-{number:02d}.glb" for number in range(11) if named[number]}
    assert set(files_of(out)) == written | {"meshes.json"} and len(written) > 5
    for entry in record["meshes"]:
        assert set(entry) >= {"faces", "vertices", "ended"}
        if entry["file"]:
            mesh = trimesh.load_mesh(out / entry["file"], process=False)
            assert (len(mesh.faces), len(mesh.vertices)) == (entry["faces"], entry["vertices"])
            assert f"{os.path.join('some', 'meshes', entry['file'])}  {entry['faces']} faces" in run.stdout
    assert "Traceback" not in run.stderr and "Loading weights" not in run.stderr


def test_a_seed_gives_the_same_meshes_and_an_unsaid_one_is_told(model, tmp_path, capsys):
    for out, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert generate(model, tmp_path / out, "--num", "3", "--seed", seed) == 0
    meshes = {out: files_of(tmp_path / out) for out in "abc"}
    assert meshes["a"] == meshes["b"] and meshes["a"] != meshes["c"]
    capsys.readouterr()
    assert generate(model, tmp_path / "d", "--num", "3") == 0
    seed = re.search(r"--seed (\d+) for the same meshes", capsys.readouterr().out)[1]
    assert generate(model, tmp_path / "e", "--num", "3", "--seed", seed) == 0
    assert files_of(tmp_path / "d") == files_of(tmp_path / "e")


def test_the_meshes_are_those_of_the_pipeline(model, tmp_path):
    from transformers import pipeline

    options = {"temperature": 0.8, "top_p": 0.9, "top_k": 40}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert generate(model, tmp_path, "--num", "3", "--seed", "5", "--format", "obj", *arguments) == 0
    expected = pipeline("mesh-generation", model=model, device="cpu")(num_meshes=3, max_faces=5, seed=5, **options)
    for number, mesh in enumerate(expected):
        path = tmp_path / f"mesh-{number:02d}.obj"
        assert path.exists() == bool(len(mesh.faces))
        if len(mesh.faces):
            assert len(trimesh.load_mesh(path, process=False).faces) == len(mesh.faces)
    assert list(tmp_path.glob("*.obj"))


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply", "stl"])
def test_every_format_can_be_written_with_normals_and_licence(model, suffix, tmp_path):
    arguments = ["--format", suffix, "--normals", "--license", "cc0-1.0", "--seed", "1", "--num", "2"]
    assert generate(model, tmp_path, *arguments, faces=9) == 0
    paths = list(tmp_path.glob(f"*.{suffix}"))
    assert paths
    for path in paths:
        assert len(trimesh.load_mesh(path).faces) > 0
        assert b"cc0-1.0" in path.read_bytes()


def test_nothing_is_overwritten_unless_asked_for(model, tmp_path, capsys):
    assert generate(model, tmp_path, "--num", "2", "--seed", "1") == 0
    before = files_of(tmp_path)
    assert generate(model, tmp_path, "--num", "2", "--seed", "2") == 1
    assert "exists already: choose another --out, or give --overwrite" in capsys.readouterr().err
    assert files_of(tmp_path) == before
    assert generate(model, tmp_path, "--num", "2", "--seed", "2", "--overwrite") == 0
    assert files_of(tmp_path) != before


def test_a_mesh_without_a_face_has_no_file_and_none_at_all_is_a_failure(tmp_path, capsys):
    empty = small_model()
    with torch.no_grad():
        empty.lm_head.bias[EOS] += 50
    empty.save_pretrained(tmp_path / "empty")
    IFlameTokenizer().save_pretrained(tmp_path / "empty")
    assert generate(str(tmp_path / "empty"), tmp_path / "out", "--num", "2") == 1
    assert "nothing was written" in capsys.readouterr().err
    assert [entry["file"] for entry in json.loads((tmp_path / "out" / "meshes.json").read_text())["meshes"]] == [
        None
    ] * 2


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "holds no model: there is no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "no iFlame model.*'gpt2'"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: drop_a_weight(folder / "model.safetensors"), "its weights lack lm_head.bias"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_with_1_and_one_line(model, damage, reason, tmp_path, capsys):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    damage(folder)
    assert generate(str(folder), tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert re.search(reason, error) and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_is_found_by_its_name_on_the_hub(model, tmp_path):
    lay_out_cache(Path(model), tmp_path / "home", "some-user/small")
    arguments = ("generate", "some-user/small", "--revision", "main", "--max-faces", 5, "--seed", 1, "--device", "cpu")
    run = process(*arguments, cwd=tmp_path, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    assert run.returncode == 0, run.stderr
    assert generate(model, tmp_path / "expected", "--seed", "1") == 0
    name = "mesh-00.glb"
    meshes = [trimesh.load_mesh(tmp_path / folder / name, process=False) for folder in ("meshes", "expected")]
    assert np.array_equal(meshes[0].triangles, meshes[1].triangles)


def test_a_name_that_the_hub_does_not_have_ends_with_1(tmp_path, capsys):
    assert generate("nobody/nothing-at-all", tmp_path / "out") == 1
    assert "the model nobody/nothing-at-all cannot be loaded" in capsys.readouterr().err


def test_too_little_memory_is_told_with_advice(monkeypatch, capsys):
    def full(options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(command_line, "_run", full)
    assert main(["generate", "x"]) == 1
    assert capsys.readouterr().err == (
        "iflame: the memory of the device does not suffice: try a smaller --batch-size, or --device cpu\n"
    )


def test_the_bar_counts_meshes_as_they_end_and_the_faces_so_far():
    written = io.StringIO()
    with tqdm(total=5, initial=2, file=written, mininterval=0) as bar:
        progress = Progress(bar, EOS)
        rows = torch.tensor([[BOS] * 9 + [1] * 18, [BOS] * 9 + [1] * 9 + [EOS] * 9])
        assert progress(rows[:, :18], None).tolist() == [False, False] and bar.n == 2
        assert progress(rows, None).tolist() == [False, False] and bar.n == 3
    assert "3/5" in written.getvalue() and "faces=2" in written.getvalue()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_ctrl_c_keeps_what_is_written_and_ends_with_130(model, tmp_path):
    arguments = ["generate", model, "--num", "5000", "--out", "out", "--max-faces", "3", "--batch-size", "1"]
    running = subprocess.Popen(
        [*command(), *arguments, "--device", "cpu"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "faces" in running.stdout.readline()
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 130
    assert error.strip().endswith("iflame: stopped") and "Traceback" not in error
    record = json.loads((tmp_path / "out" / "meshes.json").read_text())
    named = {entry["file"] for entry in record["meshes"]} - {None}
    found = {path.name for path in (tmp_path / "out").iterdir()} - {"meshes.json"}
    assert named and named <= found and len(found - named) <= 1
    assert not [name for name in found if "partial" in name]


# complete


def test_complete_goes_on_from_a_part_as_a_process(model, part, tmp_path):
    arguments = (
        "complete",
        model,
        part.name,
        "--num",
        2,
        "--max-faces",
        14,
        "--seed",
        1,
        "--device",
        "cpu",
        "--out",
        "o",
    )
    run = process(*arguments, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "o" / "meshes.json").read_text())
    assert [entry["part"] for entry in record["meshes"]] == ["part.glb"] * 2
    given = trimesh.load_mesh(part, process=False)
    corners = {tuple(vertex) for vertex in np.asarray(given.vertices).tolist()}
    for number in range(2):
        mesh = trimesh.load_mesh(tmp_path / "o" / f"part-completed-0{number}.glb", process=False)
        assert corners <= {tuple(vertex) for vertex in np.asarray(mesh.vertices).tolist()}
    assert max(entry["faces"] for entry in record["meshes"]) > len(given.faces) == 8


@pytest.mark.parametrize("suffix", ["obj", "stl"])
def test_complete_keeps_the_place_and_units_of_the_part(model, suffix, tmp_path):
    legs = trimesh.creation.box(extents=(40, 20, 40))
    legs.apply_translation((100, 10, -50))
    path = export_mesh(legs, tmp_path / f"legs.{suffix}")  # stl turns it so that z is up
    arguments = [
        "complete",
        model,
        str(path),
        "--max-faces",
        "20",
        "--seed",
        "1",
        "--device",
        "cpu",
        "--format",
        suffix,
    ]
    assert main([*arguments, "--room-above", "1", "--out", str(tmp_path / "room")]) == 0
    completed = trimesh.load_mesh(tmp_path / "room" / f"legs-completed-00.{suffix}")
    given = trimesh.load_mesh(path)
    near = np.abs(np.asarray(completed.vertices)[:, None] - np.asarray(given.vertices)[None]).max(axis=2).min(axis=0)
    assert near.max() < 40 / 128, "every corner of the part is there, to half a step"
    up = 1 if suffix == "obj" else 2
    assert completed.bounds[1][up] <= given.bounds[0][up] + 40 + 0.2
    assert main([*arguments, "--out", str(tmp_path / "no")]) == 1


def test_a_part_that_needs_a_place_is_told_how_to_get_one(model, tmp_path, capsys):
    path = export_mesh(trimesh.creation.box(extents=(3, 3, 3)), tmp_path / "big.glb")
    assert main(["complete", model, str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "big.glb" in error and "--room-above or --bounds" in error
    assert not (tmp_path / "out").exists()


def test_all_parts_are_looked_at_before_the_first_is_completed(model, part, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["complete", model, str(part), str(tmp_path / "none.obj"), *arguments]) == 1
    assert "none.obj: no such file" in capsys.readouterr().err
    (tmp_path / "bad.obj").write_text("nothing")
    assert main(["complete", model, str(part), str(tmp_path / "bad.obj"), *arguments]) == 1
    assert "bad.obj" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    twin = shutil.copy(part, tmp_path / "other" / "part.glb")
    assert main(["complete", model, str(part), str(twin), *arguments]) == 1
    assert "the same name" in capsys.readouterr().err
    assert main(["complete", model, str(part), "--max-faces", "8", *arguments]) == 1
    assert "--max-faces must be more" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.glb"))


# tokenize


def spoilt_box(path):
    """A box with a vertex twice, a face on two corners, a face repeated, and a needle that rounding flattens."""
    box = trimesh.creation.box(extents=(2, 4, 2))
    vertices = [*box.vertices.tolist(), box.vertices[0].tolist(), [1, 2, 1 - 1e-4]]
    faces = [*box.faces.tolist(), box.faces[3][::-1].tolist(), [0, 8, 5], [7, 9, 6]]
    lines = ["v {} {} {}".format(*vertex) for vertex in vertices]
    path.write_text("\n".join(lines + ["f {} {} {}".format(*(np.array(face) + 1)) for face in faces]) + "\n")
    return path


def test_tokenize_counts_what_was_dropped_and_why_as_a_process(tmp_path):
    path = spoilt_box(tmp_path / "spoilt.obj")
    run = process("tokenize", path.name, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "read     10 vertices, 15 faces, open; longest side 4, y up" in run.stdout
    assert "kept     8 vertices, 12 faces, closed; 126 tokens" in run.stdout
    assert (
        "1 had two equal corners; 1 became a line or a point when rounded; 1 lay on the vertices of another: dropped"
        in run.stdout
    )
    assert "1 were at the place of another; 1 fell together with another when rounded: merged" in run.stdout
    assert "one step is 0.0312" in run.stdout
    run = process("tokenize", path.name, "--json", "--resolution", 64, cwd=tmp_path)
    found = json.loads(run.stdout)
    assert found["faces_repeated"] == found["faces_flattened_by_rounding"] == found["faces_with_equal_corners"] == 1
    assert found["step"] == 4 / 64 and found["largest_error"] == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("name", solids())
def test_the_counts_add_up_and_the_error_is_that_of_rounding(name, tmp_path):
    mesh = solids()[name]
    path = export_mesh(mesh, tmp_path / "mesh.glb")
    tokenizer = IFlameTokenizer(coordinate_resolution=32)
    found = measure(path, tokenizer)
    dropped = sum(found[k] for k in ("faces_with_equal_corners", "faces_flattened_by_rounding", "faces_repeated"))
    assert found["kept_faces"] == found["faces"] - dropped == (found["tokens"] - 18) // 9
    merged = found["vertices_welded"] + found["vertices_merged_by_rounding"]
    assert found["kept_vertices"] <= found["vertices"] - merged
    assert found["mean_error"] <= found["largest_error"] <= 3**0.5 / 2 * found["step"] * 1.0001
    assert (found["mean_error"] > 0) == (name != "box"), "the corners of the box lie on levels"
    assert found["longest_side"] == pytest.approx(mesh.extents.max(), rel=1e-6)
    assert found["closed_before"]


def test_tokenize_minds_the_vertical_axis_of_a_format(tmp_path):
    mesh = trimesh.creation.cone(1, 4)
    assert measure(export_mesh(mesh, tmp_path / "a.stl"), IFlameTokenizer())["up_axis"] == "z"
    assert measure(export_mesh(mesh, tmp_path / "a.glb"), IFlameTokenizer())["up_axis"] == "y"
    assert measure(tmp_path / "a.glb", IFlameTokenizer(), "z")["up_axis"] == "z"


def test_tokenize_goes_on_after_a_bad_file_and_ends_with_1(tmp_path, capsys):
    good = export_mesh(trimesh.creation.box(), tmp_path / "good.glb")
    (tmp_path / "bad.obj").write_text("nothing")
    assert main(["tokenize", str(tmp_path / "bad.obj"), str(tmp_path / "none.ply"), str(good)]) == 1
    output = capsys.readouterr()
    assert "good.glb" in output.out and "12 faces" in output.out
    assert "bad.obj" in output.err and "none.ply: no such file" in output.err and "2 of 3" in output.err


# view


def test_view_writes_one_page_that_needs_nothing_else_as_a_process(tmp_path):
    for name, mesh in solids().items():
        export_mesh(mesh, tmp_path / f"{name}.{'stl' if name == 'torus' else 'glb'}")
    run = process("view", ".", "--no-browser", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "view.html"
    page = (tmp_path / "view.html").read_text(encoding="utf-8")
    for name, mesh in solids().items():
        assert re.search(rf"{name}\.(glb|stl), {len(mesh.faces)} faces", page)
    assert MARK in page and "http" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)


def test_the_page_holds_every_mesh_of_one_size_side_by_side_on_a_floor(tmp_path):
    import base64

    for name, mesh in solids().items():
        export_mesh(mesh, tmp_path / f"{name}.glb")
    assert main(["view", str(tmp_path), "--no-browser"]) == 0
    (data,) = re.findall(r'base64_data="([^"]+)"', (tmp_path / "view.html").read_text(encoding="utf-8"))
    scene = trimesh.load_scene(io.BytesIO(base64.b64decode(data)), file_type="glb")
    assert len(scene.geometry) == len(solids())
    boxes = [mesh.bounds for mesh in scene.geometry.values()]
    for low, high in boxes:
        assert (high - low).max() == pytest.approx(1) and low[1] == pytest.approx(0, abs=1e-6)
    apart = [((a[0] > b[1]) | (b[0] > a[1]))[[0, 2]].any() for i, a in enumerate(boxes) for b in boxes[:i]]
    assert all(apart) and len(apart) == 6


def test_view_opens_the_browser_unless_told_not_to(tmp_path, monkeypatch, capsys):
    export_mesh(trimesh.creation.box(), tmp_path / "box.glb")
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    assert main(["view", str(tmp_path)]) == 0
    assert opened == [(tmp_path / "view.html").resolve().as_uri()]
    assert main(["view", str(tmp_path), "--no-browser"]) == 0, "its own page is written anew"
    assert len(opened) == 1
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    assert main(["view", str(tmp_path)]) == 0
    assert "open the page yourself" in capsys.readouterr().err


def test_view_leaves_others_pages_alone_and_says_what_is_not_there(tmp_path, capsys):
    box = export_mesh(trimesh.creation.box(), tmp_path / "box.glb")
    (tmp_path / "view.html").write_text("my own page")
    assert main(["view", str(tmp_path), "--no-browser"]) == 1
    assert "was not written by this command" in capsys.readouterr().err
    assert (tmp_path / "view.html").read_text() == "my own page"
    assert main(["view", str(box), "--page", str(tmp_path / "b.html"), "--no-browser"]) == 0
    (tmp_path / "empty").mkdir()
    for source, reason in (("empty", "holds no mesh files"), ("none", "no such file or folder")):
        assert main(["view", str(tmp_path / source), "--no-browser"]) == 1
        assert reason in capsys.readouterr().err
    (tmp_path / "empty" / "bad.obj").write_text("nothing")
    assert main(["view", str(tmp_path / "empty"), "--no-browser"]) == 1
    assert "left out" in capsys.readouterr().err


def test_a_name_that_is_html_stays_a_name(tmp_path):
    path = export_mesh(trimesh.creation.box(), tmp_path / "<img src=x>.glb")
    assert main(["view", str(path), "--page", str(tmp_path / "p.html"), "--no-browser"]) == 0
    assert "<img" not in (tmp_path / "p.html").read_text(encoding="utf-8")
