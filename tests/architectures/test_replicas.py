"""Data parallel on the one device: Llama runs the rows of all replicas, the others refuse."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.kv_cache import increment_cache_lengths
from tests.architectures.driving import load, new_cache, relative
from tests.device import bar
from tests.engine.driving import FAMILIES
from tests.engine.models import finish, new_scheduler, submit, tokens_of
from tests.fixtures_helper import FIXTURES, reference

LLAMA = FIXTURES / "llama-tied"
NAMES = ["raw", "chat", "turns"]


def contexts() -> list[TextContext]:
    arrays = reference(LLAMA)[1]
    prompts = [arrays[f"{name}/input_ids"].astype(np.int64) for name in NAMES]
    return [TextContext(max_length=10_000, tokens=TokenBuffer(ids)) for ids in prompts]


@pytest.mark.parametrize(
    ("cuts", "splits"), [((1,), [0, 1, 3]), ((0,), [0, 0, 3]), ((1, 1), [0, 1, 1, 3])]
)
def test_replicas_run_as_one_batch(cuts: tuple[int, ...], splits: list[int]) -> None:
    model, arrays = load(LLAMA, data_parallel_degree=len(cuts) + 1), reference(LLAMA)[1]
    rows, kv, found = contexts(), new_cache(model, 3), []
    bounds = [0, *cuts, 3]
    replicas = [rows[i:j] for i, j in itertools.pairwise(bounds)]
    inputs = model.prepare_initial_token_inputs(replicas, kv)
    for counts in ([len(row.tokens) for row in rows], [1] * 3):
        assert inputs.data_parallel_splits.dtype == mx.int64
        assert inputs.data_parallel_splits.tolist() == splits
        assert inputs.buffers[3] is inputs.data_parallel_splits
        assert len(inputs.buffers) == 3 + 1 + 4  # in the place of the signal buffers
        out = model.execute(inputs)
        increment_cache_lengths(kv, counts)
        found.append(mx.argmax(out.next_token_logits, axis=-1))
        if len(found) == 1:
            for i, name in enumerate(NAMES):
                wanted = arrays[f"{name}/logits"][-1]
                assert relative(np.array(out.next_token_logits[i]), wanted) < bar(2e-5)
        inputs = model.prepare_next_token_inputs(found[-1], inputs)
    greedy = [arrays[f"{name}/greedy"][:2].tolist() for name in NAMES]
    assert np.array(found).T.tolist() == greedy


def test_one_replica_has_no_splits() -> None:
    model = load(LLAMA)
    inputs = model.prepare_initial_token_inputs([contexts()], new_cache(model, 3))
    assert inputs.data_parallel_splits is None


def test_another_number_of_replicas_is_refused() -> None:
    model = load(LLAMA, data_parallel_degree=2)
    message = r"1 replica batches, expected 2 \(data_parallel_degree\)"
    with pytest.raises(ConfigError, match=message):
        model.prepare_initial_token_inputs([contexts()], new_cache(model, 3))
    with pytest.raises(ConfigError, match="data_parallel_degree is 0"):
        load(LLAMA, data_parallel_degree=0)


def test_the_engine_runs_such_a_model() -> None:
    arrays = reference(LLAMA)[1]
    scheduler = new_scheduler(load(LLAMA, data_parallel_degree=2))
    ids = [arrays[f"{name}/input_ids"].tolist() for name in NAMES]
    handles = [submit(scheduler, one, 4) for one in ids]
    finish(scheduler)
    for name, handle in zip(NAMES, handles, strict=True):
        assert tokens_of(handle) == arrays[f"{name}/greedy"][:4].tolist()


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_vision_models_refuse_more_than_one(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^data_parallel_degree 2; \w+ runs one replica, use 1$"):
        load(FIXTURES / name, data_parallel_degree=2)


def test_cache_parameters_keep_their_own_rule() -> None:
    sizes: Any = {"dtype": DType.float32, "n_kv_heads": 2, "head_dim": 8, "num_layers": 1}
    with pytest.raises(ConfigError, match="data_parallel_degree 2 with 1 devices"):
        KVCacheParams(**sizes, devices=[DeviceRef.CPU()], data_parallel_degree=2)
    assert load(LLAMA, data_parallel_degree=2).kv_params.data_parallel_degree == 1
