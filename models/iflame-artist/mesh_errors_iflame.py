"""What is wrong with a mesh, or with an option: errors of a kind, in words that a program may change."""

import copy
import os
from contextlib import contextmanager
from typing import Any

# Why something is no usable mesh: the kinds of `MeshError`. The words stay the same when messages change.
MESH_ERROR_KINDS = {
    "unknown_format": "the suffix is of no format that is read",
    "missing_file": "a file that the mesh file refers to is not there",
    "no_permission": "a file must not be read",
    "not_a_file": "the path is of a folder or a device",
    "empty_file": "the file has no content",
    "lfs_pointer": "a pointer of Git LFS in place of the file",
    "wrong_format": "the content is not of the format that the suffix says",
    "compressed_geometry": "geometry that only a decoder which is not here can read",
    "unreadable": "damaged, cut off, or with something in it that the reader does not know",
    "bad_shape": "arrays or lists of another shape or type than vertices (V, 3) and faces (F, 3) have; no mesh at all",
    "empty": "no vertices or no faces",
    "not_finite": "a coordinate, or the extent, is NaN or infinite",
    "bad_indices": "a face has a corner that no vertex is",
    "flat": "all vertices lie in one point, or no face has an area",
    "no_face_left": "no face is left after quantisation",
    "too_many_faces": "more faces than asked for",
    "out_of_bounds": "the mesh does not lie within the box that it has to be in",
}
NOT_A_MESH = "a mesh is a path, a Trimesh, a Scene or a tuple (vertices, faces), not {}"


class _NamesOptions(ValueError):
    """An error whose message names options as Python's parameters are named; `worded` names them as the users of
    another program know them.

    Args:
        text: the message, with %s for each option.
        options: names of parameters; without any the text is taken as it is, whatever is in it.
    """

    def __init__(self, text: str, *options: str):
        self.text, self.options, self.source = text, options, ""
        super().__init__(text % options if options else text)

    def worded(self, name_of: Any = str) -> str:
        """The message with `name_of(option)` for every option."""
        return self.source + (self.text % tuple(map(name_of, self.options)) if self.options else self.text)

    def after(self, source: str) -> "_NamesOptions":
        """The same error with a message that begins with `source`."""
        error = copy.copy(self)
        error.source = source + self.source
        error.args = (error.worded(),)
        return error


class OptionError(_NamesOptions):
    """An option that cannot be as given."""


class MeshError(_NamesOptions):
    """What was given is no usable mesh; the message says why to people, and begins with the file's name where there
    is one. `kind` says why to programs: one of `MESH_ERROR_KINDS`."""

    def __init__(self, message: str, kind: str = "unreadable", options: tuple[str, ...] = ()):
        super().__init__(message, *options)
        self.kind = kind


@contextmanager
def errors_name(source: Any):
    """Begin the message of a ValueError with `source` where that is a path or a name, not arrays or an object."""
    try:
        yield
    except ValueError as error:
        if not isinstance(source, (str, os.PathLike)):
            raise
        beginning = f"{os.fspath(source)}: "
        if isinstance(error, _NamesOptions):
            raise error.after(beginning) from error
        raise ValueError(f"{beginning}{error}") from error
