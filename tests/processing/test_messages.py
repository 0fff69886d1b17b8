"""Every accepted form of messages, and which picture goes where."""

import pytest

from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.processing.messages import conversation
from mlx_vlm_pipes.processing.types import PromptRequest

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def test_text_prompt_puts_images_then_clips_first() -> None:
    request = PromptRequest("hi", images=["a", "b"], videos=["c"], system="s")
    out = conversation(request)
    system = {"role": "system", "content": [text("s")]}
    assert out.messages == [system, user(IMAGE, IMAGE, VIDEO, text("hi"))]
    assert (out.images, out.videos) == (["a", "b"], ["c"])


def test_inline_sources_and_given_ones_keep_their_order() -> None:
    parts = [
        {"type": "image", "url": "u"},
        IMAGE,
        {"type": "image_url", "image_url": {"url": "data:,x"}},
        {"image": "p"},
        {"type": "image", "base64": "QUJD"},
        {"type": "video", "video": ["f"]},
        "plain",
    ]
    given = [user(*parts)]
    out = conversation(PromptRequest(given, images=["mine"]))
    assert out.images == ["u", "mine", "data:,x", "p", "data:;base64,QUJD"]
    assert out.videos == [["f"]]
    assert out.messages == [user(IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, VIDEO, text("plain"))]
    assert given == [user(*parts)]  # the caller's messages stay as they were


def test_images_without_parts_go_into_the_first_user_turn() -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "second"},
    ]
    out = conversation(PromptRequest(turns, images=["a"], videos=["v"]))
    assert out.messages[1] == user(IMAGE, VIDEO, text("first"))
    assert out.messages[3]["content"] == "second"


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ([user(IMAGE, IMAGE, text("x"))], ["a"], "1 images for 2 image parts"),
        ([user({"image": "a"})], ["b"], "1 images for 0 image parts"),
        ([user({"type": "audio"})], [], "'audio'"),
        ([user({"type": ["x"]})], [], "expected text, image or video"),
        ([user({"type": "text"})], [], "no text"),
        ([{"role": 1, "content": "x"}], [], "message 0"),
        (["one", "two"], [], "several prompts are for generate_batch"),
        ([{"role": "user", "content": 5}], [], "int"),
        ([{"role": "system", "content": "x"}], ["a"], "user message"),
        ([], [], "empty"),
    ],
)
def test_malformed(prompt, images, message) -> None:
    with pytest.raises(InputError, match=message):
        conversation(PromptRequest(prompt, images=images))


def test_placeholders_written_by_hand_stay_where_they_are() -> None:
    markers = {"image": ("<image>",)}
    for prompt in ("see <image> here", [{"role": "user", "content": ["see <image> here"]}]):
        out = conversation(PromptRequest(prompt, images=["a"]), markers)
        assert IMAGE not in out.messages[0]["content"]
        assert out.images == ["a"]
        assert IMAGE in conversation(PromptRequest(prompt, images=["a"])).messages[0]["content"]
    with pytest.raises(InputError, match="images is a str"):
        PromptRequest("x", images="cat.png")
