"""`check` judges a checkpoint by the very path that `load` takes, and one place ties the head."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_vlm_pipes.checkpoint.canonical import canonical_state
from mlx_vlm_pipes.checkpoint.headers import HeaderWeights
from mlx_vlm_pipes.checkpoint.tie import settle_head
from mlx_vlm_pipes.config import ModelConfig, PipelineConfig
from mlx_vlm_pipes.doctor import examine
from mlx_vlm_pipes.errors import WeightsError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.weights import WeightData, find_weight_files, load_weights, read_header
from mlx_vlm_pipes.weights.layout import TEXT_LAYOUTS, ConvToMatrix, Reshape
from tests.fixtures_helper import cases
from tests.test_check import copy_case, edit_json, edit_tensors

CONV = ConvToMatrix("language_model.layers.0.patch.weight", 3, (2, 2))
SHAPE = Reshape("language_model.layers.0.patch.weight", (4, 3, 4))


def pipeline(encoding: str = "float32", **values: object) -> PipelineConfig:
    config = HuggingFaceConfig({"model_type": "llama", **values})
    return PipelineConfig(ModelConfig(huggingface_config=config, quantization_encoding=encoding))


def named(**arrays: mx.array) -> dict[str, WeightData]:
    names = {key: key.replace("__", ".") for key in arrays}
    return {names[k]: WeightData.from_array(v, names[k]) for k, v in arrays.items()}


@pytest.mark.parametrize("folder", cases(), ids=lambda path: path.name)
def test_headers_and_tensors_become_the_same_state(folder: Path) -> None:
    from mlx_vlm_pipes.hf_config import read_config
    from mlx_vlm_pipes.registry import find_room

    config = read_config(folder)
    made = PipelineConfig(ModelConfig(huggingface_config=config, quantization_encoding="float32"))
    model_class = find_room(config).model_class()
    _, changes = model_class.read_config(made)
    headers = [read_header(path) for path in find_weight_files(folder)]
    infos = {name: info for header in headers for name, info in header.tensors.items()}
    both = [
        canonical_state(weights, None, model_class.layouts, made, changes)
        for weights in (
            load_weights(find_weight_files(folder)),
            HeaderWeights(infos, headers[0].metadata),
        )
    ]
    loaded, judged = (
        {name: (w.shape, w.dtype, tuple(w.data.shape)) for name, w in state.items()}
        for state in both
    )
    assert judged == loaded


def test_what_loading_raises_is_what_a_report_collects() -> None:
    state = named(
        model__norm__weight=mx.ones((4,)),
        model__layers__0__patch__weight=mx.ones((3, 5, 2, 2)),
        surprise=mx.ones((1,)),
    )
    found: list[tuple[str, str]] = []
    kept = canonical_state(
        state, None, TEXT_LAYOUTS, pipeline(), [CONV],
        report=lambda where, error: found.append((where, str(error))),
    )  # fmt: skip
    assert [where for where, _ in found] == ["unexpected", "mis-shaped"]
    assert "language_model.norm.weight" in kept
    with pytest.raises(WeightsError, match="surprise"):
        canonical_state(state, None, TEXT_LAYOUTS, pipeline(), [CONV])


def test_every_transform_is_applied_one_after_the_other() -> None:
    """A report used to stop at the first that fired."""
    state = named(model__layers__0__patch__weight=mx.arange(48.0).reshape(4, 3, 2, 2))
    made = canonical_state(
        state, None, TEXT_LAYOUTS, pipeline(), [CONV, SHAPE], report=lambda *_: None
    )
    (weight,) = made.values()
    assert mx.array_equal(weight.data, mx.arange(48.0).reshape(4, 3, 4))


def test_check_reads_the_files_format_as_loading_does(tmp_path: Path) -> None:
    """GPTQ whose groups are reordered is expanded to floats at load, and `check` says so."""
    folder = copy_case("llama-tied", tmp_path / "model")
    declared = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    edit_json(folder, "config.json", lambda c: c.update(quantization_config=declared))
    edit_tensors(folder, reorder)
    checkup = examine(folder)
    assert checkup.errors == []
    assert "expanded to floats" in str(checkup.quantization)


def reorder(arrays: dict[str, mx.array]) -> None:
    """Every linear as GPTQ of 4 bits, codes zero, inputs dealt to the groups in turn."""
    for name in [n for n in arrays if n.endswith("_proj.weight")]:
        rows, columns = arrays.pop(name).shape
        module, groups = name.removesuffix(".weight"), columns // 32
        arrays |= {
            f"{module}.qweight": mx.zeros((columns // 8, rows), mx.int32),
            f"{module}.qzeros": mx.zeros((groups, rows // 8), mx.int32),
            f"{module}.scales": mx.ones((groups, rows), mx.float16),
            f"{module}.g_idx": mx.arange(columns, dtype=mx.int32) % groups,
        }


def head_and_embedding(scale: float) -> dict[str, WeightData]:
    codes, scales = mx.arange(8, dtype=mx.uint32).reshape(2, 4), mx.ones((2, 1))
    return named(
        lm_head__weight=codes,
        lm_head__scales=scales * scale,
        embed_tokens__weight=codes,
        embed_tokens__scales=scales,
    )


def test_a_packed_head_is_tied_only_if_its_scales_agree_too() -> None:
    same, other = head_and_embedding(1), head_and_embedding(2)
    assert settle_head(same, tied=True)
    assert "lm_head.weight" not in same
    assert not settle_head(other, tied=True)
    assert "lm_head.weight" in other
    assert not settle_head(head_and_embedding(1), tied=False)
