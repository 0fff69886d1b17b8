"""Frames, their text and spans; SmolVLM's clips; numbers from the specification, section 14."""

from dataclasses import replace

import numpy as np
import pytest

from mlx_vlm_pipes.architectures.idefics3 import processing as room
from mlx_vlm_pipes.architectures.idefics3.sizes import FrameSizes
from mlx_vlm_pipes.errors import ConfigError, InputError, ProcessorError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.processing.settings import Settings
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.processing.video import VideoInfo
from tests.processing.folders import IDEFICS3_TOKENS, make_folder, picture, template

IMAGE = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
CONFIG = {"model_type": "idefics3", "vision_config": {"image_size": 16, "patch_size": 8}}
SAMPLING = {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 24}}


def make(path, image=None, tokens=IDEFICS3_TOKENS, **processor):
    files = {
        "preprocessor_config.json": {**IMAGE, **(image or {})},
        "processor_config.json": {"image_seq_len": 1, **processor},
    }
    folder = make_folder(path, tokens, files, template(image="<image>"))
    return room.Idefics3Processor(folder, CONFIG)


@pytest.mark.parametrize(
    ("image", "patch", "scale", "tokens"), [(364, 14, 2, 169), (512, 16, 4, 64), (384, 14, 3, 81)]
)
def test_sequence_length(image, patch, scale, tokens) -> None:
    vision = {"image_size": image, "patch_size": patch}
    config = {"vision_config": vision, "scale_factor": scale}
    assert FrameSizes.read(HuggingFaceConfig(config)).tokens_of(image, "") == tokens


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(750, 1000, 3, 4), (300, 300, 4, 4), (100, 1000, 1, 4), (1456, 1456, 4, 4), (1, 1, 4, 4)],
)
def test_frames(height, width, rows, columns) -> None:
    settings = room.Idefics3Settings.read(Settings("x", {"resample": 0}))
    canvas, frames = room.split(picture(width, height), settings)
    assert canvas.size == (columns * 364, rows * 364)
    assert [f.size for f in frames] == [(364, 364)] * (rows * columns + 1)


def test_text_and_spans(tmp_path) -> None:
    processor = make(tmp_path)
    out = processor.process(PromptRequest("a?", images=[picture(30, 10), picture(5, 5)]))
    fake, run = "<fake_token_around_image>", "<image>"
    wide = f"{fake}<row_1_col_1>{run}{fake}<row_1_col_2>{run}\n\n{fake}<global-img>{run}{fake}"
    lines = ["".join(f"{fake}<row_{r}_col_{c}>{run}" for c in (1, 2)) + "\n" for r in (1, 2)]
    square = "".join(lines) + f"\n{fake}<global-img>{run}{fake}"
    decoded = processor.tokenizer.decode(out.input_ids, skip_special_tokens=False)
    assert decoded == f"<|user|>{wide}{square}a?<|end|><|assistant|>"
    assert [r.grid for r in out.media] == [(1, 2), (2, 2)]
    assert out.pixel_values.shape == (1, 8, 3, 16, 16)
    np.testing.assert_array_equal(out.pixel_values[0, 4], out.images[4].pixel_values)
    context = processor.new_context(out, max_length=1000)
    ids = np.array(out.input_ids)
    expected = np.flatnonzero(ids == processor.image_token_id)
    np.testing.assert_array_equal(context.image_token_indices, expected)
    assert len({image.image_hash for image in out.images}) == 8


def test_without_splitting(tmp_path) -> None:
    out = make(tmp_path, {"do_image_splitting": False}).process(
        PromptRequest("<image> b", images=[picture(9, 40)], raw=True)
    )
    assert [image.pixel_values.shape for image in out.images] == [(3, 16, 16)]
    assert out.media[0].grid == (0, 0)


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        (PromptRequest("x", raw=True), 1, "1 images for 0 placeholders"),
        (PromptRequest("<image><image>", raw=True), 1, "1 images for 2 placeholders"),
        (PromptRequest("what does <image> mean?"), 0, "0 images for 1 placeholders"),
        (PromptRequest("<image> <image>?"), 1, "1 images for 3 placeholders"),
        (PromptRequest("x", max_pixels=9), 0, "max_pixels: not for idefics3"),
        (PromptRequest("x", videos=[[picture(2, 2)]]), 0, "not made for video"),
    ],
)
def test_refused_requests(tmp_path, prompt, images, message) -> None:
    request = replace(prompt, images=[picture(4, 4)] * images)
    with pytest.raises(InputError, match=message):
        make(tmp_path).process(request)


def test_absurd_settings_do_not_flood(tmp_path) -> None:
    values = {"size": {"longest_edge": 4096}, "max_image_size": {"longest_edge": 1}}
    tiny = {"image_size": 1, "patch_size": 1}
    with pytest.raises(ProcessorError, match="max_image_size is 1, which makes 0x0 patches of 8"):
        make(tmp_path, values)
    config = {"model_type": "idefics3", "vision_config": tiny, "scale_factor": 1}
    processor = room.Idefics3Processor(tmp_path, config)
    with pytest.raises(InputError, match="the limit is 262144"):
        processor.process(PromptRequest("x", images=[picture(2, 2)]))


def test_clip(tmp_path) -> None:
    processor = make(tmp_path, {"video_sampling": SAMPLING})
    frames = [picture(20, 10, seed) for seed in range(3)]
    out = processor.process(PromptRequest("why?", videos=[frames], fps=0.5))
    fake = "<fake_token_around_image>"
    one = f"{fake}<global-img><image>{fake}"
    text = processor.tokenizer.decode(out.input_ids, skip_special_tokens=False)
    assert text == (
        "<|user|>You are provided the following series of three frames from a 0:00:06 [H:MM:SS] "
        f"video.\n\nFrame from 00:00:{one}\nFrame from 00:02:{one}\nFrame from 00:04:{one}\n\n"
        "why?<|end|><|assistant|>"
    )
    assert out.pixel_values.shape == (1, 3, 3, 16, 16)


@pytest.mark.parametrize(("size", "first"), [(None, (24, 12)), ({"longest_edge": 40}, (40, 20))])
def test_size_wins_over_the_size_of_video_sampling(tmp_path, size, first) -> None:
    values = {"video_sampling": SAMPLING, "size": size, "resample": 2}
    processor = make(tmp_path, values)
    frame = picture(20, 10)
    out = processor.process(PromptRequest("why?", videos=[[frame]]))
    twice = np.asarray(frame.resize(first, 2).resize((16, 16), 2))
    expected = (twice.transpose(2, 0, 1) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(out.pixel_values[0, 0], expected, atol=1e-6)


def test_clips_have_their_own_settings(tmp_path) -> None:
    own = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16},
           "image_mean": [0, 0, 0], "image_std": [1, 1, 1], "rescale_factor": 0.5}  # fmt: skip
    processor = make(tmp_path, video_processor=own)
    frame = picture(16, 16)
    out = processor.process(PromptRequest("why?", images=[frame], videos=[[frame]]))
    halves = np.asarray(frame).transpose(2, 0, 1) / 2
    np.testing.assert_array_equal(out.pixel_values[0, -1], halves)
    assert out.pixel_values[0, :-1].max() <= 1.0


def test_the_tag_of_the_whole_picture_may_be_text(tmp_path) -> None:
    tokens = ["<fake_token_around_image>", "<image>"]
    out = make(tmp_path, tokens=tokens).process(PromptRequest("x", images=[picture(4, 4)]))
    assert out.media[0].num_tokens == 5
    with pytest.raises(ProcessorError, match="no token '<fake_token_around_image>'"):
        make(tmp_path, tokens=["<image>"])


def test_frame_numbers_and_words() -> None:
    assert room.sample_frames(VideoInfo(100, 10.0), 1.0, 64).tolist()[:3] == [0, 11, 22]
    long = room.sample_frames(VideoInfo(1000, 10.0), 1.0, 64)
    assert (len(long), long[0], long[-1]) == (64, 10, 990)
    assert room.sample_frames(VideoInfo(1, 30.0), 1.0, 64).tolist() == [0]
    words = {
        13: "thirteen", 40: "forty", 64: "sixty-four", 100: "one hundred",
        105: "one hundred and five", 1000: "one thousand", 1024: "one thousand and twenty-four",
        2356: "two thousand, three hundred and fifty-six",
    }  # fmt: skip
    assert {n: room.in_words(n) for n in words} == words


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"max_image_size": {"longest_edge": -1}}, "longest_edge is -1"),
        ({"max_image_size": 5}, "max_image_size is 5"),
        ({"image_std": [0, 1, 1]}, "image_std"),
        ({"resample": 9}, "resample is 9"),
        ({"do_resize": "yes"}, "do_resize is 'yes'"),
        ({"rescale_factor": float("nan")}, "rescale_factor"),
    ],
)
def test_bad_settings_are_named(tmp_path, image, message) -> None:
    with pytest.raises(ProcessorError, match=message):
        make(tmp_path, image)


def test_processor_and_model_must_agree(tmp_path) -> None:
    with pytest.raises(ProcessorError, match="image_seq_len is 2; expected 1, as config"):
        make(tmp_path, image_seq_len=2)
    with pytest.raises(ProcessorError, match="image_token_id is 7"):
        room.Idefics3Processor(make(tmp_path).folder, {**CONFIG, "image_token_id": 7})
    with pytest.raises(ConfigError, match="'max_dynamic_patch'; this architecture knows none"):
        room.Idefics3Processor(tmp_path, CONFIG, {"max_dynamic_patch": 2})


def test_missing_tokens_and_files(tmp_path) -> None:
    with pytest.raises(ProcessorError, match="no token '<image>'"):
        make(tmp_path, tokens=["<global-img>"])
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ProcessorError, match=r"no preprocessor_config\.json"):
        room.Idefics3Processor(tmp_path, CONFIG)
