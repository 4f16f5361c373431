"""What `generate()` asks of a model, answered for one whose cache is a stream."""

from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteriaList

from ..core.errors import UnsupportedError
from .cache import MemoryCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..core.memory import Memory
    from .steps import Attachment

    class _Base(PreTrainedModel):
        memory: Memory
        mnemic: Attachment

        # From transformers' GenerationMixin, which causal language models inherit.
        generation_config: Any

        def generate(self, *args: Any, **kwargs: Any) -> Any: ...

        def _sample(self, *args: Any, **kwargs: Any) -> Any: ...
else:
    _Base = object


class MemoryGeneration(_Base):
    """`generate()` over any length of prompt, in the modes that a memory can serve."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args: Any, **kwargs: Any) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UnsupportedError(
                f"cache_implementation={generation_config.cache_implementation!r}: a model with memory brings its own "
                "cache; leave the option unset."
            )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MemoryCache(self.mnemic.layout)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's `generate()`, over any length of prompt.

        Raises:
            UnsupportedError: modes that the memory does not declare it can do: taking tokens back (assisted and
                prompt-lookup decoding; a memory that has committed cannot), reordering rows (beams).
        """
        config = kwargs.get("generation_config") or self.generation_config
        rolls_back = [
            name
            for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate")
            if kwargs.get(name) is not None or getattr(config, name, None) is not None
        ]
        if rolls_back and not self.memory.croppable:
            raise UnsupportedError(
                f"{', '.join(rolls_back)}: such decoding takes tokens back, which the memory {self.memory.name!r} "
                "cannot once it has committed. Use greedy search, sampling or beams."
            )
        if not self.memory.reorderable and (kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1) > 1:
            raise UnsupportedError(
                f"num_beams: beam search moves rows about, which the memory {self.memory.name!r} does not allow. Use "
                "greedy search or sampling."
            )
        return super().generate(*args, **kwargs)

    def _sample(self, input_ids, logits_processor, stopping_criteria, *args: Any, **model_kwargs: Any) -> Any:
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, MemoryCache):
            return super()._sample(input_ids, logits_processor, stopping_criteria, *args, **model_kwargs)
        ending = _EndRows(stopping_criteria, cache)
        try:
            return super()._sample(input_ids, logits_processor, ending, *args, **model_kwargs)
        finally:
            # The cache may be read on: its rows ended for this call only.
            cache.finished = torch.zeros_like(cache.finished)


class _EndRows(StoppingCriteriaList):
    """The given criteria; rows they end stop feeding the memory (generate() goes on giving them padding)."""

    def __init__(self, criteria: StoppingCriteriaList, cache: MemoryCache):
        super().__init__(criteria)
        self.cache = cache

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ended = super().__call__(input_ids, scores, **kwargs)
        self.cache.finished = self.cache.finished | ended.cpu()
        return ended
