"""What is sound and what is not about meshes, against trimesh, loops written out and cases known by hand."""

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_fixtures import random_mesh, reference_meshes, solids

from iflame_hf.mesh_errors_iflame import MeshError
from training.metrics import Topology, mean_topology, topologies, topology

CUBE = trimesh.creation.box()
STRIP = [[0, 1, 2], [1, 3, 2]]  # two triangles that share the edge of vertices 1 and 2
SQUARE = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]


def moved(mesh, by):
    return trimesh.Trimesh(mesh.vertices + by, mesh.faces, process=False)


def found_in(mesh):
    return topology(mesh.vertices, mesh.faces)


def test_a_cube_is_closed_and_has_18_edges():
    assert found_in(CUBE) == Topology(
        faces=12,
        edges=18,
        closed=True,
        manifold_edges=1.0,
        boundary_edges=0.0,
        flipped_edges=0,
        repeated_faces=0,
        degenerate_faces=0,
        pieces=1,
        small_angles=0.0,
    )


def test_a_box_without_a_lid_is_open_along_its_rim():
    is_lid = (CUBE.vertices[CUBE.faces][:, :, 2] == 0.5).all(axis=1)
    found = topology(CUBE.vertices, CUBE.faces[~is_lid])
    assert is_lid.sum() == 2 and found.faces == 10 and found.edges == 17  # the lid's diagonal is gone
    assert not found.closed and found.boundary_edges == 4 / 17 and found.manifold_edges == 13 / 17
    assert found.pieces == 1 and found.flipped_edges == 0


def test_a_reversed_face_flips_its_three_edges():
    faces = CUBE.faces.copy()
    faces[4] = faces[4, ::-1]
    found = topology(CUBE.vertices, faces)
    assert found.flipped_edges == 3 and found.closed


def test_a_moebius_strip_is_flipped_wherever_it_is_closed():
    ring = np.arange(5)
    faces = np.stack([ring, (ring + 1) % 5, (ring + 2) % 5], axis=1)  # five triangles, each turned against the last
    faces[1::2] = faces[1::2, ::-1]
    vertices = np.random.default_rng(0).normal(size=(5, 3))
    found = topology(vertices, faces)
    assert found.edges == 10 and found.boundary_edges == 0.5 and found.manifold_edges == 0.5
    assert found.flipped_edges == 1 and found.pieces == 1  # no winding of an odd ring gives none


def test_pieces_are_joined_by_edges_not_by_vertices():
    apart = trimesh.util.concatenate(CUBE, moved(CUBE, [5, 0, 0]))
    assert found_in(apart).pieces == 2 and found_in(apart).closed
    at_a_corner = trimesh.util.concatenate(CUBE, moved(CUBE, [1, 1, 1]))
    at_a_corner.merge_vertices()
    assert len(at_a_corner.vertices) == 15 and found_in(at_a_corner).pieces == 2
    at_an_edge = trimesh.util.concatenate(CUBE, moved(CUBE, [1, 1, 0]))
    at_an_edge.merge_vertices()
    found = found_in(at_an_edge)
    assert len(at_an_edge.vertices) == 14 and found.pieces == 1  # by an edge of four faces
    assert found.edges == 35 and found.manifold_edges == 34 / 35 and found.boundary_edges == 0 and not found.closed


def test_repeated_and_degenerate_faces_are_counted():
    faces = [*STRIP, [2, 0, 1], [1, 0, 2], [0, 0, 1], [3, 2, 2]]
    found = topology(SQUARE, faces)
    assert found.faces == 6 and found.repeated_faces == 2 and found.degenerate_faces == 2
    assert found.edges == 5 and found.boundary_edges == 2 / 5 and found.pieces == 1
    line = topology([[0, 0, 0], [1, 0, 0], [3, 0, 0], [0, 2, 0]], [[0, 1, 2], [0, 2, 3]])
    assert line.degenerate_faces == 1 and line.edges == 5 and line.small_angles == 0.5
    slanted = np.outer([0, 1, 3], [0.1, 0.7, 0.3]) + 0.2  # a line but for rounding
    assert topology(slanted, [[0, 1, 2]]).degenerate_faces == 1
    nothing = topology(SQUARE, [[0, 0, 1], [2, 3, 3]])
    assert nothing.edges == 0 and nothing.pieces == 0 and not nothing.closed and nothing.degenerate_faces == 2
    two_in_one_place = topology([[0, 0, 0], [0, 0, 0], [1, 1, 0]], [[0, 1, 2]])
    assert two_in_one_place.degenerate_faces == 1 and two_in_one_place.edges == 3


@pytest.mark.parametrize("degrees, share", [(0.9, 1.0), (1.1, 0.0)])
def test_an_angle_is_small_below_one_degree(degrees, share):
    angle = np.radians(degrees)
    for turn in np.eye(3)[[[0, 1, 2], [1, 2, 0], [2, 0, 1]]]:
        found = topology(np.array([[0, 0, 0], [1, 0, 0], [np.cos(angle), np.sin(angle), 0]]) @ turn, [[0, 1, 2]])
        assert found.small_angles == share and found.degenerate_faces == 0


def known_to_trimesh(vertices, faces):
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    split = trimesh.graph.connected_components(mesh.face_adjacency, nodes=np.arange(len(mesh.faces)))
    small = (np.degrees(mesh.face_angles.min(axis=1)) < 1).mean()
    return mesh.is_watertight, mesh.is_winding_consistent, len(mesh.edges_unique), len(split), mesh.body_count, small


@pytest.mark.parametrize("name, mesh", solids().items())
def test_closed_meshes_are_what_trimesh_says(name, mesh):
    found = found_in(mesh)
    assert known_to_trimesh(mesh.vertices, mesh.faces) == (
        found.closed,
        found.flipped_edges == 0,
        found.edges,
        found.pieces,
        found.pieces,
        found.small_angles,
    )
    assert found.closed and len(mesh.vertices) - found.edges + found.faces == mesh.euler_number


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), vertex_count=st.integers(4, 40), face_count=st.integers(1, 60))
def test_random_meshes_are_what_trimesh_says_in_any_order(seed, vertex_count, face_count):
    vertices, faces = random_mesh(seed, vertex_count, face_count)
    found = topology(vertices, faces)
    tight, consistent, edges, _, _, small = known_to_trimesh(vertices, faces)
    assert (found.closed, found.edges) == (tight, edges) and found.small_angles == pytest.approx(small)
    assert (found.flipped_edges == 0) == consistent
    graph, labels = {}, list(range(face_count))  # pieces and edges, by going from face to face
    for face, (a, b, c) in enumerate(faces.tolist()):
        for edge in ((a, b), (b, c), (c, a)):
            graph.setdefault(frozenset(edge), []).append((face, edge))
    for sides in graph.values():
        for face, _ in sides:
            old, new = labels[face], labels[sides[0][0]]
            labels = [new if each == old else each for each in labels]
    assert found.pieces == len(set(labels))
    assert found.boundary_edges == sum(len(sides) == 1 for sides in graph.values()) / len(graph)
    assert found.manifold_edges == sum(len(sides) == 2 for sides in graph.values()) / len(graph)
    assert found.flipped_edges == sum(len(s) == 2 and s[0][1] == s[1][1] for s in graph.values())
    assert found.repeated_faces == face_count - len({frozenset(face) for face in faces.tolist()})
    random = np.random.default_rng(seed)
    names = random.permutation(vertex_count)
    shuffled = np.roll(names[faces][random.permutation(face_count)], 1, axis=1)
    moved_vertices = np.empty_like(vertices)
    moved_vertices[names] = vertices
    assert topology(moved_vertices, shuffled) == found


def test_meshes_of_the_reference_are_open_or_closed_as_trimesh_says():
    for vertices, faces, _ in reference_meshes().values():
        mesh = trimesh.Trimesh(vertices, faces)  # welds
        found = found_in(mesh)
        assert (found.closed, found.edges) == (mesh.is_watertight, len(mesh.edges_unique))
        assert found.flipped_edges > 0 or mesh.is_winding_consistent


def test_a_set_has_the_means_of_its_meshes():
    meshes = [(CUBE.vertices, CUBE.faces), (SQUARE, STRIP), (SQUARE, [[0, 1, 2]])]
    means = mean_topology(meshes)
    each = [topology(*mesh)._asdict() for mesh in meshes]
    assert list(means) == list(Topology._fields) and means["closed"] == pytest.approx(1 / 3)
    assert means == {name: pytest.approx(sum(found[name] for found in each) / 3) for name in means}


def test_meshes_looked_at_together_are_what_each_is_alone():
    strange = [(SQUARE, [*STRIP, [2, 0, 1], [0, 0, 1]]), (SQUARE, [[0, 0, 1], [2, 3, 3]])]
    meshes = [(mesh.vertices, mesh.faces) for mesh in solids().values()] + strange
    meshes += [random_mesh(seed, 30, 40) for seed in range(5)]
    assert topologies(meshes) == [topology(*mesh) for mesh in meshes] and topologies([]) == []
    assert len({each.pieces for each in topologies(meshes)}) > 3


def test_what_is_no_mesh_has_no_topology():
    for vertices, faces, words in (
        (SQUARE, [], "no faces"),
        (SQUARE, [[0, 1, 9]], "face indices run from 0 to 9"),
        ([[0, 0, np.nan], *SQUARE], STRIP, "NaN"),
        (np.zeros((3, 3)), [[0, 1, 2]], "in one point"),
    ):
        with pytest.raises(MeshError, match=words):
            topology(vertices, faces)
        with pytest.raises(MeshError, match=f"mesh 1: .*{words}"):
            mean_topology([(SQUARE, STRIP), (vertices, faces)])
    with pytest.raises(ValueError, match="no mesh to average"):
        mean_topology([])
