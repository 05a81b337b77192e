"""Sampled meshes become files while the next ones are made."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from iflame_hf.export_iflame import export_mesh
from iflame_hf.many_iflame import GeneratedMesh
from training.sampling.folder import MeshRecord, RecordWriter

WAITING_MESHES = 256  # of which the next one waits for the first


class MeshWriter:
    """
    Writes meshes, and a record of each, in a thread of its own. Leaving it waits for what it was given.

    Args:
        folder: where they go.
        format: of the files, glb for example.
        tokenizer: of the model that has made them.
        process: this one's number.
    """

    def __init__(self, folder: Path, format: str, tokenizer: Any, process: int):
        self.folder, self.format, self.tokenizer = folder, format, tokenizer
        self.records = RecordWriter(folder, process)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="MeshWriter")
        self.waiting: deque[Future] = deque()

    def put(self, number: int, mesh: GeneratedMesh) -> None:
        """Raises what an earlier mesh could not be written for."""
        while self.waiting and (self.waiting[0].done() or len(self.waiting) > WAITING_MESHES):
            self.waiting.popleft().result()
        self.waiting.append(self.thread.submit(self._write, number, mesh))

    def _write(self, number: int, mesh: GeneratedMesh) -> None:
        decoded = self.tokenizer.decode_mesh(mesh.ids)
        path = self.folder / f"mesh-{number:06d}.{self.format}"
        faces = len(decoded.faces)
        if faces:
            export_mesh(decoded, path, up_axis=self.tokenizer.up_axis, extras={"seed": mesh.seed})
        self.records.append(MeshRecord(number, mesh.seed, faces, mesh.ended, path.name if faces else None))

    def __enter__(self) -> "MeshWriter":
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        self.thread.shutdown()
        self.records.close()
        if kind is None:
            for each in self.waiting:
                each.result()
