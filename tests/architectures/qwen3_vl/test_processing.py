"""Clips frame by frame: text, sizes, frame numbers and times."""

import numpy as np
import pytest

from mlx_vlm_pipes.architectures.qwen3_vl import processing as room
from mlx_vlm_pipes.errors import InputError, ProcessorError
from mlx_vlm_pipes.processing.patches import ClipSettings, PatchSettings, smart_size
from mlx_vlm_pipes.processing.settings import Settings
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.processing.video import VideoInfo
from tests.processing.folders import QWEN_TOKENS, make_folder, picture, template

PAIR = "<|vision_start|>{}<|vision_end|>"
FRAME = PAIR.format("<|video_pad|>")
VISION = {"patch_size": 16, "spatial_merge_size": 2}
IMAGE = {"patch_size": 16, "size": {"shortest_edge": 1024, "longest_edge": 16384}}


def make(path, video=None, vision=None):
    path.mkdir(exist_ok=True)
    files = {"preprocessor_config.json": IMAGE, "video_preprocessor_config.json": video or {}}
    chat = template(image=PAIR.format("<|image_pad|>"), video=FRAME)
    folder = make_folder(path, QWEN_TOKENS, files, chat)
    return room.Qwen3VLProcessor(folder, {"vision_config": vision or VISION})


@pytest.mark.parametrize(
    "around", ["{}", FRAME.replace("<|video_pad|>", "{}"), "<|vision_start|>{}"]
)
def test_a_frame_s_pair_takes_the_place_of_the_outer_one(tmp_path, around: str) -> None:
    """As transformers 4.57: the whole pair or a bare placeholder; half a pair is text."""
    processor = make(tmp_path)
    clip = [picture(64, 32, seed) for seed in range(3)]
    text = "a" + around.format("<|video_pad|>") + "b"
    out = processor.process(PromptRequest(text, videos=[clip], raw=True, min_pixels=1))
    frames = "<0.2 seconds>{0}<1.0 seconds>{0}".format(FRAME.replace("pad|>", "pad|><|video_pad|>"))
    kept = "<|vision_start|>" if around == "<|vision_start|>{}" else ""
    assert processor.tokenizer.decode(out.input_ids, skip_special_tokens=False) == (
        f"a{kept}{frames}b"
    )
    assert [image.grid_thw for image in out.images] == [(1, 2, 4)] * 2
    assert [image.end_idx - image.start_idx for image in out.images] == [2, 2]
    (record,) = out.media
    assert (record.grid, record.num_frames, record.num_tokens) == ((2, 2, 4), 3, 4)
    assert out.hf_arrays["video_grid_thw"].tolist() == [[2, 2, 4]]


def test_positions_count_no_time(tmp_path) -> None:
    processor = make(tmp_path)
    clip = [picture(64, 32, seed) for seed in range(4)]
    request = PromptRequest("<|video_pad|>", videos=[clip], raw=True, min_pixels=1)
    out = processor.process(request)
    context = processor.new_context(out, max_length=1000)
    first, second = out.images
    positions = context.decoder_position_ids
    begin = first.start_idx
    assert positions[:, begin : begin + 3].T.tolist() == [
        [begin, begin, begin], [begin, begin, begin + 1], [begin + 2] * 3,
    ]  # fmt: skip
    text = second.start_idx - first.end_idx
    assert positions[:, second.start_idx].tolist() == [begin + 2 + text] * 3
    assert context.rope_delta == 0  # two tokens, two columns


@pytest.mark.parametrize(
    ("frames", "size", "limits", "expected"),
    [
        # transformers video_processing_qwen3_vl.py, smart_resize: (height, width)
        (8, (1080, 1920), (131072, 25165824), (1088, 1920)),
        (24, (1080, 1920), (131072, 25165824), (768, 1344)),
        (5, (90, 61), (131072, 25165824), (224, 160)),
        (4, (20, 100), (1024, 25165824), (32, 160)),
        (5, (7, 3), (1024, 4096), (32, 32)),
    ],
)
def test_size_of_a_clip(frames, size, limits, expected) -> None:
    settings = PatchSettings.read(
        Settings("x", {"size": {"shortest_edge": limits[0], "longest_edge": limits[1]}}),
        room.Qwen3VLProcessor.video_defaults,
    )
    width, height = smart_size(room.at_least(size[::-1], settings.factor), settings, frames)
    assert (height, width) == expected


def test_frame_numbers_and_times() -> None:
    limits = ClipSettings.read(
        Settings("x", {"max_frames": 8}), room.Qwen3VLProcessor.max_video_tokens
    )

    def chosen(total: int, rate: float, **options: float) -> list[int]:
        request = PromptRequest("x", **options)
        return room.sample_frames(VideoInfo(total, rate), request, limits).tolist()

    assert chosen(100, 25.0) == [0, 14, 28, 42, 57, 71, 85, 99]
    assert chosen(100, 25.0, fps=0.1) == [0, 33, 66, 99]
    assert chosen(30, 10.0, num_frames=3) == [0, 14, 29]
    assert chosen(3, 10.0) == [0, 1, 2]
    assert room.step_seconds([0.0, 0.5, 1.0], 2) == [0.25, 1.0]


def test_a_cap_only_where_the_files_ask_for_one(tmp_path) -> None:
    clip = [picture(256, 256)] * 4
    for cap, grid in ((None, (2, 16, 16)), (True, (2, 8, 8)), (False, (2, 16, 16))):
        video = {"cap_pixels_per_frame": cap, "max_video_tokens": 16,
                 "size": {"shortest_edge": 1024, "longest_edge": 32**2 * 768}}  # fmt: skip
        processor = make(tmp_path / str(cap), video)
        out = processor.process(PromptRequest("x", videos=[clip]))
        assert out.media[0].grid == grid, cap


def test_refusals(tmp_path) -> None:
    processor = make(tmp_path / "a")
    with pytest.raises(InputError, match="a clip of 1 frames; Qwen3-VL takes 2"):
        processor.process(PromptRequest("x", videos=[[picture(64, 64)]]))
    with pytest.raises(InputError, match="0 videos for 1 placeholders"):
        processor.process(PromptRequest(FRAME, raw=True))
    with pytest.raises(ProcessorError, match="patches of 16 pixels"):
        make(tmp_path / "b", vision={**VISION, "patch_size": 14})


def test_the_same_frame_is_encoded_once(tmp_path) -> None:
    still = picture(64, 64)
    out = make(tmp_path).process(PromptRequest("x", videos=[[still] * 4]))
    first, second = out.images
    assert first.image_hash == second.image_hash
    np.testing.assert_array_equal(first.pixel_values, second.pixel_values)
