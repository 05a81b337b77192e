"""What generate() must know of meshes: the start face, seeds, and the cache."""

import copy
import functools
import inspect
import math
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria
from transformers.utils import logging

from .cache_iflame import IFlameCache, StaticIFlameCache, check_kv_cache_dtype
from .conditions_iflame import (
    CONDITIONS,
    GuidanceLogitsProcessor,
    PairsStreamer,
    asked_conditions,
    check_guidance,
    guided_pairs,
    in_pairs,
)
from .configuration_iflame import DEFAULT_MAX_FACES
from .decoding_iflame import Unsupported, decode, request_of
from .grammar_iflame import EndFaceCriteria, MeshGrammarLogitsProcessor, check_prompts
from .sampling_iflame import SeededSampling, row_seeds
from .threads_iflame import spare_a_core
from .versions_iflame import CACHE_NAME, with_own_cache_name

logger = logging.get_logger(__name__)

# What a generation config says of meshes, and what counts where it does not.
OWN_SETTINGS = {
    "mesh_grammar": True,
    "min_faces": 0,
    "max_faces": None,
    "kv_cache_dtype": None,
    "closing_strength": 0.0,
    "keep_order": True,
}


class IFlameGenerationMixin(GenerationMixin):
    """transformers' generate() for meshes.

    Every row becomes a mesh: `MeshGrammarLogitsProcessor` leaves only tokens with which it is one, of `min_faces` to
    `max_faces` faces, and a row ends with its whole end face. `closing_strength` favours tokens that close the lowest
    open edge, by so many nats; `keep_order=False` allows faces out of canonical order, where the model wants them.
    `generate(mesh_grammar=False)` leaves all of that out.

    A decode engine serves greedy search and sampling on a CUDA device and on a CPU; what it does not do is computed by
    transformers' own loop, with a warning that names it. `cache_implementation="dynamic"` asks for that loop.
    `kv_cache_dtype="int8"` keeps keys and values in half the memory on a CUDA device, and in a static cache.

    Without a prompt it begins with the start face of nine bos tokens. `generate(do_sample=True, seed=...)` gives each
    mesh random numbers of its own: a whole number, which counts up row by row, or a list of one for each row. The same
    seed gives the same mesh, alone or in a batch, and torch's own random numbers are neither used nor changed. Without
    a seed they decide, as elsewhere in transformers. Greedy search needs no seed; sampled beams take none.

    `generate(category="chair", num_faces=200)` asks a model that was trained with such conditions for a mesh of a
    category, of about so many faces, or both; a list has one for each row, and without a prompt makes as many. With
    `guidance_scale` above 1 (classifier-free guidance) it weighs more, at twice the work.
    """

    _supported_generation_modes = [
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    ]

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = self._with_conditions(args[0] if args else None, with_own_cache_name(kwargs))
        with spare_a_core(self.device):
            return super().generate(*args, **kwargs)

    def _with_conditions(self, inputs: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of generate() with tensors in the place of what meshes are asked to be."""
        asked = {name: kwargs.pop(name) for name in CONDITIONS if kwargs.get(name) is not None}
        check_guidance(kwargs.get("guidance_scale"), bool(asked))
        if not asked:
            return kwargs
        for name in ("inputs", "input_ids"):
            inputs = kwargs.get(name) if inputs is None else inputs
        tensors = asked_conditions(self.config, None if inputs is None else len(inputs), **asked)
        rows = len(next(iter(tensors.values())))
        if inputs is None and rows > 1:
            kwargs["input_ids"] = torch.tensor([self.config.mesh_layout.start_face] * rows, device=self.device)
        return {**kwargs, **{name: values.to(self.device) for name, values in tensors.items()}}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # Quantised and offloaded caches are made for one level of keys and values.
        return False

    def _validate_generation_mode(self, generation_mode, *args, **kwargs):
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted generation (assistant_model, prompt_lookup_num_tokens) has to take tokens back, and the "
                "running state of linear attention cannot be rolled back: leave these options out"
            )
        super()._validate_generation_mode(generation_mode, *args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name != "seed"})

    def _prepare_generation_config(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        own = {name: kwargs.pop(name) for name in OWN_SETTINGS if name in kwargs}
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        for name, default in OWN_SETTINGS.items():
            values = (
                own.get(name),
                getattr(prepared, name, None),
                getattr(self.generation_config, name, None),
                default,
            )
            setattr(prepared, name, next((value for value in values if value is not None), None))
        _check_faces(prepared.min_faces, prepared.max_faces)
        check_kv_cache_dtype(prepared.kv_cache_dtype)
        _check_closing_strength(prepared.closing_strength)
        if not isinstance(prepared.keep_order, bool):
            raise ValueError(f"keep_order must be True or False, got {prepared.keep_order!r}")
        return prepared, model_kwargs

    def _get_logits_processor(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        method = super()._get_logits_processor
        if generation_config.guidance_scale is not None:
            # transformers' own would run the model on other tokens; here the rows go in pairs.
            generation_config = copy.copy(generation_config)
            generation_config.guidance_scale = None
        if not getattr(generation_config, "mesh_grammar", False):
            return method(generation_config, *args, **kwargs)
        given = inspect.signature(method).bind(generation_config, *args, **kwargs).arguments
        prompts = given.get("encoder_input_ids")
        if prompts is None or prompts.dim() != 2 or prompts.is_floating_point():
            raise ValueError(
                "the mesh grammar reads the ids of the prompt, and inputs_embeds have none: give input_ids, or "
                "mesh_grammar=False"
            )
        layout = self.config.mesh_layout
        model_kwargs = given.get("model_kwargs") or {}
        mask = model_kwargs.get("attention_mask")
        ids = prompts
        if mask is not None and mask.shape[1] == ids.shape[1]:
            # The rows of a prompt that is gone on from several times stand side by side.
            ids = ids.masked_fill(mask[:: len(mask) // len(ids)] == 0, layout.pad_token_id)
        begins = (ids == layout.bos_token_id).int().argmax(dim=1)
        if not _goes_on(model_kwargs):
            check_prompts(layout, ids.cpu().numpy(), begins.cpu().numpy(), generation_config.keep_order)
        grammar = MeshGrammarLogitsProcessor(
            layout,
            self.config.vocab_size,
            begins,
            generation_config.min_faces,
            generation_config.max_faces,
            generation_config.max_length,
            generation_config.closing_strength,
            generation_config.keep_order,
        )
        # The last of the user's own, which stand before temperature and the like.
        given["logits_processor"] = LogitsProcessorList([*(given.get("logits_processor") or []), grammar])
        return method(**given)

    def _get_stopping_criteria(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        if getattr(generation_config, "mesh_grammar", False):
            for index, criterion in enumerate(criteria):
                if type(criterion) is EosTokenCriteria:
                    criteria[index] = EndFaceCriteria(self.config.mesh_layout, criterion.eos_token_id)
        return criteria

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        seed: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if seed is None:
            seed = int(torch.randint(2**62, ())) if generation_config.do_sample else 0
        seeds = row_seeds(seed, len(input_ids))
        if guided_pairs(generation_config, model_kwargs):
            options = {**model_kwargs, "synced_gpus": synced_gpus, "streamer": streamer}
            return self._sample_pairs(
                input_ids, logits_processor, stopping_criteria, generation_config, seeds, **options
            )
        if generation_config.cache_implementation is None:
            try:
                if synced_gpus:
                    raise Unsupported("synced_gpus")
                request = request_of(
                    self, logits_processor, stopping_criteria, generation_config, model_kwargs, input_ids
                )
            except Unsupported as reason:
                tell = logger.warning_once if self.device.type == "cuda" else logger.info
                tell(f"the decode engine does not do {reason}: transformers' own, slower loop generates")
            else:
                return decode(self, request, input_ids, model_kwargs, seeds, streamer)
        kwargs = {**model_kwargs, "synced_gpus": synced_gpus, "streamer": streamer}
        if not generation_config.do_sample:
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        asked_for_scores = generation_config.return_dict_in_generate and generation_config.output_scores
        sampling = SeededSampling(seeds, input_ids.shape[1], keep_scores=asked_for_scores)
        # The choice has to come after temperature, top_k and the like, which transformers puts after processors that
        # are given to generate(). As it leaves one token, the likeliest is the chosen one.
        generation_config = copy.copy(generation_config)
        generation_config.do_sample = False
        processors = LogitsProcessorList([*logits_processor, sampling])
        output = super()._sample(input_ids, processors, stopping_criteria, generation_config, **kwargs)
        if asked_for_scores:
            output.scores = tuple(sampling.scores)
        return output

    def _sample_pairs(
        self, input_ids, processors, criteria, generation_config, seeds, streamer=None, **model_kwargs
    ) -> Any:
        """As `_sample`, by rows each of which is followed by itself without conditions."""
        if generation_config.return_dict_in_generate:
            raise ValueError(
                "guidance_scale gives meshes alone: leave out return_dict_in_generate, or guidance_scale (1 where the "
                "model has one of its own)"
            )
        guidance = GuidanceLogitsProcessor(generation_config.guidance_scale)
        unguided = copy.copy(generation_config)
        unguided.guidance_scale = None
        sequences = self._sample(
            input_ids.repeat_interleave(2, dim=0),
            LogitsProcessorList([guidance, *processors]),
            criteria,
            unguided,
            seed=[seed for seed in seeds for _ in range(2)],
            streamer=None if streamer is None else PairsStreamer(streamer),
            **in_pairs(model_kwargs),
        )
        return sequences[::2]

    def _beam_search(self, *args: Any, seed: Any = None, **kwargs: Any) -> Any:
        if guided_pairs(kwargs["generation_config"], kwargs):
            raise ValueError(
                "guidance_scale is for sampling and greedy search: leave out num_beams or guidance_scale (1 where the "
                "model has one of its own)"
            )
        if seed is not None and kwargs["generation_config"].do_sample:
            raise ValueError(
                "a seed is of one mesh, and beams are drawn together: leave out num_beams, or leave out seed and call "
                "torch.manual_seed() before"
            )
        return super()._beam_search(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            "continuous batching (generate_batch) keeps keys and values in pages, and the running "
            "state of linear attention fits none: give several prompts to generate() at once, padded on the left"
        )

    def _set_generation_defaults(self) -> None:
        """20 tokens, transformers' default, are not a mesh."""
        if self.generation_config.max_length in (None, 20):
            longest = (DEFAULT_MAX_FACES + 2) * self.config.tokens_per_face  # with start and end face
            self.generation_config.max_length = min(longest, self.config.max_position_embeddings)
        for name, default in OWN_SETTINGS.items():
            if getattr(self.generation_config, name, None) is None:
                setattr(self.generation_config, name, default)
        # One that is said to follow from the model's config is loaded without fields that transformers does not know.
        self.generation_config._from_model_config = False

    def _prepare_generated_length(self, generation_config, has_default_max_length, **kwargs):
        # max_new_tokens takes the place of the default length; it is no conflict to warn of.
        default = self.generation_config.max_length
        faces = getattr(generation_config, "max_faces", None)
        if faces is not None and generation_config.max_new_tokens is None and generation_config.max_length == default:
            # Room for so many faces and the end face, whatever the prompt.
            generation_config.max_new_tokens = (faces + 1) * self.config.tokens_per_face
        if generation_config.max_new_tokens is not None and generation_config.max_length == default:
            has_default_max_length = True
        return super()._prepare_generated_length(
            generation_config=generation_config, has_default_max_length=has_default_max_length, **kwargs
        )

    def _maybe_initialize_input_ids_for_generation(self, inputs=None, bos_token_id=None, model_kwargs=None):
        initialised = super()._maybe_initialize_input_ids_for_generation(inputs, bos_token_id, model_kwargs)
        if inputs is None and initialised.shape[1] == 1:
            return initialised.expand(-1, self.config.tokens_per_face).contiguous()
        return initialised

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        # Called where no mask is given. transformers takes pad ids for padding; a cache knows what was, and rows that
        # ended before others were filled up with ids that it has seen as tokens.
        cache = model_kwargs.get(CACHE_NAME)
        if not getattr(cache, "tokens_seen", 0):
            return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        mask = inputs_tensor.new_ones(inputs_tensor.shape[:2], dtype=torch.long)
        if cache.padding is not None:
            places = torch.arange(mask.shape[1], device=mask.device)
            mask = (places >= cache.padding.to(mask.device)[:, None]).long()
        return mask

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
    ):
        given = model_kwargs.get(CACHE_NAME)
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={implementation!r} is not available: the state of an hourglass with linear "
                "attention fits an IFlameCache only. Leave cache_implementation out, or give 'static'"
            )
        if given is not None:
            if not hasattr(given, "begin_rows"):
                raise ValueError(
                    f"the cache must be an IFlameCache (IFlameCache(model.config)), got a {type(given).__name__}"
                )
            if guided_pairs(generation_config, model_kwargs):
                raise ValueError(
                    "guidance_scale takes two rows for each mesh, which a given cache has not: leave it out (1 where "
                    "the model has one of its own)"
                )
            given._is_user_defined = True
        elif generation_config.use_cache and implementation == "static":
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            rows *= 2 if guided_pairs(generation_config, model_kwargs) else 1
            faces = -(-max_cache_length // self.config.tokens_per_face)
            model_kwargs[CACHE_NAME] = StaticIFlameCache(
                self.config, faces, rows, self.device, self.dtype, generation_config.kv_cache_dtype
            )
        elif generation_config.use_cache:
            model_kwargs[CACHE_NAME] = IFlameCache(self.config)
        mask = model_kwargs.get("attention_mask")
        # Rows that go on from a cache may have ended before others, in padding.
        if mask is not None and (given is None or not given.get_seq_length()) and not mask[:, -1].all():
            raise ValueError("to generate, pad prompts on the left (padding_side='left'), not on the right")


def _check_faces(fewest: Any, most: Any) -> None:
    for name, value in (("min_faces", fewest), ("max_faces", most)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(f"{name} must be a whole number from 0 on, got {value!r}")
    if most is not None and fewest > most:
        raise ValueError(f"min_faces={fewest} is more than max_faces={most}")


def _check_closing_strength(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"closing_strength must be a number of nats from 0 on, got {value!r}")


def _goes_on(model_kwargs: dict[str, Any]) -> bool:
    """Whether the rows go on from a cache: some may have ended before."""
    return bool(getattr(model_kwargs.get(CACHE_NAME), "tokens_seen", 0))
