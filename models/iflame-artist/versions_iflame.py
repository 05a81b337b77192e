"""What differs between the versions of transformers that are served: the name of the decoding state.

Until 5.23 `generate()` carries it as `past_key_values`, and outputs have a field of that name; from 5.24 on it is
`cache`. The model takes both names and its outputs answer to both.
"""

from dataclasses import dataclass
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
# The one that this version's generate() and outputs use.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The state that was given under either name, or None. Raises ValueError if both were."""
    if cache is not None and past_key_values is not None:
        raise ValueError("the state was given twice: give either cache or past_key_values, which are two names of it")
    return past_key_values if cache is None else cache


def with_own_cache_name(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with the state, if there is one, under the name that this version of transformers uses."""
    cache = one_cache(*(arguments.get(name) for name in CACHE_NAMES))
    others = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    return others if cache is None else {**others, CACHE_NAME: cache}


class _BothCacheNames:
    """The state of an output by the name that this version of transformers has no field for."""

    def __getitem__(self, key):
        return super().__getitem__(CACHE_NAME if key in CACHE_NAMES else key)


for _name in CACHE_NAMES:
    if _name != CACHE_NAME:
        setattr(_BothCacheNames, _name, property(lambda output: getattr(output, CACHE_NAME)))


@dataclass
class IFlameModelOutput(_BothCacheNames, BaseModelOutputWithPast):
    """As [`BaseModelOutputWithPast`]; the state is both `cache` and `past_key_values`."""


@dataclass
class IFlameCausalLMOutput(_BothCacheNames, CausalLMOutputWithPast):
    """As [`CausalLMOutputWithPast`]; the state is both `cache` and `past_key_values`."""
