"""Configuration of iFlame: every size of the model, and all that follows from sizes."""

import copy
import re

from transformers import PreTrainedConfig

from .format_iflame import DEFAULT_MESH_FORMAT, MESH_FORMATS, MeshFormat, known_format

# The level of each of the five stages of the hourglass.
STAGE_LEVELS = (0, 1, 2, 1, 0)

LINEAR_ATTENTION_IMPLEMENTATIONS = ("auto", "eager", "chunked", "triton", "lightning_attn", "fla")

# The task of pipeline(), and what config.json says of it, as transformers.pipelines reads it.
TASK = "mesh-generation"
CUSTOM_PIPELINES = {TASK: {"impl": "pipeline_iflame.MeshGenerationPipeline", "pt": ["AutoModelForCausalLM"]}}

# Of a generated mesh by default: the most that the published model was trained on.
DEFAULT_MAX_FACES = 800


class IFlameConfig(PreTrainedConfig):
    r"""
    Configuration of an [`IFlameForCausalLM`]. The defaults are the published model of 75,732,598 parameters
    (iFlame, arXiv 2503.16653).

    Args:
        vocab_size (`int`): number of token ids: grid coordinates and the three special tokens.
        hidden_size (`int`): channels C of every block.
        num_attention_heads (`int`): heads H; `hidden_size / num_attention_heads` must be a multiple of 4, since half
            of the frequencies of the rotary embedding are zero.
        intermediate_size (`int`, *optional*): hidden units of the SwiGLU, by default `int(8 / 3 * hidden_size)`.
        stage_layers (`list[int]`): blocks of the five stages: coordinates, vertices, faces, vertices, coordinates.
        full_attention_interval (`int`): every so many-th block of the whole stack has full attention, the others
            linear attention. Layers are counted from 1.
        max_position_embeddings (`int`): longest sequence in tokens that the model accepts; nothing is allocated
            for it.
        rope_base (`float`): base of the rotary frequencies, which run from 1 to `1 / rope_base`.
        rms_norm_eps (`float`): added to the mean square in every RMSNorm.
        initializer_range (`float`): standard deviation of fresh weights; the two projections that write into the
            residual stream are further divided by `sqrt(2 * num_hidden_layers)`.
        coordinate_resolution (`int`): steps of the grid along a side, on whose points vertices lie; the token ids 0 to
            `coordinate_resolution` are grid coordinates.
        pad_token_id, bos_token_id, eos_token_id (`int`): special ids, by default the three after the grid coordinates.
        mesh_format (`str`): how a mesh becomes a sequence, a key of `format_iflame.MESH_FORMATS`. What a face is to
            the model follows from it: `tokens_per_face`, `level_strides`.
        categories (`list[str]`, *optional*): names of the kinds of meshes that the model can be asked for.
        num_faces_range (`list[int]`, *optional*): fewest and most faces that the model can be asked for. Both enter
            at the start face; without them the model generates without conditions alone.
        use_cache (`bool`): whether the model returns its decoding state by default.
        linear_attn_implementation (`str`): how linear attention is computed: `"eager"` (the recurrence itself),
            `"chunked"` (plain torch), `"triton"` (kernels of this model), `"lightning_attn"` or `"fla"` (the packages
            of those names), or `"auto"`: the best that is installed for the device. It belongs to a process, not to a
            checkpoint, and is not saved.

    Raises:
        ValueError: for sizes that do not fit together, naming the argument.
    """

    model_type = "iflame"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(
        self,
        vocab_size=132,
        hidden_size=512,
        num_attention_heads=16,
        intermediate_size=None,
        stage_layers=None,
        full_attention_interval=4,
        max_position_embeddings=90000,
        rope_base=1024.0,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        coordinate_resolution=128,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        mesh_format=DEFAULT_MESH_FORMAT,
        categories=None,
        num_faces_range=None,
        use_cache=True,
        tie_word_embeddings=False,
        linear_attn_implementation="auto",
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = int(8 / 3 * hidden_size) if intermediate_size is None else intermediate_size
        self.stage_layers = [4, 4, 8, 4, 4] if stage_layers is None else list(stage_layers)
        self.full_attention_interval = full_attention_interval
        self.max_position_embeddings = max_position_embeddings
        self.rope_base = rope_base
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.coordinate_resolution = coordinate_resolution
        self.mesh_format = mesh_format
        self.categories = list(categories) if categories else None
        self.num_faces_range = None if num_faces_range is None else list(num_faces_range)
        self.use_cache = use_cache
        self.linear_attn_implementation = linear_attn_implementation

        pad_token_id = coordinate_resolution + 1 if pad_token_id is None else pad_token_id
        bos_token_id = coordinate_resolution + 2 if bos_token_id is None else bos_token_id
        eos_token_id = coordinate_resolution + 3 if eos_token_id is None else eos_token_id
        self._check_sizes(pad_token_id, bos_token_id, eos_token_id, tie_word_embeddings)
        self._check_conditions()

        self.num_hidden_layers = self._follows("num_hidden_layers", sum(self.stage_layers), kwargs)
        self.layer_types = self._follows(
            "layer_types",
            [
                "full_attention" if number % full_attention_interval == 0 else "linear_attention"
                for number in range(1, self.num_hidden_layers + 1)
            ],
            kwargs,
        )
        # One class serves AutoModel and AutoModelForCausalLM; register_for_auto_class keeps one name for a class.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_iflame.IFlameConfig",
                "AutoModel": "modeling_iflame.IFlameForCausalLM",
                "AutoModelForCausalLM": "modeling_iflame.IFlameForCausalLM",
            },
        )
        if not __name__.startswith("transformers_modules"):
            # The package registers its own pipeline; for a custom one pipeline() would ask to trust remote code.
            kwargs.pop("custom_pipelines", None)
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def __init_subclass__(cls, **kwargs):
        # transformers makes every subclass a dataclass: without an __init__ of its own it would be given a new one.
        cls.__init__ = cls.__init__
        super().__init_subclass__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def mesh_layout(self) -> MeshFormat:
        """How sequences of meshes are laid out, with the model's own ids."""
        return known_format(
            self.mesh_format,
            coordinate_resolution=self.coordinate_resolution,
            special_ids=(self.pad_token_id, self.bos_token_id, self.eos_token_id),
        )

    @property
    def tokens_per_face(self) -> int:
        return MESH_FORMATS[self.mesh_format].tokens_per_face

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Coordinates of a vertex, vertices of a face: items of a level that are one item of the next."""
        strides = self.level_strides
        return tuple(above // below for below, above in zip(strides, strides[1:], strict=False))

    @property
    def level_strides(self) -> tuple[int, int, int]:
        """Tokens that one item of a level spans: a coordinate, a vertex, a face."""
        return MESH_FORMATS[self.mesh_format].level_strides

    @property
    def linear_attn_implementation(self) -> str:
        return self._linear_attn_implementation

    @linear_attn_implementation.setter
    def linear_attn_implementation(self, name: str) -> None:
        if name not in LINEAR_ATTENTION_IMPLEMENTATIONS:
            raise ValueError(
                f"linear_attn_implementation must be one of {', '.join(LINEAR_ATTENTION_IMPLEMENTATIONS)}, got "
                f"{name!r}"
            )
        self._linear_attn_implementation = name

    def stage_slices(self) -> list[slice]:
        """Where the blocks of each of the five stages lie in the stack of all blocks."""
        slices, first = [], 0
        for count in self.stage_layers:
            slices.append(slice(first, first + count))
            first += count
        return slices

    def layer_levels(self) -> list[int]:
        """The level of each block: 0 coordinates, 1 vertices, 2 faces."""
        return [level for level, count in zip(STAGE_LEVELS, self.stage_layers, strict=True) for _ in range(count)]

    def to_dict(self):
        return _as_saved(super().to_dict())

    def to_diff_dict(self):
        return _as_saved(super().to_diff_dict())

    def _follows(self, name, value, kwargs):
        """A size that others determine: a saved file may repeat it, but not contradict it."""
        given = kwargs.pop(name, None)
        if given is not None and given != value:
            raise ValueError(
                f"{name} follows from stage_layers and full_attention_interval and would be {value}, got {given}"
            )
        return value

    def _check_sizes(self, pad_token_id, bos_token_id, eos_token_id, tie_word_embeddings):
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "full_attention_interval",
            "max_position_embeddings",
            "coordinate_resolution",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        for name in ("rope_base", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if len(self.stage_layers) != len(STAGE_LEVELS) or any(
            isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in self.stage_layers
        ):
            raise ValueError(
                "stage_layers must be five whole numbers, the blocks of the stages coordinates, vertices, faces, "
                f"vertices, coordinates, got {self.stage_layers}"
            )
        if sum(self.stage_layers) == 0:
            raise ValueError("stage_layers are all zero: the model needs at least one block")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if self.head_dim % 4:
            raise ValueError(
                "hidden_size / num_attention_heads must be a multiple of 4 (half of the rotary frequencies are zero), "
                f"got {self.head_dim}"
            )
        known_format(self.mesh_format)
        specials = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        for name, value in specials.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be one whole number, got {value!r}")
            if not self.coordinate_resolution < value < self.vocab_size:
                raise ValueError(
                    f"{name} must lie above the grid coordinates 0 to {self.coordinate_resolution} and below "
                    f"vocab_size {self.vocab_size}, got {value}"
                )
        if len(set(specials.values())) < len(specials):
            raise ValueError(f"pad, bos and eos must be three different ids, got {specials}")
        if tie_word_embeddings:
            raise ValueError("iFlame's head has its own weights: tie_word_embeddings must be False")

    def _check_conditions(self):
        names = self.categories or []
        if any(not isinstance(name, str) or not name for name in names) or len(set(names)) < len(names):
            raise ValueError(f"categories must be different names, got {names}")
        if self.num_faces_range is None:
            return
        limits = self.num_faces_range
        if len(limits) != 2 or any(isinstance(each, bool) or not isinstance(each, int) for each in limits):
            raise ValueError(f"num_faces_range must be two whole numbers, fewest and most faces, got {limits}")
        if not 1 <= limits[0] <= limits[1]:
            raise ValueError(f"num_faces_range must begin at 1 or more and not end before it begins, got {limits}")


def _as_saved(dictionary):
    """Without what belongs to a process, and with the pipeline that goes with a model."""
    for name in list(dictionary):
        if re.fullmatch("_?linear_attn_implementation", name):
            del dictionary[name]
    return {**dictionary, "custom_pipelines": copy.deepcopy(CUSTOM_PIPELINES)}


IFlameConfig.register_for_auto_class()
