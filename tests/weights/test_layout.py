"""Naming tables: anchored, longest first, and a second run changes nothing."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_vlm_pipes.errors import WeightsError
from mlx_vlm_pipes.weights import (
    ConvToChannelsLast,
    ConvToMatrix,
    Layout,
    Prefix,
    Reshape,
    WeightData,
    adapt,
    decoder,
    detect_layout,
    map_names,
)
from mlx_vlm_pipes.weights.layout import TEXT_LAYOUTS

V4 = Layout(
    "v4",
    (
        *decoder("language_model.model.", "language_model.lm_head."),
        Prefix("tower.", "vision_model."),
    ),
)
V5 = Layout("v5", (*decoder("model.language_model."), Prefix("model.tower.", "vision_model.")))
MLX = Layout(
    "mlx",
    (
        *decoder("language_model.model.", "language_model.lm_head."),
        Prefix("tower.vision_model.", "vision_model."),
    ),
)
LAYOUTS = (V4, V5, MLX)
CANONICAL = {
    "language_model.embed_tokens.weight",
    "language_model.layers.11.mlp.up_proj.scales",
    "language_model.norm.weight",
    "language_model.lm_head.weight",
    "vision_model.patch.weight",
}
SOURCES = {
    "v4": ("language_model.model.", "language_model.lm_head.", "tower."),
    "v5": ("model.language_model.", "lm_head.", "model.tower."),
    "mlx": ("language_model.model.", "language_model.lm_head.", "tower.vision_model."),
}


def spell(layout: str) -> set[str]:
    text, head, vision = SOURCES[layout]
    return {
        f"{text}embed_tokens.weight",
        f"{text}layers.11.mlp.up_proj.scales",
        f"{text}layers.11.self_attn.rotary_emb.inv_freq",
        f"{text}norm.weight",
        f"{head}weight",
        f"{vision}patch.weight",
    }


@pytest.mark.parametrize("name", SOURCES)
def test_layouts_are_told_apart_and_mapped_idempotently(name: str) -> None:
    layout = detect_layout(spell(name), LAYOUTS)
    assert layout.name == name
    assert set(map_names(spell(name), layout).values()) == CANONICAL
    for other in LAYOUTS:  # canonical names pass through every table unchanged
        assert map_names(CANONICAL, other) == {n: n for n in CANONICAL}


@pytest.mark.parametrize("layout", TEXT_LAYOUTS, ids=lambda layout: layout.name)
def test_text_layouts(layout: Layout) -> None:
    names = ["embed_tokens.weight", "layers.3.mlp.up_proj.weight", "norm.weight", "lm_head.weight"]
    stored = {
        "huggingface": [f"model.{name}" for name in names[:3]] + names[3:],
        "mlx-vlm": [f"language_model.model.{n}" for n in names[:3]]
        + ["language_model.lm_head.weight"],
        "bare decoder": names,
        "canonical": [f"language_model.{name}" for name in names],
        "gguf": ["token_embd.weight", "blk.3.ffn_up.weight", "output_norm.weight", "output.weight"],
    }[layout.name]
    assert detect_layout(stored, TEXT_LAYOUTS) is layout
    assert list(map_names(stored, layout).values()) == [f"language_model.{n}" for n in names]


def test_numbers_and_boundaries() -> None:
    layout = Layout(
        "x",
        (
            Prefix("t.layer.*.attention.out.", "v.layers.*.attn.proj."),
            Prefix("t.layer.*.lambda_1", "v.layers.*.ls1"),
            Prefix("t.layer.*.", "v.layers.*."),
        ),
    )
    mapped = map_names(
        ["t.layer.10.attention.out.bias", "t.layer.2.lambda_1", "t.layer.2.lambda_10"], layout
    )
    assert list(mapped.values()) == [
        "v.layers.10.attn.proj.bias", "v.layers.2.ls1", "v.layers.2.lambda_10"
    ]  # fmt: skip
    for name in ("xt.layer.1.a", "t.layer.one.a", "t.layer.1"):
        assert layout.rename(name) is None


def test_unknown_and_doubled_names_are_errors() -> None:
    many = [f"strange.{kind}.{n}.w" for kind in "abcdefghijkl" for n in range(3)]
    with pytest.raises(WeightsError, match=r"36 tensors unknown.*strange\.a\.N\.w \(x3\).*2 more"):
        map_names([*spell("v4"), *many], V4)
    with pytest.raises(WeightsError, match=r"no tensor name is known \(layouts tried: v4, v5"):
        detect_layout(many, LAYOUTS)
    with pytest.raises(WeightsError, match="two layouts"):
        map_names(["language_model.norm.weight", "language_model.model.norm.weight"], V4)


def weight(name: str, *shape: int) -> WeightData:
    size = 1
    for side in shape:
        size *= side
    return WeightData.from_array(mx.arange(size).reshape(shape), name)


TRANSFORMS = (
    ConvToChannelsLast("v.patch.weight", channels=3, kernel=(2, 2)),
    Reshape("v.cls", (4,)),
)
FUSED = Layout("fused", (Prefix("old.", "v."),))


def test_values_are_transformed_once() -> None:
    state = {
        w.name: w
        for w in (
            weight("old.patch.weight", 4, 3, 2, 2),
            weight("old.layers.1.attn.qkv.weight", 6, 4),
            weight("old.cls", 1, 1, 4),
        )
    }
    once = adapt(state, FUSED, TRANSFORMS)
    twice = adapt(once, FUSED, TRANSFORMS)
    assert set(once) == set(twice) == {"v.patch.weight", "v.cls", "v.layers.1.attn.qkv.weight"}
    for name, value in once.items():
        assert value.name == name
        assert value.shape == tuple(value.data.shape)
        assert mx.array_equal(value.data, twice[name].data)
    torch_order = state["old.patch.weight"].data
    assert mx.array_equal(once["v.patch.weight"].data, torch_order.transpose(0, 2, 3, 1))


def test_an_ambiguous_convolution_follows_the_files_format() -> None:
    square = (ConvToChannelsLast("v.patch.weight", channels=2, kernel=(2, 2)),)
    state = {"old.patch.weight": weight("old.patch.weight", 1, 2, 2, 2)}
    kept = adapt(state, FUSED, square)["v.patch.weight"].data
    assert mx.array_equal(
        adapt(state, FUSED, square, file_format="mlx")["v.patch.weight"].data, kept
    )
    moved = adapt(state, FUSED, square, file_format="pt")["v.patch.weight"].data
    assert mx.array_equal(moved, kept.transpose(0, 2, 3, 1))


def test_a_convolution_as_a_matrix_is_the_same_from_either_layout() -> None:
    rule = (ConvToMatrix("v.patch.weight", channels=3, kernel=(2, 4)),)
    torch = weight("old.patch.weight", 4, 3, 2, 4)
    mlx = WeightData.from_array(torch.data.transpose(0, 2, 3, 1), torch.name)
    for stored in (torch, mlx):
        once = adapt({torch.name: stored}, FUSED, rule)
        assert mx.array_equal(once["v.patch.weight"].data, torch.data.reshape(4, 24))
        twice = adapt(once, FUSED, rule)
        assert mx.array_equal(twice["v.patch.weight"].data, once["v.patch.weight"].data)


def test_a_convolution_without_rows_stays_without() -> None:
    rule = (ConvToMatrix("v.patch.weight", channels=3, kernel=(2, 4)),)
    adapted = adapt({"old.patch.weight": weight("old.patch.weight", 0, 3, 2, 4)}, FUSED, rule)
    assert adapted["v.patch.weight"].shape == (0, 24)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("old.patch.weight", (4, 5, 2, 2)), ("old.cls", (5,))],
)
def test_shapes_that_no_transform_can_take(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError, match="expected"):
        adapt({name: weight(name, *shape)}, FUSED, TRANSFORMS)
