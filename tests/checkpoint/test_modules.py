"""What a loaded model holds, by canonical name: slices of fused matrices, without a second copy."""

import gc
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_vlm_pipes.checkpoint.canonical import canonical, unpack
from mlx_vlm_pipes.checkpoint.state import LANGUAGE, below
from mlx_vlm_pipes.conversion import ConvertOptions, convert
from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.quantization import LoRAConfig
from mlx_vlm_pipes.registry import find_room
from mlx_vlm_pipes.weights import find_weight_files, load_weights
from tests.engine.models import write_llama
from tests.fixtures_helper import FIXTURES
from tests.test_convert import make_adapter
from tests.test_encoding import by_hand


def stored(folder: Path) -> dict[str, mx.array]:
    """The decoder's tensors straight from the files, by canonical name."""
    config = read_config(folder)
    unpacked = unpack(load_weights(find_weight_files(folder)), config)
    state = canonical(unpacked, find_room(config).weight_adapters().LAYOUTS)
    return {name: weight.data for name, weight in below(state, LANGUAGE).items()}


def require_same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert mx.array_equal(found[name], array.astype(found[name].dtype)), name


@pytest.mark.parametrize("case", ["llama-tied", "llama-attn-bias", "phi3-partial", "granite"])
def test_state_dict_has_the_checkpoints_own_tensors(case: str) -> None:
    model = by_hand(FIXTURES / case)
    require_same(model.state_dict, stored(FIXTURES / case))
    assert dict(model.model.weights).keys() == model.state_dict.keys()


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_packed_weights_are_cut_with_scales_and_biases(mode: str, tmp_path: Path) -> None:
    convert(
        ConvertOptions(
            model=FIXTURES / "llama-tied", out=tmp_path / "out", bits=4, group_size=32, mode=mode,
            measure=False,
        )
    )  # fmt: skip
    expected = stored(tmp_path / "out")
    assert "layers.0.self_attn.k_proj.scales" in expected
    require_same(by_hand(tmp_path / "out").state_dict, expected)


@pytest.mark.parametrize("case", ["idefics3", "pixtral", "internvl-qwen3", "qwen25vl"])
def test_language_models_of_all_rooms(case: str) -> None:
    model = by_hand(FIXTURES / case)
    expected = stored(FIXTURES / case)
    if "lm_head.weight" not in model.language_model.weights:
        expected.pop("lm_head.weight", None)  # it repeats the embedding
    require_same(dict(model.language_model.weights), expected)


def test_lora_tables_are_no_weights_of_the_model(tmp_path: Path) -> None:
    folder = FIXTURES / "llama-tied"
    rows, columns = stored(folder)["layers.0.self_attn.q_proj.weight"].shape
    shapes = {"model.layers.0.self_attn.q_proj": (rows, columns)}
    lora = make_adapter(tmp_path / "lora", shapes)
    config = LoRAConfig(enable_lora=True, lora_paths=[str(lora)])
    require_same(by_hand(folder, lora=config).state_dict, stored(folder))


def test_reading_them_holds_no_second_copy() -> None:
    model = by_hand(FIXTURES / "llama-tied")
    before = mx.get_active_memory()
    mx.eval(list(model.state_dict.values()))
    assert sum(array.nbytes for array in model.state_dict.values()) > 100_000
    assert mx.get_active_memory() - before < 1000


@pytest.mark.parametrize("encoding", ["float32", "float16"])
def test_a_loaded_model_holds_its_weights_once(encoding: str, tmp_path: Path) -> None:
    """Neither what was fused nor what was cast stays with the open checkpoint."""
    folder = write_llama(tmp_path / "llama", layers=8, heads=16, kv_heads=8)
    gc.collect()
    before = mx.get_active_memory()
    model = by_hand(folder, encoding)
    gc.collect()
    size = sum(array.nbytes for array in model.state_dict.values())
    assert mx.get_active_memory() - before < 1.05 * size
