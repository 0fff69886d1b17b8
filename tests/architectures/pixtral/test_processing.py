"""Sizes, rows of tokens and spans; numbers from the specification, section 14."""

import numpy as np
import pytest

from mlx_vlm_pipes.architectures.pixtral import processing as room
from mlx_vlm_pipes.errors import InputError, ProcessorError
from mlx_vlm_pipes.processing.types import PromptRequest
from tests.processing.folders import PIXTRAL_TOKENS, make_folder, picture, template

CONFIG = {"model_type": "llava", "vision_config": {"model_type": "pixtral", "patch_size": 8}}
IMAGE = {"size": {"longest_edge": 24}, "patch_size": {"height": 8, "width": 8}}


def make(path, image=None, **processor):
    files = {
        "preprocessor_config.json": {**IMAGE, **(image or {})},
        "processor_config.json": processor,
    }
    folder = make_folder(path, PIXTRAL_TOKENS, files, template(image="[IMG]"))
    return room.PixtralProcessor(folder, CONFIG)


@pytest.mark.parametrize(
    ("height", "width", "size", "tokens"),
    [
        (600, 800, (608, 800), 1938),
        (1080, 1920, (576, 1024), 2340),
        (17, 33, (32, 48), 8),
        (3000, 100, (1024, 48), 256),
    ],
)
def test_size_and_tokens(height, width, size, tokens) -> None:
    new_width, new_height = room.fitting_size((width, height), (1024, 1024), 16)
    assert (new_height, new_width) == size
    assert (new_width // 16 + 1) * (new_height // 16) == tokens
    assert room.fitting_size((5000, 1), (1024, 1024), 16) == (1024, 16)


def test_text_and_spans(tmp_path) -> None:
    processor = make(tmp_path)
    out = processor.process(PromptRequest("a", images=[picture(20, 9), picture(3, 3)]))
    text = processor.tokenizer.decode(out.input_ids, skip_special_tokens=False)
    row = "[IMG][IMG][IMG]"
    assert text == f"<|user|>{row}[IMG_BREAK]{row}[IMG_END][IMG][IMG_END]a<|end|><|assistant|>"
    assert [image.pixel_values.shape for image in out.images] == [(3, 16, 24), (3, 8, 8)]
    assert out.pixel_values.shape == (2, 3, 16, 24)
    assert not out.pixel_values[1, :, 8:].any()
    np.testing.assert_array_equal(out.pixel_values[1, :, :8, :8], out.images[1].pixel_values)
    assert out.extra["image_sizes"].tolist() == [[16, 24], [8, 8]]
    context = processor.new_context(out, max_length=1000)
    start = out.images[0].start_idx
    rows = [0, 1, 2, 4, 5, 6]  # without the break between the rows
    assert context.image_token_indices.tolist() == [start + i for i in [*rows, 8]]
    assert out.images[0].end_idx == start + 7  # before [IMG_END]


@pytest.mark.parametrize("processor", [{"patch_size": 16}, {"spatial_merge_size": 2}])
def test_processor_and_model_must_agree(tmp_path, processor) -> None:
    with pytest.raises(ProcessorError, match="as config"):
        make(tmp_path, **processor)


def test_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="takes no video"):
        make(tmp_path).process(PromptRequest("[IMG]", videos=[[picture(4, 4)]], images=[]))
    with pytest.raises(ProcessorError, match="do_center_crop"):
        make(tmp_path, {"do_center_crop": True})
    with pytest.raises(ProcessorError, match="width is 16; expected 8, as config"):
        make(tmp_path, {"patch_size": {"height": 8, "width": 16}})
