"""Limits of pictures in every spelling of the files, and positions of clips."""

import pytest

from mlx_vlm_pipes.architectures.qwen2_vl.processing import Qwen2VLProcessor
from mlx_vlm_pipes.errors import ProcessorError
from mlx_vlm_pipes.processing.types import PromptRequest
from tests.processing.folders import QWEN_TOKENS, make_folder, picture, template

PAIR = "<|vision_start|>{}<|vision_end|>"
VISION = {"patch_size": 14, "spatial_merge_size": 2}


def make(path, image=None, vision=None) -> Qwen2VLProcessor:
    path.mkdir(exist_ok=True)
    chat = template(image=PAIR.format("<|image_pad|>"), video=PAIR.format("<|video_pad|>"))
    folder = make_folder(path, QWEN_TOKENS, {"preprocessor_config.json": image or {}}, chat)
    return Qwen2VLProcessor(folder, {"vision_config": vision or VISION})


@pytest.mark.parametrize(
    "limits",
    [
        {"min_pixels": 3136, "max_pixels": 40000},  # as Qwen released them
        {"size": {"min_pixels": 3136, "max_pixels": 40000}},  # transformers 4.49
        {"size": {"shortest_edge": 3136, "longest_edge": 40000}},
        {"size": {"shortest_edge": 1, "longest_edge": 1}, "min_pixels": 3136, "max_pixels": 40000},
    ],
)
def test_limits_in_every_spelling(tmp_path, limits) -> None:
    """Sizes are transformers' smart_resize; a clip's frames have the limits of pictures."""
    processor = make(tmp_path, limits)
    images, clip = [picture(300, 200), picture(20, 30)], [picture(300, 200)] * 4
    out = processor.process(PromptRequest("x", images=images, videos=[clip]))
    assert [record.grid for record in out.media] == [(1, 10, 16), (1, 6, 4), (2, 10, 16)]


def test_a_step_of_a_clip_takes_one_position_at_any_speed(tmp_path) -> None:
    processor, found = make(tmp_path, {"min_pixels": 1, "max_pixels": 784}), []
    clip = [picture(28, 28, seed) for seed in range(6)]
    for fps in (0.5, 4.0):
        request = PromptRequest("<|video_pad|>b", videos=[clip], raw=True, fps=fps)
        out = processor.process(request)
        context = processor.new_context(out, max_length=1000)
        begin = out.images[0].start_idx
        positions = context.decoder_position_ids[:, begin : begin + 4]
        assert (positions.T - begin).tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 3, 3]]
        assert "second_per_grid_ts" not in out.hf_arrays
        found.append(out.images[0].image_hash)
    assert found[0] == found[1]  # so that its cached keys serve for both


def test_processor_and_model_must_agree(tmp_path) -> None:
    with pytest.raises(ProcessorError, match="patches of 14 pixels"):
        make(tmp_path, vision={**VISION, "patch_size": 16})
