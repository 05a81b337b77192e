"""Many meshes of drawn lengths: each comes once, as long as drawn, and nothing else is timed."""

import json

import numpy as np
import pytest
import torch

from benchmarks import bench_many
from benchmarks.oracle import WrongResult
from iflame_hf import many_iflame
from iflame_hf.format_iflame import known_format

FORMAT = known_format()
SIZES = "--device cpu --hidden_size 32 --num_attention_heads 4 --stage_layers 1 1 2 1 1 --meshes 14 --rows 3".split()
LENGTHS = [2, 3, 4, 5, 9, 20]


@pytest.fixture
def arguments(tmp_path):
    file = tmp_path / "lengths.txt"
    file.write_text("\n".join(map(str, LENGTHS)))
    return [*SIZES, "--lengths", str(file)]


def run(capsys, arguments):
    """Exit status, everything printed, and the JSON of the last line."""
    status = bench_many.main(arguments)
    printed = capsys.readouterr().out.rstrip("\n")
    return status, printed, json.loads(printed.splitlines()[-1])


def test_refilled_rows_are_measured_beside_fixed_batches_of_the_same_meshes(capsys, arguments, tmp_path):
    status, printed, result = run(capsys, arguments)
    assert status == 0, printed
    assert {"machine", "gpu", "torch", "transformers", "commit", "dtype", "seed", "schedule"} <= result.keys()
    assert result["benchmark"] == "many" and result["lengths"] == "lengths.txt" and str(tmp_path) not in printed
    fixed, refilled = result["rows"]
    assert (fixed["schedule"], refilled["schedule"]) == ("fixed", "refilled")
    faces = bench_many.draw_faces(np.array(LENGTHS), 14, seed=0)
    longest = [max(faces[first : first + 3]) for first in range(0, 14, 3)]
    assert fixed["occupancy"] == pytest.approx(faces.sum() / (3 * sum(longest)))
    assert fixed["occupancy"] < refilled["occupancy"] <= 1
    assert refilled["same_meshes"] == 1
    assert refilled["times_fixed"] == pytest.approx(fixed["seconds"][0] / refilled["seconds"][0])
    for row in result["rows"]:
        (seconds,) = row["seconds"]
        assert (row["batch_size"], row["meshes"], row["mean_faces"]) == (3, 14, faces.mean())
        assert row["meshes_per_second"] == pytest.approx([14 / seconds])
        assert row["faces_per_second"] == pytest.approx([faces.sum() / seconds])
        assert row["tokens_per_second"] == pytest.approx([9 * faces.sum() / seconds])


def test_one_schedule_may_be_measured_alone_and_several_times(capsys, arguments):
    status, _, result = run(capsys, [*arguments, "--schedule", "refilled", "--rows", "2", "3", "--repeats", "2"])
    assert status == 0
    assert [(row["schedule"], row["batch_size"]) for row in result["rows"]] == [("refilled", 2), ("refilled", 3)]
    for row in result["rows"]:
        assert len(row["seconds"]) == 2 and 0 < row["occupancy"] <= 1 and "times_fixed" not in row


def test_faces_are_drawn_as_often_as_they_are_among_artists_meshes():
    percentiles = np.array(bench_many.ARTIST_FACES)
    assert len(percentiles) == 101 and (np.diff(percentiles) >= 0).all() and percentiles.max() == 800
    faces = bench_many.draw_faces(percentiles, 40_000, seed=3)
    assert faces.shape == (40_000,) and 4 <= faces.min() and faces.max() <= 800
    assert faces.mean() == pytest.approx(233, rel=0.02)
    assert np.percentile(faces, range(5, 100, 5)) == pytest.approx(percentiles[5:100:5], rel=0.05)
    assert (faces == bench_many.draw_faces(percentiles, 40_000, seed=3)).all()
    assert (faces != bench_many.draw_faces(percentiles, 40_000, seed=4)).any()


def lasts_a_face_longer(jobs):
    return [job._replace(faces=job.faces + 1) for job in jobs]


def leaves_one_out(jobs):
    return jobs[1:]


def makes_one_twice(jobs):
    return [jobs[1], *jobs[1:]]


def ends_by_itself(jobs):
    return [job._replace(faces=None) for job in jobs]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lasts_a_face_longer, "faces, not"),
        (ends_by_itself, "faces, not"),
        (leaves_one_out, "of 14 meshes came 13, and 13 in all"),
        (makes_one_twice, "of 14 meshes came 13, and 14 in all"),
    ],
)
def test_meshes_that_are_not_those_drawn_have_no_figures(capsys, monkeypatch, arguments, fault, message):
    real = bench_many.jobs_for

    def jobs_for(faces, seed):
        jobs = real(faces, seed)
        return fault(jobs) if len(jobs) == 14 else jobs  # the warm-up makes seven

    monkeypatch.setattr(bench_many, "jobs_for", jobs_for)
    status, _, result = run(capsys, arguments)
    assert status == 1
    for row in result["rows"]:
        assert message in row["wrong"] and "seconds" not in row and "times_fixed" not in row


def test_a_mesh_must_be_whole():
    faces = torch.tensor([[[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 0, 0], [1, 0, 0], [0, 0, 1]]])
    ids = torch.from_numpy(FORMAT.to_ids(faces.numpy(), start=True, end=True))
    job = many_iflame._Job(0, 0, ids[:9])
    bench_many.require_meshes([(job, ids)], np.array([2]))
    broken = ids.clone()
    broken[18:27] = broken[9:18]  # one face twice
    cut = torch.cat([ids[:-9], ids[:9]])  # a start face for an end
    for wrong in (ids[:-1], ids[9:], broken, cut):
        with pytest.raises(WrongResult, match="mesh 0 has"):
            bench_many.require_meshes([(job, wrong)], np.array([2]))


@pytest.mark.parametrize("text", ["", "3\n0\n", "3\nfour\n"])
def test_a_file_without_numbers_of_faces_is_refused(capsys, tmp_path, text):
    file = tmp_path / "lengths.txt"
    file.write_text(text)
    for path in (file, tmp_path / "none.txt"):
        with pytest.raises(SystemExit) as end:
            bench_many.main([*SIZES, "--lengths", str(path)])
        assert end.value.code == 2 and path.name in capsys.readouterr().err
