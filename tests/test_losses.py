"""What does not come through: faces that decoding drops, and what a mesh file holds that tokens do not keep."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from iflame_hf.tokenization_iflame import IFlameTokenizer

BOS, EOS = 130, 131


# Faces


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=9, max_size=9), max_size=30), st.booleans())
def test_a_decoded_mesh_says_how_many_faces_were_dropped_and_why(faces, reversed_winding):
    kept, dropped = [], {"degenerate": 0, "repeated": 0}
    for face in faces:
        corners = {tuple(face[start : start + 3]) for start in (0, 3, 6)}
        if len(corners) < 3:
            dropped["degenerate"] += 1
        elif corners in kept:
            dropped["repeated"] += 1
        else:
            kept.append(corners)
    ids = [BOS] * 9 + [token for face in faces for token in face] + [0] * 5 + [EOS] * 9
    mesh = IFlameTokenizer(reversed_winding=reversed_winding).decode_mesh(ids)
    assert mesh.metadata["dropped_faces"] == dropped and len(mesh.faces) == len(kept)
    assert json.loads(json.dumps(mesh.metadata)) == mesh.metadata, "it is written into files"
