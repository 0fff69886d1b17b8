"""Tiles, spans, both layouts, clips; numbers from the specification, section 14."""

import json

import numpy as np
import pytest

from mlx_vlm_pipes.architectures.internvl import processing as room
from mlx_vlm_pipes.architectures.internvl.sizes import is_original
from mlx_vlm_pipes.errors import ConfigError, InputError, ProcessorError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.processing.video import VideoInfo
from tests.processing.folders import INTERNVL_TOKENS, make_folder, picture, template

VISION = {"image_size": 16, "patch_size": 4}
NATIVE = {"model_type": "internvl"}
TEXT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"


def make(path, *, original=False, **config):
    image = {"crop_size": 16, "do_center_crop": True, "size": 99} if original else {}
    if not original:
        image = {"size": {"height": 16, "width": 16}, "max_patches": 4}
    chat = TEXT_TEMPLATE if original else template(image="<IMG_CONTEXT>\n", video="<video>\n")
    files = {"preprocessor_config.json": image}
    folder = make_folder(path, INTERNVL_TOKENS, files, chat)
    dialect = {"llm_config": {}, "max_dynamic_patch": 4} if original else NATIVE
    overrides = config.pop("overrides", None)
    return room.InternVLProcessor(folder, {"vision_config": VISION, **dialect, **config}, overrides)


@pytest.mark.parametrize(
    ("height", "width", "columns", "rows", "tiles"),
    [
        (448, 448, 1, 1, 1),
        (600, 800, 4, 3, 13),
        (1080, 1920, 4, 2, 9),
        (2000, 500, 1, 4, 5),
        (333, 1000, 3, 1, 4),
        (900, 1350, 3, 2, 7),
    ],
)
def test_tiles(height, width, columns, rows, tiles) -> None:
    assert room.best_grid((width, height), 448, 1, 12) == (columns, rows)
    count = columns * rows + (columns * rows > 1)
    assert count == tiles


def test_equally_close_grids_are_decided_by_area() -> None:
    assert room.best_grid((86, 86), 56, 1, 6) == (2, 2)
    assert room.best_grid((70, 70), 56, 1, 6) == (1, 1)
    assert room.grids(1, 4)[:5] == [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1)]
    assert room.grids(1, 4)[5:] == [(1, 4), (2, 2), (4, 1)]


@pytest.mark.parametrize("original", [False, True])
def test_text_and_spans(tmp_path, original) -> None:
    processor = make(tmp_path, original=original)
    request = PromptRequest("a", images=[picture(32, 16), picture(16, 16)])
    out = processor.process(request)
    run = "<IMG_CONTEXT>" * 4
    text = processor.tokenizer.decode(out.input_ids, skip_special_tokens=False)
    media = f"<img>{run * 3}</img>\n<img>{run}</img>\na"
    assert text == (f"user:{media}\n" if original else f"<|user|>{media}<|end|><|assistant|>")
    assert [image.pixel_values.shape for image in out.images] == [
        (3, 4, 4, 3, 4, 4),
        (1, 4, 4, 3, 4, 4),
    ]
    assert out.pixel_values.shape == (4, 3, 16, 16)
    patch = out.images[0].pixel_values[1, 2, 3]  # second tile, third row, fourth column
    np.testing.assert_array_equal(patch, out.pixel_values[1, :, 8:12, 12:16])
    context = processor.new_context(out, max_length=1000)
    assert len(context.image_token_indices) == 16
    mean = (0.485, 0.456, 0.406) if original else (0.48145466, 0.4578275, 0.40821073)
    assert processor.pixels.mean == mean


def test_clip_is_numbered_frames_among_images(tmp_path) -> None:
    content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "b"}]
    request = PromptRequest(
        [{"role": "user", "content": content}],
        images=[picture(16, 16)],
        videos=[[picture(9, 20, i) for i in range(2)]],
    )
    for original in (False, True):
        processor = make(tmp_path, original=original)
        out = processor.process(request)
        one = f"<img>{'<IMG_CONTEXT>' * 4}</img>"
        text = processor.tokenizer.decode(out.input_ids, skip_special_tokens=False)
        assert f"Frame1: {one}\nFrame2: {one}\n{one}\nb" in text
        assert out.pixel_values.shape == (3, 3, 16, 16)
        assert len(out.images) == 3
        assert out.extra["num_patches"].tolist() == [2, 1]
    assert room.sample_frames(VideoInfo(100, 25.0), 4).tolist() == [12, 37, 62, 87]
    assert room.sample_frames(VideoInfo(3, 25.0), 8).tolist() == [0, 1, 2]


def test_clips_have_their_own_settings(tmp_path) -> None:
    folder = make(tmp_path).folder
    own = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "rescale_factor": 0.5}
    for size, error in ((16, None), (32, "size is 32; expected 16, a tile's side")):
        values = {**own, "size": {"height": size, "width": size}}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(values))
        processor = make(tmp_path)
        frame = picture(16, 16)
        request = PromptRequest("why?", images=[frame], videos=[[frame]])
        if error is not None:
            with pytest.raises(ProcessorError, match=error):
                processor.process(request)
            continue
        out = processor.process(request)
        halves = np.asarray(frame).transpose(2, 0, 1) / 2
        assert out.pixel_values is not None
        assert sum(np.array_equal(tile, halves) for tile in out.pixel_values) == 1


def test_raw_markers_of_either_kind(tmp_path) -> None:
    processor = make(tmp_path)
    for text in ("x <image> y", "x <IMG_CONTEXT> y"):
        out = processor.process(PromptRequest(text, images=[picture(16, 16)], raw=True))
        assert out.media[0].num_tokens == 4
    both = "x <IMG_CONTEXT> is no <image>"
    out = processor.process(PromptRequest(both, images=[picture(16, 16)], raw=True))
    assert "is no <image>" in processor.tokenizer.decode(out.input_ids)
    plain = processor.process(PromptRequest("what is <image> or <video>?", raw=True))
    assert plain.images == []  # without pictures these are words
    with pytest.raises(InputError, match="0 images for 1 placeholders"):
        processor.process(PromptRequest("what is <IMG_CONTEXT>?", raw=True))


def test_config_settings(tmp_path) -> None:
    assert make(tmp_path, max_dynamic_patch=1).tiles.max_tiles == 1
    assert make(tmp_path, original=True, dynamic_image_size=False).tiles.max_tiles == 1
    assert make(tmp_path, original=True, force_image_size=32).tiles.tokens == 16
    with pytest.raises(ConfigError, match="tiles of 30 pixels"):
        make(tmp_path, original=True, force_image_size=30)
    with pytest.raises(ProcessorError, match="tiles of 16"):
        make(tmp_path, max_dynamic_patch=1000)
    with pytest.raises(ConfigError, match=r"num_image_token 5; .* make 4 tokens"):
        make(tmp_path, original=True, num_image_token=5)


def test_overrides_win(tmp_path) -> None:
    """As the spec's section 7.4 has it: more tiles, or fewer, than config.json and files say."""
    request = PromptRequest("x", images=[picture(64, 16)])
    for original in (False, True):
        for most, tiles in ((1, 1), (3, 4), (4, 5)):
            processor = make(tmp_path, original=original, overrides={"max_dynamic_patch": most})
            assert processor.process(request).media[0].num_tokens == 4 * tiles
    single = make(tmp_path, dynamic_image_size=False, overrides={"max_dynamic_patch": 4})
    assert single.process(request).media[0].num_tokens == 4 * 5
    for wrong, message in (({"max_tiles": 3}, "knows min_dynamic_patch, max_dynamic_patch"),
                           ({"max_dynamic_patch": 0}, "is 0, expected an int from 1")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            make(tmp_path, overrides=wrong)


def test_one_opinion_on_the_dialect(tmp_path) -> None:
    config = {"model_type": "internvl_chat", "vision_config": {"hidden_size": 64, **VISION}}
    assert is_original(HuggingFaceConfig(config))
    processor = room.InternVLProcessor(make(tmp_path, original=True).folder, config)
    assert processor.pixels.mean == (0.485, 0.456, 0.406)
    assert processor.tokens.text_markers
