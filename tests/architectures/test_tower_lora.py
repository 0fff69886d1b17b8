"""Adapters whose targets match the vision tower and the connector too, in every room that has them.

What they must come to: the numbers of PEFT itself, and those of weights merged by numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_vlm_pipes import load
from mlx_vlm_pipes.conversion import ConvertOptions, convert
from mlx_vlm_pipes.errors import ConfigError, UnknownAdapter, WeightsError
from mlx_vlm_pipes.loading import BUNDLED
from tests.architectures.adapters import write_adapter
from tests.architectures.driving import relative
from tests.device import bar
from tests.engine.driving import fixture_requests
from tests.fixtures_helper import FIXTURES

RANK = 4
BAR = bar(1e-4)  # of the largest logit: W x + s B (A x) against (W + s B A) x
ROOMS = [
    "idefics3", "pixtral", "internvl-qwen2", "internvl-chat", "qwen2vl", "qwen25vl", "qwen3vl",
]  # fmt: skip
NO_LINEARS = ("embed", "position", "lm_head", "patch")


def adapt(base: Path, root: Path, *, text: bool = True) -> tuple[Path, Path]:
    """An adapter over all linears (text: the decoder's too), and the merged checkpoint."""

    def is_adapted(path: str) -> bool:
        is_text = any(part in path for part in ("text_model", "language_model", "model.layers."))
        return not any(name in path for name in NO_LINEARS) and (text or not is_text)

    folder, merged = root / "adapter", root / "merged"
    seed = len(base.name)
    write_adapter(base, folder, merged, is_adapted, rank=RANK, spread=0.2, seed=seed)
    return folder, merged


def with_picture(base: Path) -> dict[str, Any]:
    return next(r for r in fixture_requests(base).values() if r["images"] and not r["videos"])


def logits(folder: Path, request: dict[str, Any], **options: Any) -> np.ndarray:
    with load(folder, dtype="float32", **options) as pipe:
        return pipe.logits(**request)


@pytest.mark.parametrize("room", ROOMS)
def test_an_adapter_of_the_whole_model_equals_merged_weights(room: str, tmp_path: Path) -> None:
    base = FIXTURES / room
    folder, merged = adapt(base, tmp_path)
    request = with_picture(base)
    wanted = logits(merged, request)
    assert relative(logits(base, request, adapter=folder), wanted) < BAR
    assert relative(logits(base, request), wanted) > 0.05
    options: dict[str, Any] = {"dtype": "float32", "measure": False}
    convert(ConvertOptions(model=base, out=tmp_path / "out", lora=folder, **options))
    assert relative(logits(tmp_path / "out", request), wanted) < BAR


def test_a_packed_tower_gets_the_adapter_unrounded(tmp_path: Path) -> None:
    """Merged floats take the place of packed weights: nothing is rounded a second time."""
    base, request = FIXTURES / "idefics3", with_picture(FIXTURES / "idefics3")
    folder, _ = adapt(base, tmp_path)
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    options: dict[str, Any] = {"bits": 4, "group_size": 32, "quantize_vision": True}
    convert(ConvertOptions(model=base, out=packed, measure=False, **options))
    convert(ConvertOptions(model=packed, out=plain, dequantize=True, lora=folder, measure=False))
    assert relative(logits(packed, request, adapter=folder), logits(plain, request)) < BAR


def test_requests_cannot_leave_a_merged_tower_out(tmp_path: Path) -> None:
    """An adapter of tower and connector alone: one row as several, and no base model."""
    base, request = FIXTURES / "idefics3", with_picture(FIXTURES / "idefics3")
    folder, merged = adapt(base, tmp_path, text=False)
    wanted = logits(merged, request)
    with load(base, dtype="float32", adapter=f"mine={folder}") as pipe:
        assert relative(pipe.logits(**request, adapter="mine"), wanted) < BAR
        with pytest.raises(UnknownAdapter, match=r"no answers of the base model: .* vision tower"):
            pipe.logits(**request, adapter="base")
        batch = pipe.generate_batch([{"prompt": "a"}, {"prompt": "a"}], max_tokens=3, raw=True)
        assert batch[0].tokens == batch[1].tokens


def test_several_adapters_may_not_change_one_tower(tmp_path: Path) -> None:
    base = FIXTURES / "idefics3"
    folder, _ = adapt(base, tmp_path)
    line = (
        r"^adapter 'b' changes 13 linears of the vision tower or connector \(vision_model\..*\),"
        r" which all requests share: load it alone, or merge it .*convert --lora"
    )
    with pytest.raises(ConfigError, match=line):
        load(base, adapter=[f"b={folder}", f"c={folder}"])


def test_an_adapter_of_another_tower_is_refused(tmp_path: Path) -> None:
    folder, _ = adapt(FIXTURES / "idefics3", tmp_path)
    with pytest.raises(WeightsError, match=r"does not fit 13 linears: .*another model"):
        load(adapter=folder)
    with pytest.raises(WeightsError, match=r"^.*adapter: an adapter of another model; it adapts "):
        load(FIXTURES / "llama-tied", adapter=folder)


COOKBOOK = ["down_proj", "o_proj", "k_proj", "q_proj", "gate_proj", "up_proj", "v_proj"]
RECIPES = [
    pytest.param(BUNDLED, {"target_modules": COOKBOOK}, id="the usual SmolVLM recipe"),
    pytest.param(
        FIXTURES / "qwen25vl",
        {"target_modules": "all-linear", "use_rslora": True},
        id="rank-stabilised, all linears",
    ),
    pytest.param(
        BUNDLED,
        {"target_modules": COOKBOOK, "use_dora": True},
        id="DoRA",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        FIXTURES / "pixtral",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"attention.q_proj": 2},
            "alpha_pattern": {"multi_modal_projector.linear_1": 20},
        },
        id="patterns, all linears",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.reference
@pytest.mark.parametrize(("folder", "options"), RECIPES)
def test_logits_are_pefts(folder: Path, options: dict[str, Any], tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options))
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(tmp_path))

    image = np.random.default_rng(1).integers(0, 256, (90, 120, 3), np.uint8)
    with load(folder, dtype="float32", adapter=tmp_path) as pipe:
        encoded = pipe.encode("What is this?", [image])
        found = pipe.logits("What is this?", [image])
    plain = logits(folder, {"prompt": "What is this?", "images": [image]})
    ids = torch.tensor([encoded.input_ids])
    media = {name: torch.tensor(array) for name, array in encoded.hf_arrays.items()}
    if "image_grid_thw" in media:
        media["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        wanted = adapted.eval()(input_ids=ids, **media).logits[0].numpy()
    assert relative(found, wanted) < bar(2e-5)
    assert relative(plain, wanted) > 0.05
