"""
The iFlame network (arXiv 2503.16653): an hourglass over coordinates, vertices and faces whose blocks have linear
attention and, every fourth, full attention.
"""

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, initialization

from .blocks_iflame import IFlameBlock, IFlameRMSNorm, IFlameUpsample
from .cache_iflame import IFlameCache
from .conditions_iflame import IFlameConditions, add_conditions, conditions_of_rows, known_conditions
from .configuration_iflame import STAGE_LEVELS, IFlameConfig
from .generation_iflame import IFlameGenerationMixin
from .implementations_iflame import check_linear_attention_implementation
from .layout_iflame import RowLayout
from .levels_iflame import level_inputs
from .ops_iflame import attention_backends_for_any_length, in_autocasts_dtype
from .states_iflame import OpenGroup
from .upsample_kernels_iflame import has_pool_kernels, with_means
from .versions_iflame import CACHE_NAME, IFlameCausalLMOutput, IFlameModelOutput, one_cache

if TYPE_CHECKING:
    # The network knows no meshes. transformers copies the files that a model's code names, and so a saved model has
    # the code of its pipeline, which its config.json names.
    from .pipeline_iflame import MeshGenerationPipeline  # noqa: F401

# B batch, T items of a level, H heads, D head size, C channels


class Trace(NamedTuple):
    """What a call records for `output_hidden_states` and `output_attentions`."""

    hidden_states: list[torch.Tensor]
    attentions: list[torch.Tensor]


class IFlamePreTrainedModel(PreTrainedModel):
    config_class = IFlameConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["IFlameBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # generate() refuses assisted decoding for such models: a recurrent state cannot be rolled back.
    _is_stateful = True

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """As in transformers; raises ValueError if a special token would lose its row."""
        specials = (self.config.pad_token_id, self.config.bos_token_id, self.config.eos_token_id)
        smallest = 1 + max(token for token in specials if token is not None)
        if new_num_tokens is not None and new_num_tokens < min(smallest, self.config.vocab_size):
            raise ValueError(
                f"{new_num_tokens} tokens are too few: the special tokens of this model need at least {smallest}"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if getattr(module, "writes_residual", False):
            # As in GPT-2: each block adds to the residual stream twice, and the sum should keep its size.
            std = std / (2 * self.config.num_hidden_layers) ** 0.5
        if isinstance(module, (nn.Linear, nn.Embedding)):
            initialization.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, IFlameRMSNorm):
            initialization.ones_(module.weight)
        elif isinstance(module, IFlameUpsample):
            initialization.ones_(module.scale)


class IFlameModel(IFlamePreTrainedModel):
    """The hourglass without the head."""

    def __init__(self, config: IFlameConfig):
        super().__init__(config)
        check_linear_attention_implementation(config.linear_attn_implementation)
        self.padding_idx = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = IFlameRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.conditions = IFlameConditions(config) if known_conditions(config) else None
        self.layers = nn.ModuleList([IFlameBlock(config, index) for index in range(config.num_hidden_layers)])
        # To the coordinates, to the vertices.
        self.upsamplers = nn.ModuleList([IFlameUpsample(size) for size in config.group_sizes])
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: IFlameCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: IFlameCache | None = None,
        layout: RowLayout | None = None,
        category: torch.LongTensor | None = None,
        num_faces: torch.LongTensor | None = None,
        **kwargs,
    ):
        r"""
        Args:
            input_ids: (B, T) token ids; with a cache, the T tokens after those it has seen.
            attention_mask: (B, tokens seen + T), 0 for padding. Padding on the left must be whole faces (multiples of
                nine tokens), and may come in several calls; on the right it changes nothing for the tokens before it.
                With a filled cache it may be left out, and otherwise must agree with what the cache was filled with.
            position_ids: (B, T) position of each token in its mesh. Where they start again from 0 another mesh begins
                (a packed row); meshes must begin at multiples of nine tokens. By default one mesh a row. With a filled
                cache they are known, and those that are given must be the same.
            cache ([`IFlameCache`]): the state that an earlier call returned. `past_key_values` is another name of it.
            inputs_embeds: (B, T, C) instead of `input_ids`.
            layout ([`RowLayout`]): which meshes the rows hold and where, as who packs rows knows it: nothing has to be
                read back from the device. `attention_mask` is left out beside it, and `position_ids` are not read.
                What is known of each mesh are its attributes `category` and `num_faces`.
            category: (B,) what the mesh of each row is, a place in `config.categories`; -1 where it is not known.
            num_faces: (B,) how many faces it has; -1 where it is not known.

        Returns:
            [`IFlameModelOutput`]: `hidden_states` holds the input of the first block and the output of every
            block that ran, at the length of its own level; `attentions` the weights of the full-attention layers
            (`"eager"` only).

        Raises:
            ValueError: for inputs that do not fit together, in plain words. On a GPU mask and positions of a single
                token after a filled cache are not compared with what the cache knows, which would wait for the device
                in every step: there the cache alone decides.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        use_cache = config.use_cache and not self.training if use_cache is None else use_cache
        if output_attentions and config._attn_implementation != "eager":
            warnings.warn(
                f"attn_implementation={config._attn_implementation!r} computes no attention weights to return: choose "
                "'eager' for output_attentions=True",
                stacklevel=2,
            )

        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        if layout is not None:
            layout = layout.to((input_ids if inputs_embeds is None else inputs_embeds).device, non_blocking=True)
        if inputs_embeds is None:
            inputs_embeds = self._embedded(input_ids, layout, category, num_faces)
        elif category is not None or num_faces is not None:
            raise ValueError(
                "category and num_faces are added to the start face of input_ids: inputs_embeds have none"
            )
        if inputs_embeds.shape[1] == 0:
            raise ValueError("there are no tokens: a mesh begins with the start face of nine bos tokens")
        cache = one_cache(cache, past_key_values)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError(
                    "gradient checkpointing computes every block twice, which a cache does not survive: leave the "
                    "cache out, or switch gradient checkpointing off"
                )
            use_cache = False
        if cache is None and use_cache:
            cache = IFlameCache(config)
        if cache is not None and not hasattr(cache, "begin_rows"):
            raise ValueError(
                f"the cache must be an IFlameCache (IFlameCache(model.config)), got a {type(cache).__name__}: the "
                "hourglass keeps state that other caches have no place for"
            )

        levels = level_inputs(config, inputs_embeds, attention_mask, position_ids, cache, layout)
        # What blocks add to one another is in the type of their products: half the memory to read and write.
        hidden_states = in_autocasts_dtype(self.embed_norm(inputs_embeds))
        trace = Trace([hidden_states], []) if output_hidden_states or output_attentions else None
        with nullcontext() if cache is None else attention_backends_for_any_length(hidden_states.device):
            hidden_states = self._hourglass(0, hidden_states, levels, cache, trace)
        if cache is not None:
            cache.advance(inputs_embeds.shape[1])

        output = IFlameModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(trace.hidden_states) if output_hidden_states else None,
            attentions=tuple(trace.attentions) if output_attentions else None,
            **{CACHE_NAME: cache if use_cache else None},
        )
        return output if return_dict else output.to_tuple()

    def _embedded(self, input_ids, layout, category, num_faces):
        """(B, T) ids -> (B, T, C), the start faces with what is known of their meshes."""
        embeds = self.embed_tokens(input_ids)
        if layout is not None and layout.shape != input_ids.shape:
            layout = None  # which is found to be wrong later on
        conditions = conditions_of_rows(self.config, category, num_faces, layout, input_ids.shape[0])
        if not conditions:
            return embeds
        starts = input_ids == self.config.bos_token_id
        return add_conditions(embeds, starts, self.conditions(conditions), layout)

    def _hourglass(self, depth, hidden_states, levels, cache, trace):
        """
        Runs the stages of level `depth` and of all levels below it on (B, T, C) new items, T >= 1.

        In groups of g, position i of a level reads group floor((i - g + 1) / g) of the level below, which is complete
        exactly when item i arrives.
        """
        level = levels[depth]
        encoder, decoder = depth, len(STAGE_LEVELS) - 1 - depth
        hidden_states = self._run_stage(encoder, hidden_states, level, cache, trace)
        if encoder == decoder:
            return hidden_states

        ends = OpenGroup(self.config.group_sizes[depth]) if cache is None else cache.open_groups[depth]
        members, offset = ends.push(hidden_states)
        groups = None
        if members.shape[1] > 0:
            if offset == 0 and has_pool_kernels(hidden_states):
                hidden_states, pooled = with_means(hidden_states, ends.size)
            else:
                pooled = members.unflatten(1, (-1, ends.size)).mean(dim=2)
            groups = self._hourglass(depth + 1, pooled, levels, cache, trace)
        coarse = ends.hand_up(groups, hidden_states)
        hidden_states = self.upsamplers[depth](hidden_states, coarse, offset, level.positions)
        return self._run_stage(decoder, hidden_states, level, cache, trace)

    def _run_stage(self, stage, hidden_states, level, cache, trace):
        for block in self.layers[self.config.stage_slices()[stage]]:
            hidden_states, weights = block(hidden_states, level, cache)
            if trace is not None:
                trace.hidden_states.append(hidden_states)
                if weights is not None:
                    trace.attentions.append(weights)
        return hidden_states


class IFlameForCausalLM(IFlamePreTrainedModel, IFlameGenerationMixin):
    """The hourglass with its head: logits of the next token of a mesh."""

    def __init__(self, config: IFlameConfig):
        super().__init__(config)
        self.model = IFlameModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()
        self._set_generation_defaults()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: IFlameCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: IFlameCache | None = None,
        layout: RowLayout | None = None,
        category: torch.LongTensor | None = None,
        num_faces: torch.LongTensor | None = None,
        **kwargs,
    ):
        r"""
        As [`IFlameModel`], and:

        Args:
            labels: (B, T) token ids, -100 where nothing is to be predicted; shifted here. The loss is the mean over
                the labels, or their sum divided by `num_items_in_batch` if that is given.
            logits_to_keep: only the last so many logits (0: all), or those at the given indices.

        Returns:
            [`IFlameCausalLMOutput`] with logits (B, T, vocab_size).
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            layout=layout,
            category=category,
            num_faces=num_faces,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        output = IFlameCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )
        return output if return_dict else output.to_tuple()


IFlameForCausalLM.register_for_auto_class("AutoModelForCausalLM")
