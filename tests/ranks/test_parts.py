"""What a rank is given of a model, looked at from one process: MLX sums nothing there."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.config import KVCacheConfig
from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.kv_cache import KVCache, cache_inputs, increment_cache_lengths
from mlx_vlm_pipes.loading import LoadOptions, load_model
from mlx_vlm_pipes.ranks import Ranks, shares
from mlx_vlm_pipes.registry import find_room
from mlx_vlm_pipes.weights import WeightData, load_weights
from tests.engine.models import VOCAB, write_llama
from tests.fixtures_helper import FIXTURES
from tests.ranks.variants import pack


def part_of(folder: Path, rank: int, size: int, **options: object) -> PipelineModelWithKVCache:
    """The model as one rank of several loads it."""
    config = read_config(folder)
    chosen = LoadOptions(ranks=Ranks(rank, size), **{"dtype": "float32"} | options)  # pyright: ignore[reportArgumentType]
    return load_model(find_room(config), folder, config, chosen)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """65 MB of float32: 3 KV heads, an MLP of 768."""
    folder = tmp_path_factory.mktemp("plain") / "llama"
    return write_llama(folder, layers=8, heads=6, kv_heads=3, hidden=512)


def test_shares_are_as_even_as_they_can_be() -> None:
    assert shares(3, 2) == [(0, 1), (1, 3)]
    assert shares(8, 3) == [(0, 2), (2, 5), (5, 8)]


@pytest.mark.parametrize(("rank", "heads"), [(0, 1), (1, 2)])
def test_a_rank_reads_and_holds_its_parts_alone(plain: Path, rank: int, heads: int) -> None:
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = part_of(plain, rank, 2)
    active, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
    inner = 384  # 24 parts of 32 columns
    layer = 512 * (2 * (2 + 1) * heads * 64 + 3 * inner) + 2 * 512
    own = 4 * (8 * layer + 512 + VOCAB * 512)
    assert model.weight_bytes == own
    assert model.session.read_bytes == own
    assert own <= active <= 1.02 * own
    assert peak <= active + 4 * 512 * 768
    assert model.kv_params.n_kv_heads == 3
    assert model.kv_params.n_kv_heads_per_device == heads
    assert model.kv_params.bytes_per_token == 2 * 8 * heads * 64 * 4
    assert model.kv_params.shape_per_block == [2, 8, 128, heads, 64]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["affine4", "gptq", "int8"])
def test_what_is_repacked_or_expanded_is_let_go(plain: Path, form: str, tmp_path: Path) -> None:
    folder = pack(plain, tmp_path / "packed", form)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = part_of(folder, 1, 2)
    active, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
    assert model.weight_bytes <= active <= 1.02 * model.weight_bytes
    assert peak <= active + 3 * 4 * 512 * 768  # codes, scales and floats of the largest


@dataclass(frozen=True)
class Counting(Ranks):
    """Ranks that note the shape of everything that is summed."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def sum(self, x: mx.array) -> mx.array:
        self.shapes.append(x.shape)
        return x


def test_a_step_has_two_sums_a_layer(plain: Path) -> None:
    ranks = Counting(0, 2)
    config = read_config(plain)
    options = LoadOptions(dtype="float32", compile=False, ranks=ranks)
    model = load_model(find_room(config), plain, config, options)
    cache = KVCache(model.kv_params)
    view = cache_inputs(cache, [cache.new_row()])
    context = TextContext(tokens=TokenBuffer(np.arange(5)), max_length=64)
    ranks.shapes.clear()
    inputs = model.prepare_initial_token_inputs([[context]], view)
    model.execute(inputs)
    # the last layer's half behind the attention is of the token that is asked for
    assert ranks.shapes == [(5, 512)] * 14 + [(1, 512)] * 2
    increment_cache_lengths(view, [5])
    ranks.shapes.clear()
    model.execute(model.prepare_next_token_inputs(mx.array([7]), inputs))
    assert ranks.shapes == [(1, 512)] * 16


def test_parts_of_a_stored_tensor_are_the_files(tmp_path: Path) -> None:
    """Odd offsets, bfloat16, several spans, a cast: nothing of the rest is held."""
    numbers = mx.array(np.random.default_rng(0).normal(size=(300, 70)), dtype=mx.bfloat16)
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((3,), mx.uint8), "b": numbers})
    stored = load_weights(path)["b"].data().astype(DType.float32)
    for axis, spans in [(0, [(5, 9), (250, 300)]), (1, [(0, 1), (69, 70)])]:
        part = stored.part(axis, spans)
        places = np.concatenate([np.arange(*span) for span in spans])
        want = np.take(np.array(numbers.astype(mx.float32)), places, axis)
        assert part.shape == want.shape
        assert np.array_equal(np.array(part.data), want)
        assert stored.read_bytes(part.shape) == want.size * 2


def test_a_part_of_a_computed_tensor_lets_go_of_the_rest() -> None:
    before = mx.get_active_memory()
    whole = WeightData.from_array(mx.random.normal((1000, 1000)) * 2, "x")
    part = whole.part(0, [(0, 100)])
    del whole
    assert mx.get_active_memory() - before < 1.1 * 400_000
    assert part.shape == (100, 1000)


def test_what_cannot_be_cut_is_refused_before_anything_is_read(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 KV heads do not divide among 3 devices"):
        part_of(FIXTURES / "idefics3", 0, 3)
    coarse = write_llama(tmp_path / "one", heads=4, kv_heads=4, head_dim=32, hidden=256)
    folder = pack(coarse, tmp_path / "coarse", "coarse")  # one group of 128 is all four heads
    with pytest.raises(ConfigError, match=r"4 KV heads packed in groups of 128 .* at most 1$"):
        part_of(folder, 1, 2)
    narrow = write_llama(tmp_path / "two", heads=4, kv_heads=4, head_dim=64, hidden=128)
    folder = pack(narrow, tmp_path / "narrow", "affine4")
    with pytest.raises(ConfigError, match=r"an MLP 192 wide packed in groups of 64 .* at most 3$"):
        part_of(folder, 0, 4)


def test_devices_are_one_for_each_rank(plain: Path) -> None:
    model = part_of(plain, 1, 2)
    assert model.device_refs == [DeviceRef.from_device(model.device)] * 2
    assert [buffer.shape for buffer in model.signal_buffers] == [(0,), (0,)]
    rooms = find_room(read_config(plain)).model_class()
    one, session = [model.device], model.session
    arguments = (model.kv_cache_config, model.weights)
    with pytest.raises(NotImplementedError, match="devices has 1 for 2 ranks; give one for each"):
        rooms(model.pipeline_config, session, one, *arguments)
    model.pipeline_config.model.data_parallel_degree = 2
    with pytest.raises(ConfigError, match="data_parallel_degree 2 with 2 ranks"):
        rooms(model.pipeline_config, session, [*one, *one], *arguments)


def test_heads_of_uneven_shares_count_as_the_largest() -> None:
    two = [DeviceRef.CPU()] * 2
    params = KVCacheConfig().to_params(DType.float32, 3, 8, 1, two)
    assert params.n_kv_heads_per_device == 2
