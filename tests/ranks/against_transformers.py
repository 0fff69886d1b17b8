"""A rank that answers the prompts of fixtures, and reports how far it is from transformers.

`python -m tests.ranks.against_transformers FOLDER ...`, started by tests.ranks.launched.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import TextAndVisionContext, TextContext, TokenBuffer
from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.kv_cache import KVCache, cache_inputs, increment_cache_lengths
from mlx_vlm_pipes.loading import LoadOptions, load_model
from mlx_vlm_pipes.nn.ragged import active_images
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.ranks import Ranks
from mlx_vlm_pipes.registry import find_room
from tests.fixtures_helper import arguments, reference
from tests.ranks.launched import joined, report


class Rank:
    """A checkpoint on one rank, stepped by hand."""

    def __init__(self, folder: Path, ranks: Ranks, **options: Any) -> None:
        config = read_config(folder)
        room = find_room(config)
        self.processor = room.processor_class()(folder, config.to_dict())
        chosen = LoadOptions(**{"dtype": "float32", "ranks": ranks} | options)
        self.model: PipelineModelWithKVCache = load_model(room, folder, config, chosen)

    def answer(self, request: dict[str, Any], new: int) -> tuple[np.ndarray, list[int]]:
        """Logits [T, V] at every position of the prompt, and `new` greedy tokens."""
        asked = {"images": (), "videos": (), **request}
        asked["images"], asked["videos"] = tuple(asked["images"]), tuple(asked["videos"])
        processed = self.processor.process(PromptRequest(**asked))
        context = self.processor.new_context(processed, max_length=self.model.max_seq_len)
        return self._steps(context, new)

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """`new` greedy tokens after a prompt of these ids."""
        return self._steps(TextContext(tokens=TokenBuffer(np.array(ids)), max_length=8192), new)[1]

    def _steps(self, context: TextContext, new: int) -> tuple[np.ndarray, list[int]]:
        model = self.model
        pictures = active_images([context]) if isinstance(context, TextAndVisionContext) else []
        rows = mx.concatenate(model.encode_images(pictures)) if pictures else None
        cache = KVCache(model.kv_params)
        view = cache_inputs(cache, [cache.new_row()])
        count = context.tokens.active_length
        inputs = model.prepare_initial_token_inputs([[context]], view, count, image_embeddings=rows)
        output = model.execute(inputs)
        increment_cache_lengths(view, [count])
        logits = np.array(output.logits)
        tokens = [int(logits[-1].argmax())]
        while len(tokens) < new:
            inputs = model.prepare_next_token_inputs(mx.array(tokens[-1:]), inputs)
            output = model.execute(inputs)
            increment_cache_lengths(view, [1])
            tokens.append(int(mx.argmax(output.next_token_logits[0]).item()))
        return logits, tokens


def distance(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The largest difference of logits, as a part of the largest logit, and wrong greedy tokens."""
    rank, (facts, arrays) = Rank(folder, ranks), reference(folder)
    far, wrong = 0.0, []
    for fact in facts["prompts"]:
        name = fact["name"]
        other = "_alt" if f"{name}/position_ids_alt" in arrays.files else ""
        want, greedy = arrays[f"{name}/logits{other}"], arrays[f"{name}/greedy{other}"].tolist()
        logits, tokens = rank.answer(arguments(folder, fact), facts["max_new"])
        far = max(far, float(np.abs(logits - want).max() / np.abs(want).max()))
        if tokens[: len(greedy)] != greedy:
            wrong.append(name)
    params = rank.model.kv_params
    return {
        "difference": far,
        "wrong": wrong,
        "kv_heads": [params.n_kv_heads, params.n_kv_heads_per_device],
        "weight_bytes": rank.model.weight_bytes,
    }


if __name__ == "__main__":
    own = joined()
    report({Path(folder).name: distance(Path(folder), own) for folder in sys.argv[1:]})
