"""Batches for `transformers.Trainer` from the rows of a prepared data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from iflame_hf.tokenization_iflame import IFlameTokenizer
from training.rows.conditions import Conditions
from training.rows.pack import EXTRA_FACES, TOKENS_PER_FACE, best_fit, count_faces, pack, row_inputs


@dataclass
class MeshCollator:
    """
    Makes the model's inputs of a list of meshes, unaugmented: each padded to the longest, or packed into rows.

    An example has `vertices` (V, 3) and `faces` (F, 3), nested lists, arrays or tensors, in any unit; or `input_ids`
    (T,), the ids of one mesh as the tokenizer encodes it without padding, which go before the others. Give Trainer
    `remove_unused_columns=False`, or it takes these columns away.

    Args:
        tokenizer: the model's; also the copy of its code that AutoTokenizer loads.
        row_length: tokens of a row, a multiple of nine, if meshes are to share rows; None pads.
        config: the model's, if it is to be told each mesh's `category`, a name in the example, or its number of faces.
            Nothing is left out at random.

    Raises:
        ValueError: a row length that is no multiple of nine or holds no mesh.
    """

    tokenizer: IFlameTokenizer
    row_length: int | None = None
    config: Any = None

    def __post_init__(self):
        least = TOKENS_PER_FACE * (EXTRA_FACES + 1)
        if self.row_length is not None and (self.row_length < least or self.row_length % TOKENS_PER_FACE):
            raise ValueError(f"row_length must be a multiple of 9, at least {least}, got {self.row_length}")
        self.conditions = Conditions.of(self.config)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Int64 tensors of N meshes, at least one. Padded on the right: `input_ids`, `attention_mask` and `labels`,
        (N, longest). Packed: `input_ids`, `position_ids` and `labels`, (R, row_length), R as few rows as best fit
        finds, and their `layout`, which spares the model looking at the positions. Labels are the ids, which the
        model shifts, but -100 on start faces and padding.

        What the config asks for comes by the names `category`, an index into its categories, and `num_faces`; -1 is
        for padding and for what is not known. Padded: tensors (N,) beside the others. Packed: attributes of the
        layout, (meshes,), the padding of a row being one.

        Raises:
            ValueError: naming the mesh's place in the batch, for one that the tokenizer refuses or that is longer than
                a row, and for ids that are no whole mesh.
        """
        sequences = [self._encode(place, example) for place, example in enumerate(examples)]
        told = []
        for ids, example in zip(sequences, examples, strict=True):
            category = self.conditions.index(example.get("category"))
            told.append(self.conditions.of_mesh(category, count_faces(ids, self.tokenizer)))
        if self.row_length is None:
            return {**self._pad(sequences), **{n: torch.tensor(v) for n, v in self.conditions.columns(told).items()}}
        return self._pack(sequences, self.row_length, told)

    def _encode(self, place: int, example: Mapping[str, Any]) -> np.ndarray:
        try:
            if "input_ids" in example:
                return self._checked(np.asarray(example["input_ids"]))
            missing = {"vertices", "faces"} - example.keys()
            if missing:
                raise ValueError(
                    f"it has no {' and no '.join(sorted(missing))}; with Trainer give remove_unused_columns=False"
                )
            return np.array(self.tokenizer.encode_mesh((example["vertices"], example["faces"])), dtype=np.int64)
        except ValueError as error:
            raise ValueError(f"mesh {place} of the batch: {error}") from error

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        """Ids (T,) of a mesh. Raises ValueError unless they are whole faces after a start face, without padding."""
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) == 0 or len(ids) % TOKENS_PER_FACE:
            raise ValueError(f"input_ids must be whole faces of nine ids, got {ids.dtype} of the shape {ids.shape}")
        is_start = ids == self.tokenizer.bos_token_id
        if not is_start[:TOKENS_PER_FACE].all() or is_start[TOKENS_PER_FACE:].any():
            raise ValueError("input_ids must begin with nine start tokens, and have no others: one mesh an example")
        if (ids == self.tokenizer.pad_token_id).any():
            raise ValueError("input_ids must have no padding: encode with padding=False, the collator pads")
        return ids.astype(np.int64)

    def _pad(self, sequences: list[np.ndarray]) -> dict[str, Any]:
        longest = max(map(len, sequences))
        inputs = row_inputs(pack([[ids] for ids in sequences], longest, self.tokenizer), self.tokenizer)
        lengths = torch.tensor([len(ids) for ids in sequences])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {"input_ids": inputs["input_ids"], "attention_mask": mask, "labels": inputs["labels"]}

    def _pack(self, sequences: list[np.ndarray], row_length: int, told: list[dict[str, int]]) -> dict[str, Any]:
        for place, ids in enumerate(sequences):
            if len(ids) > row_length:
                raise ValueError(
                    f"mesh {place} of the batch takes {len(ids)} tokens, 9 x (faces + 2), and does not fit into a row "
                    f"of {row_length}: give a row_length of at least {len(ids)}, or leave long meshes out of the data "
                    "set"
                )
        # From long to short, which packs tightly; equally long ones keep their order.
        order = sorted(range(len(sequences)), key=lambda mesh: -len(sequences[mesh]))
        sizes = [len(sequences[mesh]) // TOKENS_PER_FACE for mesh in order]
        rows = [[order[item] for item in row] for row in best_fit(sizes, row_length // TOKENS_PER_FACE)]
        known = self.conditions.columns(told[mesh] for row in rows for mesh in row)
        packed = pack([[sequences[mesh] for mesh in row] for row in rows], row_length, self.tokenizer, known)
        inputs = row_inputs(packed, self.tokenizer)
        return {**inputs, "position_ids": inputs["layout"].positions()}
