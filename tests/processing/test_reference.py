"""Pixels, sampling, templates and token ids beside transformers itself, where it is installed."""

import importlib
import io
import random
import types

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes.architectures.idefics3 import processing as idefics3
from mlx_vlm_pipes.architectures.internvl import processing as internvl
from mlx_vlm_pipes.architectures.llama3.processing import Llama3Processor
from mlx_vlm_pipes.architectures.pixtral import processing as pixtral
from mlx_vlm_pipes.architectures.qwen2_5vl import processing as qwen
from mlx_vlm_pipes.errors import MediaError
from mlx_vlm_pipes.processing import grid_clips
from mlx_vlm_pipes.processing.images import load_image
from mlx_vlm_pipes.processing.patches import ClipSettings
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.processing.video import VideoInfo, arange_indices
from tests.fixtures_helper import cases, reference
from tests.processing import folders
from tests.processing.tool_templates import CASES

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore:grey pictures")]

SIZES = [(1, 1), (1, 37), (90, 1), (3, 3), (16, 16), (33, 17), (64, 64), (200, 31), (57, 160)]
SIZES += [
    (random.Random(i).randint(1, 130), random.Random(i + 99).randint(1, 130)) for i in range(6)
]
MODES = ["L", "CMYK", "P", "1"]


@pytest.fixture(autouse=True)
def needs_transformers() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.0")


def images() -> list[Image.Image]:
    rgb = [folders.picture(w, h, seed=i) for i, (w, h) in enumerate(SIZES)]
    modes = [rgb[7].convert(mode) for mode in MODES]
    modes += [folders.picture(40, 23, 1, mode) for mode in ("RGBA", "LA")]
    deep = Image.fromarray(np.asarray(rgb[7].convert("L")).astype(np.uint16) * 3)
    palette = rgb[8].convert("P")
    palette.info["transparency"] = 3
    return [*rgb, *modes, deep, palette]


def theirs(name: str, kind: str, settings: dict):
    module = f"transformers.models.{name}.image_processing_pil_{name}"
    return getattr(importlib.import_module(module), kind)(**settings)


def ours(path, room, kind: str, tokens: list[str], settings: dict, config: dict | None = None):
    files = {"preprocessor_config.json": settings, "processor_config.json": {"image_seq_len": 1}}
    folder = folders.make_folder(path, tokens, files, folders.template())
    return getattr(room, kind)(folder, config or {})


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}},
        {"size": {"longest_edge": 50}, "max_image_size": {"longest_edge": 20}, "resample": 3},
        {"size": {"longest_edge": 33}, "do_image_splitting": False, "rescale_factor": 1 / 127},
        {"size": {"height": 40, "width": 30}, "max_image_size": {"longest_edge": 16}},
        {"do_resize": False, "max_image_size": {"longest_edge": 32}, "do_normalize": False},
    ],
)
@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_idefics3(tmp_path, name, settings) -> None:
    if name == "smolvlm" and "rescale_factor" in settings:
        settings = {**settings, "image_std": [0.5, 0.25, 2.0], "do_rescale": False}
    side = settings.get("max_image_size", {"longest_edge": 364})["longest_edge"]
    vision = {"image_size": side, "patch_size": side // 2}
    processor = ours(
        tmp_path, idefics3, "Idefics3Processor", folders.IDEFICS3_TOKENS, settings,
        {"model_type": "idefics3", "vision_config": vision},
    )  # fmt: skip
    kind = {"idefics3": "Idefics3ImageProcessorPil", "smolvlm": "SmolVLMImageProcessorPil"}[name]
    reference_processor = theirs(name, kind, settings)
    for image in images():
        expected = reference_processor([image], return_tensors="np", return_row_col_info=True)
        item = processor.encode_image(image, PromptRequest(""))
        got = processor.arrays([item])
        assert item.grid == (expected["rows"][0][0], expected["cols"][0][0])
        np.testing.assert_array_equal(got["pixel_values"], expected["pixel_values"])
        np.testing.assert_array_equal(got["pixel_attention_mask"], expected["pixel_attention_mask"])


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8}},
        {"size": {"longest_edge": 40}, "patch_size": 7, "resample": 2},
        {"size": {"height": 30, "width": 60}, "patch_size": 16, "do_rescale": False},
    ],
)
def test_pixtral(tmp_path, settings) -> None:
    patch = settings["patch_size"]
    config = {
        "vision_config": {"patch_size": patch["height"] if isinstance(patch, dict) else patch}
    }
    processor = ours(
        tmp_path, pixtral, "PixtralProcessor", folders.PIXTRAL_TOKENS, settings, config
    )
    # 90x1 at a limit of 64 or less: transformers floors a side to 0 and fails; we keep a patch.
    usable = [image for image in images() if max(image.size) / min(image.size) < 30]
    expected = theirs("pixtral", "PixtralImageProcessorPil", settings)(usable, return_tensors="np")
    got = processor.arrays([processor.encode_image(i, PromptRequest("")) for i in usable])
    np.testing.assert_array_equal(got["image_sizes"], expected["image_sizes"])
    np.testing.assert_array_equal(got["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 28, "width": 28}, "max_patches": 12},
        {"size": {"height": 14, "width": 14}, "min_patches": 2, "max_patches": 5, "resample": 1},
        {"size": {"height": 42, "width": 42}, "max_patches": 1, "image_mean": [0.1, 0.2, 0.3]},
        {"size": {"height": 28, "width": 28}, "max_patches": 1, "min_patches": 2},  # never cut
    ],
)
def test_internvl(tmp_path, settings) -> None:
    side = settings["size"]["height"]
    config = {"model_type": "internvl", "vision_config": {"patch_size": 7, "image_size": side}}
    processor = ours(
        tmp_path, internvl, "InternVLProcessor", folders.INTERNVL_TOKENS, settings, config
    )
    reference_processor = theirs("got_ocr2", "GotOcr2ImageProcessorPil", settings)
    for image in images():
        expected = reference_processor([image], return_tensors="np", crop_to_patches=True)
        got = processor.arrays([processor.encode_image(image, PromptRequest(""))])
        assert got["num_patches"].tolist() == list(expected["num_patches"])
        np.testing.assert_array_equal(got["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    "settings",
    [
        {"min_pixels": 784, "max_pixels": 7840},
        {"size": {"shortest_edge": 3136, "longest_edge": 31360}, "resample": 2},
        {"min_pixels": 300, "max_pixels": 3000, "patch_size": 5, "merge_size": 3},
        {"min_pixels": 784, "max_pixels": 7840, "temporal_patch_size": 1, "rescale_factor": 0.01},
    ],
)
def test_qwen(tmp_path, settings) -> None:
    vision = {"patch_size": settings.get("patch_size", 14)}
    vision["spatial_merge_size"] = settings.get("merge_size", 2)
    vision["temporal_patch_size"] = settings.get("temporal_patch_size", 2)
    processor = ours(
        tmp_path, qwen, "Qwen2_5VLProcessor", folders.QWEN_TOKENS, settings,
        {"vision_config": vision},
    )  # fmt: skip
    reference_processor = theirs("qwen2_vl", "Qwen2VLImageProcessorPil", dict(settings))
    # transformers may round a thin side to 0 and fail; we keep one block.
    for image in [i for i in images() if min(i.size) >= 3]:
        expected = reference_processor([image], return_tensors="np")
        got = processor.arrays([processor.encode_image(image, PromptRequest(""))])
        np.testing.assert_array_equal(got["image_grid_thw"], expected["image_grid_thw"])
        np.testing.assert_array_equal(got["pixel_values"], expected["pixel_values"])


def test_colour_conversion() -> None:
    from transformers.image_transforms import convert_to_rgb

    for image in images():
        buffer = io.BytesIO()
        image.save(buffer, "TIFF" if image.mode == "CMYK" else "PNG")
        for source in (image, buffer.getvalue()):
            opened = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
            expected = convert_to_rgb(opened, return_numpy=True)
            np.testing.assert_array_equal(np.asarray(load_image(source)), expected)


@pytest.mark.parametrize(
    ("room", "kind", "tokens", "name", "their_kind", "settings"),
    [
        (
            idefics3, "Idefics3Processor", folders.IDEFICS3_TOKENS,
            "idefics3", "Idefics3ImageProcessorPil",
            {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 28}},
        ),
        (
            pixtral, "PixtralProcessor", folders.PIXTRAL_TOKENS,
            "pixtral", "PixtralImageProcessorPil",
            {"size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8}},
        ),
        (
            internvl, "InternVLProcessor", folders.INTERNVL_TOKENS,
            "got_ocr2", "GotOcr2ImageProcessorPil",
            {"size": {"height": 28, "width": 28}, "max_patches": 1},
        ),
        (
            qwen, "Qwen2_5VLProcessor", folders.QWEN_TOKENS,
            "qwen2_vl", "Qwen2VLImageProcessorPil", {"min_pixels": 784, "max_pixels": 7840},
        ),
    ],
    ids=["idefics3", "pixtral", "internvl", "qwen2_5vl"],
)  # fmt: skip
def test_without_conversion(tmp_path, room, kind, tokens, name, their_kind, settings) -> None:
    """Three channels of any meaning, taken as they are; any other number fails on both sides."""
    settings = {**settings, "do_convert_rgb": False}
    vision = {"patch_size": {"pixtral": 8, "got_ocr2": 7}.get(name, 14), "image_size": 28}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
    config = {"vision_config": vision, "model_type": room.__name__.split(".")[-2]}
    processor = ours(tmp_path, room, kind, tokens, settings, config)
    reference_processor = theirs(name, their_kind, settings)
    for mode in ("RGB", "YCbCr", "HSV", "L", "LA", "P", "RGBA", "CMYK", "1"):
        image = folders.picture(57, 48).convert(mode)
        if len(image.getbands()) != 3:
            with pytest.raises(ValueError, match="mean must have"):
                reference_processor([image], return_tensors="np")
            with pytest.raises(MediaError, match="do_convert_rgb"):
                processor.encode_image(image, PromptRequest(""))
            continue
        expected = reference_processor([image], return_tensors="np")
        got = processor.arrays([processor.encode_image(image, PromptRequest(""))])
        np.testing.assert_array_equal(got["pixel_values"], expected["pixel_values"])


def test_sizes_above_the_cap() -> None:
    module = "transformers.models.idefics3.image_processing_pil_idefics3"
    theirs_size = importlib.import_module(module).get_resize_output_image_size
    rng = random.Random(2)
    for _ in range(300):
        size, edge = (rng.randint(1, 6000), rng.randint(1, 6000)), rng.randint(1, 9000)
        canvas = np.broadcast_to(np.uint8(0), (3, size[1], size[0]))
        height, width = theirs_size(canvas, edge)
        got = idefics3.bounded_size(idefics3.longest_edge_size(size, edge))
        assert got == (width, height)


def test_frame_numbers_round_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    rng = random.Random(5)
    for _ in range(3000):
        total = rng.randint(2, 5000)
        step = total / rng.randint(1, min(total, 768))
        for start in (0, step / 2):
            expected = torch.arange(start, total, step).int().tolist()
            assert arange_indices(start, total, step).tolist() == expected


def sampler(name: str, kind: str):
    module = importlib.import_module(f"transformers.models.{name}.video_processing_{name}")
    return getattr(module, kind).sample_frames


def test_frame_sampling() -> None:
    pytest.importorskip("torchvision")
    from transformers.video_utils import VideoMetadata

    limits = ClipSettings(4, 768, cap_pixels_per_frame=False, max_video_tokens=128000)
    owner = types.SimpleNamespace(
        num_frames=None, fps=None, temporal_patch_size=2, min_frames=4, max_frames=768,
        initial_shift=True,
    )  # fmt: skip
    rng = random.Random(5)
    for _ in range(150):
        total, rate = rng.randint(8, 3000), rng.choice([10.0, 23.976, 25.0, 29.97, 60.0])
        fps, count = rng.choice([0.5, 1.0, 2.0, 3.3]), rng.randint(2, 8)
        info, request = VideoInfo(total, rate), PromptRequest("", fps=fps)
        meta = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
        expected = sampler("qwen2_vl", "Qwen2VLVideoProcessor")(owner, meta, fps=fps)
        assert grid_clips.sample_frames(info, request, limits, 2).tolist() == expected.tolist()
        expected = sampler("internvl", "InternVLVideoProcessor")(owner, meta, num_frames=count)
        assert internvl.sample_frames(info, count).tolist() == expected.tolist()
        expected = sampler("smolvlm", "SmolVLMVideoProcessor")(owner, meta, num_frames=16, fps=fps)
        assert idefics3.sample_frames(info, fps, 16).tolist() == expected.tolist()


@pytest.mark.parametrize("path", cases(), ids=lambda p: p.name)
def test_tokenizer_and_template(path) -> None:
    from transformers import AutoTokenizer
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, tokenizer = AutoTokenizer.from_pretrained(path), Tokenizer(path)
    rng = random.Random(1)
    alphabet = "abc ABC 123\n\t.,!'’é東京привет👍🏽👩‍👩‍👧\u200d\u00a0ﬁⅷ<|image|>[INST]<image>"
    for _ in range(40):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 40)))
        text += rng.choice(["", *tokenizer.named_tokens.values()])
        for special in (True, False):
            ids = expected(text, add_special_tokens=special)["input_ids"]
            assert tokenizer.encode(text, add_special_tokens=special) == ids
        kept = expected.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids) == kept
    names = {k: v for k, v in tokenizer.named_tokens.items() if k.endswith("_token")}
    for prompt in reference(path)[0]["prompts"]:
        if prompt["raw"] or tokenizer.chat_template is None:
            continue
        if reference(path)[0]["family"] == "internvl_chat":
            continue  # its template takes texts only
        rendered, _ = render_jinja_template(
            [prompt["messages"]], chat_template=tokenizer.chat_template.source,
            add_generation_prompt=True, **names,
        )  # fmt: skip
        assert tokenizer.apply_chat_template(prompt["messages"]) == rendered[0]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_tools_and_variables_of_templates(case, tmp_path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template, messages, tools, variables = case
    expected, _ = render_jinja_template(
        [messages], tools=tools, chat_template=template, add_generation_prompt=True,
        bos_token="<s>", **variables,
    )  # fmt: skip
    folder = folders.make_folder(tmp_path, [], {}, template, bos="<s>")
    request = PromptRequest(messages, tools=tools, chat_template_kwargs=variables)
    assert Llama3Processor(folder, {"architectures": ["x"]}).process(request).text == expected[0]


def test_functions_as_tools() -> None:
    from transformers.utils.chat_template_utils import get_json_schema

    from mlx_vlm_pipes.tool_schema import tool_schema
    from tests.processing.test_tools import forecast

    assert tool_schema(forecast) == get_json_schema(forecast)
