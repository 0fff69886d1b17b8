"""Sizes, grids, windows and positions; numbers from the specification, section 14."""

import numpy as np
import pytest

from mlx_vlm_pipes.architectures.qwen2_5vl import context as tables
from mlx_vlm_pipes.architectures.qwen2_5vl import processing as room
from mlx_vlm_pipes.errors import InputError, ProcessorError
from mlx_vlm_pipes.processing import grid_clips, grids, patches
from mlx_vlm_pipes.processing.settings import Settings
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.processing.video import VideoInfo
from tests.processing.folders import QWEN_TOKENS, make_folder, picture, template

SIZES = tables.VisionSizes()
ROPE = tables.RopeTokens(2, 2, image_token_id=90, video_token_id=91, vision_start_token_id=92)
VISION = {"patch_size": 14, "spatial_merge_size": 2, "tokens_per_second": 2, "window_size": 112}


def settings(max_pixels: int) -> patches.PatchSettings:
    values = {"min_pixels": 3136, "max_pixels": max_pixels}
    return patches.PatchSettings.read(Settings("x", values), room.Qwen2_5VLProcessor.image_defaults)


def still(*grid: int) -> np.ndarray:
    return ROPE.positions(tables.Qwen2_5VLImage(0, 1, np.zeros(1), None, grid))


def make(path, image=None, vision=None, video=None):
    files = {"preprocessor_config.json": {"min_pixels": 784, "max_pixels": 9408, **(image or {})}}
    if video:
        files["video_preprocessor_config.json"] = video
    around = "<|vision_start|>{}<|vision_end|>"
    chat = template(image=around.format("<|image_pad|>"), video=around.format("<|video_pad|>"))
    folder = make_folder(path, QWEN_TOKENS, files, chat)
    return room.Qwen2_5VLProcessor(folder, {"vision_config": vision or VISION})


@pytest.mark.parametrize(
    ("height", "width", "limit", "size", "tokens"),
    [
        (1080, 1920, 12845056, (1092, 1932), 2691),
        (600, 800, 12845056, (588, 812), 609),
        (30, 40, 12845056, (56, 84), 6),
        (1080, 1920, 1003520, (728, 1316), 1222),
        (4000, 3000, 1003520, (1148, 840), 1230),
    ],
)
def test_size_and_tokens(height, width, limit, size, tokens) -> None:
    new_width, new_height = patches.smart_size((width, height), settings(limit))
    assert (new_height, new_width) == size
    assert new_height * new_width // 28**2 == tokens


def test_ratio_above_200_is_refused() -> None:
    patches.smart_size((200, 1), settings(10**6))
    with pytest.raises(InputError, match="201x1"):
        patches.smart_size((201, 1), settings(10**6))


def test_windows() -> None:
    order, boundaries = tables.window_index([(1, 6, 10)], SIZES)
    assert order.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 4, 9, 14]
    assert boundaries.tolist() == [0, 48, 60]
    assert tables.window_index([(1, 16, 16)], SIZES)[1].tolist() == [0, 64, 128, 192, 256]
    both, starts = tables.window_index([(1, 2, 2), (2, 6, 10)], SIZES)
    assert both.tolist() == [0, *(order + 1), *(order + 16)]
    assert starts.tolist() == [0, 4, 52, 64, 112, 124]
    assert starts.dtype == np.uint32
    assert grids.cu_seqlens([(2, 4, 4), (1, 2, 2)]).tolist() == [0, 16, 32, 36]


def test_vision_positions() -> None:
    rows, columns = grids.vision_position_ids([(1, 4, 4)], 2).T.tolist()
    assert rows == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert columns == [0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 0, 1, 2, 3, 2, 3]
    assert grids.vision_position_ids([(2, 4, 4)], 2)[16:, 0].tolist() == rows


def test_decoder_positions_of_an_image() -> None:
    ids = np.array([1, 2, 3, 92, *[90] * 6, 4, 5])
    positions, delta = grids.rope_index(ids, {90: [still(1, 4, 6)]})
    assert positions.tolist() == [
        [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 7, 8],
        [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8],
        [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8],
    ]
    assert delta == -3


def test_decoder_positions_of_a_clip() -> None:
    ids = np.array([1, 92, *[91] * 8, 4, 5])
    clip = tables.Qwen2_5VLImage(2, 10, np.zeros(1), None, (4, 2, 4), True, 1.0)
    positions, delta = grids.rope_index(ids, {90: [], 91: [ROPE.positions(clip)]})
    assert positions.tolist() == [
        [0, 1, 2, 2, 4, 4, 6, 6, 8, 8, 9, 10],
        [0, 1, *[2] * 8, 9, 10],
        [0, 1, *[2, 3] * 4, 9, 10],
    ]
    assert delta == -1


def test_text_and_later_image_tokens_are_text() -> None:
    positions, delta = grids.rope_index(np.array([1, 90, 91, 2]), {90: [], 91: []})
    assert (positions.tolist(), delta) == ([[0, 1, 2, 3]] * 3, 0)
    with pytest.raises(InputError, match="run of 6 tokens 90"):
        grids.rope_index(np.array([1, 90, 90]), {90: [still(1, 4, 6)]})


def test_context_of_image_and_clip(tmp_path) -> None:
    processor = make(tmp_path, video={"size": {"shortest_edge": 784, "longest_edge": 3136}})
    parts = [{"type": "video"}, {"type": "text", "text": "a"}, {"type": "image"}]
    out = processor.process(
        PromptRequest(
            [{"role": "user", "content": parts}],
            images=[picture(90, 60)],
            videos=[[picture(56, 56, i) for i in range(5)]],
            fps=1.0,
        )
    )
    assert [r.grid for r in out.media] == [(3, 4, 4), (1, 4, 6)]
    assert out.pixel_values.shape == (24, 1176)
    assert out.pixel_values_videos.shape == (48, 1176)
    assert out.extra["second_per_grid_ts"].tolist() == [2.0]
    last = out.pixel_values_videos.reshape(48, 3, 2, 14, 14)[32:]
    np.testing.assert_array_equal(last[:, :, 0], last[:, :, 1])  # fifth frame, repeated
    context = processor.new_context(out, max_length=1000)
    data = context.vision_data
    assert data.cu_seqlens.tolist() == [0, 16, 32, 48, 72]
    assert data.concatenated_pixel_values.shape == (72, 1176)
    assert (data.max_seqlen.tolist(), int(data.max_grid_size)) == ([24], 6)
    assert data.video_grid_thw.tolist() == [[3, 4, 4]]
    before = context.decoder_position_ids
    assert before.shape == (3, len(out.input_ids))
    assert before.max() + 1 - len(out.input_ids) == context.rope_delta
    context.update(processor.image_token_id)  # a generated image token is text
    context.refresh_positions()
    np.testing.assert_array_equal(context.decoder_position_ids[:, :-1], before)
    assert context.decoder_position_ids[:, -1].tolist() == [before.max() + 1] * 3


def test_request_limits(tmp_path) -> None:
    processor = make(tmp_path)

    def grid(**limits: int) -> tuple[int, ...]:
        request = PromptRequest("x", images=[picture(140, 140)], **limits)
        return processor.process(request).media[0].grid

    assert grid() == (1, 6, 6)
    assert grid(max_pixels=3136) == (1, 4, 4)
    assert grid(min_pixels=28**2 * 36, max_pixels=28**2 * 49) == (1, 12, 12)
    with pytest.raises(InputError, match="min_pixels 5000 and max_pixels 4000"):
        grid(min_pixels=5000, max_pixels=4000)
    twins = [picture(28, 112, 3), picture(112, 28, 3)]
    out = processor.process(PromptRequest("x", images=twins))
    assert len({image.image_hash for image in out.images}) == 2


def test_frame_numbers() -> None:
    limits = patches.ClipSettings.read(Settings("x", {"max_frames": 8}), 128000)

    def chosen(total: int, rate: float, **options: float) -> list[int]:
        request = PromptRequest("x", **options)
        return grid_clips.sample_frames(VideoInfo(total, rate), request, limits, 2).tolist()

    assert chosen(100, 25.0) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert chosen(100, 25.0, fps=0.1) == [0, 25, 50, 75]
    assert chosen(30, 10.0, num_frames=3) == [0, 7, 15, 22]
    assert chosen(3, 10.0) == [0, 1]
    assert chosen(1, 10.0) == [0]


def test_processor_and_model_must_agree(tmp_path) -> None:
    with pytest.raises(ProcessorError, match="patches of 16 pixels"):
        make(tmp_path, {"patch_size": 16})
    with pytest.raises(ProcessorError, match="4 frames"):
        make(tmp_path, {"temporal_patch_size": 4})
    tokens = make(tmp_path)
    config = {"vision_config": VISION, "video_token_id": tokens.video_token_id + 1}
    with pytest.raises(ProcessorError, match="video_token_id"):
        room.Qwen2_5VLProcessor(tmp_path, config)
    capped = make(tmp_path, video={"cap_pixels_per_frame": True, "max_video_tokens": 40})
    out = capped.process(PromptRequest("x", videos=[[picture(280, 280)] * 4]))
    assert out.media[0].grid == (2, 24, 24)  # 1.05 times the least, 128 blocks
