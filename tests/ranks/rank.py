"""A rank that answers what a test asks, stepped by hand.

`python -m tests.ranks.rank REQUEST.json`, started by tests.ranks.launched, runs the file's list of
`Job`s in turn and reports what `run` gives of each.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.config import KVCacheConfig
from mlx_vlm_pipes.contexts import TextAndVisionContext, TextContext, TokenBuffer
from mlx_vlm_pipes.errors import PipesError
from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.kv_cache import KVCache, cache_inputs, increment_cache_lengths
from mlx_vlm_pipes.loading import LoadOptions, load_model, lora_config
from mlx_vlm_pipes.nn import parallel
from mlx_vlm_pipes.nn.ragged import active_images
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.ranks import Ranks
from mlx_vlm_pipes.registry import find_room
from tests.fixtures_helper import arguments, reference
from tests.ranks.launched import joined, report

LARGE_VOCABULARY = parallel.LARGE_VOCABULARY


@dataclass
class Job:
    """A checkpoint, and what to ask of it: prompts of ids, or (None) those of its fixture.

    fixture: the folder with the references. large_vocabulary: from which size on heads are cut.
    banned: a token that is not to be answered. adapter, of the requests, is one of `adapters`.
    """

    folder: str
    fixture: str | None = None
    prompts: list[list[int]] = field(default_factory=list)
    new: int = 4
    banned: int | None = None
    large_vocabulary: int | None = None
    dtype: str = "float32"
    kv_bits: int | None = None
    tower_fails: bool = False  # in the end, on rank 0
    adapters: list[str] = field(default_factory=list)
    adapter: str = ""


class Rank:
    """A checkpoint on one rank."""

    def __init__(self, job: Job, ranks: Ranks) -> None:
        folder = Path(job.folder)
        config = read_config(folder)
        room = find_room(config)
        self.room, self.folder, self.config = room, folder, config
        options = LoadOptions(
            dtype=job.dtype,
            kv_cache=KVCacheConfig(bits=job.kv_bits),
            lora=lora_config(job.adapters or None),
            ranks=ranks,
        )
        self.model: PipelineModelWithKVCache = load_model(room, folder, config, options)
        self.job = job

    def read(self, request: dict[str, Any]) -> TextContext:
        """The context of a fixture's request."""
        processor = self.room.processor_class()(self.folder, self.config.to_dict())
        asked = request | {name: tuple(request[name]) for name in ("images", "videos")}
        processed = processor.process(PromptRequest(**asked))
        return processor.new_context(processed, max_length=self.model.max_seq_len)

    def of_ids(self, ids: list[int]) -> TextContext:
        tokens = TokenBuffer(np.array(ids))
        return TextContext(tokens=tokens, max_length=8192, model_name=self.job.adapter)

    def answer(self, context: TextContext, new: int) -> tuple[np.ndarray, list[int]]:
        """Logits [T, V] at every position of the prompt, and `new` greedy tokens."""
        model, ids = self.model, context.tokens.all.tolist()
        logits, inputs, view = self._prefilled(context)
        tokens = [self._best(logits[-1])]
        while len(tokens) < new:
            if len(ids) + len(tokens) - 1 == model.cache_break_length:
                last, inputs, view = self._prefilled(self.of_ids(ids + tokens))
                tokens.append(self._best(last[-1]))
                continue
            inputs = model.prepare_next_token_inputs(mx.array(tokens[-1:]), inputs)
            output = model.execute(inputs)
            increment_cache_lengths(view, [1])
            tokens.append(self._best(np.array(output.next_token_logits[0])))
        return logits, tokens

    def _prefilled(self, context: TextContext) -> tuple[np.ndarray, Any, Any]:
        """Logits at every position, the step's inputs, and those of the cache."""
        model, count = self.model, context.tokens.active_length
        pictures = active_images([context]) if isinstance(context, TextAndVisionContext) else []
        rows = mx.concatenate(model.encode_images(pictures)) if pictures else None
        cache = KVCache(model.kv_params)
        view = cache_inputs(cache, [cache.new_row()])
        inputs = model.prepare_initial_token_inputs([[context]], view, count, image_embeddings=rows)
        output = model.execute(inputs)
        increment_cache_lengths(view, [count])
        return np.array(output.logits), inputs, view

    def _best(self, logits: np.ndarray) -> int:
        """The token of the largest logit that is not banned."""
        allowed = logits.copy()
        if self.job.banned is not None:
            allowed[self.job.banned] = -np.inf
        return int(allowed.argmax())


def against_reference(rank: Rank, fixture: Path) -> dict[str, Any]:
    """How far logits are from the stored ones, in parts of the largest; wrong greedy answers."""
    facts, arrays = reference(fixture)
    far, wrong = 0.0, []
    for fact in facts["prompts"]:
        name = fact["name"]
        other = "_alt" if f"{name}/position_ids_alt" in arrays.files else ""
        want, greedy = arrays[f"{name}/logits{other}"], arrays[f"{name}/greedy{other}"].tolist()
        logits, tokens = rank.answer(rank.read(arguments(fixture, fact)), facts["max_new"])
        far = max(far, float(np.abs(logits - want).max() / np.abs(want).max()))
        if tokens[: len(greedy)] != greedy:
            wrong.append(name)
    return {"difference": far, "wrong": wrong}


def failing_tower(rank: Rank, fixture: Path) -> str:
    """What `encode_images` raises where rank 0's tower does."""
    facts, _ = reference(fixture)
    fact = next(fact for fact in facts["prompts"] if fact["images"])
    context = rank.read(arguments(fixture, fact))
    assert isinstance(context, TextAndVisionContext)

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    rank.model.vision_model = fail  # pyright: ignore[reportAttributeAccessIssue]  # of the rooms
    try:
        rank.model.encode_images(active_images([context]))
    except (RuntimeError, PipesError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def run(job: Job, ranks: Ranks) -> dict[str, Any]:
    """What a rank holds and has read, and its answers; or why it was refused."""
    parallel.LARGE_VOCABULARY = job.large_vocabulary or LARGE_VOCABULARY
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    try:
        rank = Rank(job, ranks)
    except PipesError as error:
        return {"refused": str(error)}
    params = rank.model.kv_params
    facts: dict[str, Any] = {
        "active": mx.get_active_memory() - before,
        "peak": mx.get_peak_memory() - before,
        "weight_bytes": rank.model.weight_bytes,
        "read_bytes": rank.model.session.read_bytes,
        "kv_heads": params.n_kv_heads_per_device,
        "devices": len(rank.model.devices),
        "signal_buffers": [list(buffer.shape) for buffer in rank.model.signal_buffers],
    }
    if job.fixture is not None:
        facts |= against_reference(rank, Path(job.fixture))
    if job.fixture is not None and job.tower_fails:
        facts["failure"] = failing_tower(rank, Path(job.fixture))
    answers = [rank.answer(rank.of_ids(ids), job.new) for ids in job.prompts]
    return facts | {
        "tokens": [tokens for _, tokens in answers],
        "last": [logits[-1].tolist() for logits, _ in answers],
    }


if __name__ == "__main__":
    own = joined()
    jobs = json.loads(Path(sys.argv[1]).read_text())
    report([run(Job(**job), own) for job in jobs])
