"""Conversations: each turn computes only what is new, and what is kept is what was said."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes import InputError, MediaError, Pipeline, load
from mlx_vlm_pipes.processing.chat_template import ChatTemplate
from tests.fixtures_helper import FIXTURES

ROOT = Path(__file__).parent.parent
SHAPES = ROOT / "examples" / "images" / "shapes.png"
CLIP = ROOT / "examples" / "images" / "moving_circle.gif"
WANTED = "a large red circle above a small blue square"


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with load() as pipe:
        yield pipe


EXAMPLES = ("tiny-internvl", "tiny-pixtral", "tiny-qwen2_5vl")


@pytest.mark.parametrize(
    "name", ["tiny-idefics3", *(pytest.param(name, marks=pytest.mark.slow) for name in EXAMPLES)]
)
def test_a_turn_computes_only_what_is_new(name: str) -> None:
    """The prompt of the second turn begins with all of the first, its picture and its answer."""
    with load(None if name == "tiny-idefics3" else ROOT / "examples/models" / name) as pipe:
        chat = pipe.chat()
        first = chat.send("Describe the picture.", images=SHAPES)
        assert first.text.strip() == WANTED
        second = chat.send("And now?")
        alone = pipe.generate(chat.history[:-1])
    assert (first.usage.cached_tokens, first.usage.images_encoded) == (0, 1)
    end = first.usage.prompt_tokens + first.usage.completion_tokens  # the end token is read too
    assert end - 1 <= second.usage.cached_tokens <= end
    assert second.usage.images_encoded == 0
    assert second.usage.image_tokens == first.usage.image_tokens > 0
    assert second.tokens == alone.tokens


def use_template(pipe: Pipeline, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("chat_template", "tool_template"):
        monkeypatch.setattr(pipe.tokenizer, name, ChatTemplate(source, "here"))


def test_a_template_that_changes_an_earlier_turn_is_read_again_from_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those do that leave out the thinking of earlier answers."""
    source = (
        "{% for m in messages %}{{ m.role }}: "
        "{{ m.content[3:] if m.role == 'assistant' else m.content }}\n{% endfor %}assistant: "
    )
    with load(FIXTURES / "qwen3") as pipe:
        use_template(pipe, source, monkeypatch)
        chat = pipe.chat(max_tokens=6, ignore_eos=True)
        first, second = chat.send("Hi"), chat.send("And?")
        alone = pipe.generate(chat.history[:-1], max_tokens=6, ignore_eos=True)
    assert 0 < second.usage.cached_tokens <= first.usage.prompt_tokens
    assert second.tokens == alone.tokens


def test_options_of_the_conversation_reach_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def weather(city: str) -> str:
        """How it is outside.

        Args:
            city: where.
        """
        return city

    source = "{{ tools | tojson }}{{ enable_thinking }}{% for m in messages %}{{ m }}{% endfor %}"
    options = {"tools": [weather], "chat_template_kwargs": {"enable_thinking": False}}
    with load(FIXTURES / "qwen3") as pipe:
        use_template(pipe, source, monkeypatch)
        chat = pipe.chat(max_tokens=3, **options)
        for _ in range(2):
            result = chat.send("Hi")
            messages = chat.history[:-1]
            prompt = pipe.encode(messages, **options)
            assert '"weather"' in prompt.text
            assert result.usage.prompt_tokens == len(prompt.input_ids)


def test_the_history_is_what_generate_takes(pipe: Pipeline) -> None:
    chat = pipe.chat(system="Be brief.", max_tokens=12)
    result = chat.send("Describe the picture.", images=SHAPES, temperature=0.5, seed=3)
    assert chat.history == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": SHAPES},
                {"type": "text", "text": "Describe the picture."},
            ],
        },
        {"role": "assistant", "content": result.text.lstrip()},
    ]
    again = pipe.generate(chat.history[:-1], max_tokens=12, temperature=0.5, seed=3)
    assert again.tokens == result.tokens
    assert (
        chat.retry(temperature=0).tokens == pipe.generate(chat.history[:-1], max_tokens=12).tokens
    )
    assert len(chat.history) == 3
    chat.history.append({"role": "tool", "content": "42"})
    chat.send()
    assert [m["role"] for m in chat.history][2:] == ["assistant", "tool", "assistant"]
    assert chat.undo()[0]["role"] == "user"
    assert [m["role"] for m in chat.history] == ["system"]
    chat.send("Hi")
    chat.system = None
    chat.reset()
    assert chat.history == []


def test_a_stream_that_is_left_keeps_what_was_said(pipe: Pipeline) -> None:
    chat = pipe.chat()
    stream = chat.stream("Describe the picture.", images=SHAPES)
    with pytest.raises(InputError, match="still being streamed"):
        chat.send("And now?")
    with pytest.raises(InputError, match="still being streamed"):
        chat.system = "The end of the stream would take it away again."
    words = next(stream).text + next(stream).text
    stream.close()
    assert words.strip()
    assert chat.history[-1] == {"role": "assistant", "content": words.lstrip()}
    whole = "".join(chunk.text for chunk in chat.stream(None))  # the same question once more
    assert whole.strip() == WANTED
    assert [m["role"] for m in chat.history] == ["user", "assistant"]
    del stream
    chat.stream("And now?")  # dropped before its first word
    assert len(chat.history) == 2
    assert chat.send("And now?").text


def test_an_answer_shown_in_a_cell_is_part_of_the_conversation(
    pipe: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = pipe.chat()
    stream = chat.stream("Describe the picture.", images=SHAPES)
    assert [record.num_tokens for record in stream.media] == [16]
    stream._ipython_display_()
    assert WANTED in capsys.readouterr().out
    assert chat.history[-1]["content"] == WANTED


def test_ctrl_c_keeps_what_was_said(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = pipe.chat()
    stream = chat.stream("Describe the picture.", images=SHAPES)
    first = next(stream)

    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlx_vlm_pipes.engine.requests.ChunkIterator.__next__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert chat.history[-1]["content"] == first.text.lstrip()


def test_a_turn_that_fails_leaves_no_trace(pipe: Pipeline) -> None:
    chat = pipe.chat()
    chat.send("Hi")
    before = list(chat.history)
    for text, options, words in (
        ("And?", {"images": "/no/such.png"}, "no such file"),
        ("And?", {"max_tokens": 99999}, "99999"),
        ("And?", {"system": "Be brief."}, "a turn has no system message"),
        ("And?", {"raw": True}, "raw takes a text prompt"),
        ("", {}, "nothing to answer"),
        (5, {}, "text is 5"),
    ):
        for ask in (chat.send, chat.stream, chat.plan):
            with pytest.raises(InputError, match=words):
                ask(text, **options)
    assert chat.history == before
    with pytest.raises(InputError, match="unknown option 'colour'"):
        pipe.chat(**{"colour": "red"})
    with pytest.raises(InputError, match="nothing to take back"):
        pipe.chat().undo()
    assert chat.plan("And?").prompt_tokens > chat.plan().prompt_tokens


def test_saved_and_loaded(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a picture was given as, the conversation goes on elsewhere as it would have here."""
    picture = Image.open(SHAPES).convert("RGB")
    monkeypatch.chdir(SHAPES.parent)
    sources = ["shapes.png", SHAPES, SHAPES.read_bytes(), io.BytesIO(SHAPES.read_bytes()), picture]
    chat = pipe.chat(system="Sei kurz: é", max_tokens=6)
    for source in [*sources, np.array(picture)]:
        chat.send("Describe the picture.", images=[source])
    file = tmp_path / "chat.json"
    file.write_text("older")
    chat.save(file)
    monkeypatch.chdir(tmp_path)
    other = pipe.chat(max_tokens=6).load(str(file))
    assert other.system == "Sei kurz: é"
    expected = pipe.chat(max_tokens=6)
    expected.history = [*chat.history]
    expected.history[1]["content"][0]["image"] = SHAPES  # its relative path means nothing here
    assert other.send("And now?").tokens == expected.send("And now?").tokens
    stored = [m["content"][0]["image"] for m in json.loads(file.read_text())["messages"][1::2]]
    assert stored[:2] == [str(SHAPES)] * 2
    assert [url.split(",")[0] for url in stored[2:]] == ["data:;base64"] * 2 + [
        "data:image/png;base64"
    ] * 2
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.slow
def test_clips_are_saved_too(tmp_path: Path) -> None:
    frames = [np.full((56, 56, 3), shade, np.uint8) for shade in (0, 128, 255, 128)]
    with load(ROOT / "examples/models/tiny-qwen2_5vl") as pipe:
        chat = pipe.chat(max_tokens=5)
        for clip in (CLIP, frames):
            chat.send("What happens?", videos=[clip])
        chat.save(tmp_path / "chat.json")
        other = pipe.chat(max_tokens=5).load(tmp_path / "chat.json")
        assert other.send("And?").tokens == chat.send("And?").tokens


def test_only_pictures_are_made_absolute(pipe: Pipeline, tmp_path: Path) -> None:
    """What a tool was called with, and what it said, stays as it is."""
    call = {"function": {"name": "read", "arguments": {"path": "notes.txt", "url": "x"}}}
    inner = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    history = [
        {"role": "user", "content": "path"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "notes", "path": "notes.txt"}]},
        {"role": "user", "content": [{"type": "image", "source": inner}, "what?"]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]},
    ]
    chat = pipe.chat()
    chat.history = [*history]
    chat.save(tmp_path / "chat.json")
    found = pipe.chat().load(tmp_path / "chat.json").history
    assert found[:-1] == history[:-1]
    assert found[-1]["content"][0]["image_url"] == {"url": str(Path("a.png").absolute())}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "no conversation"),
        (b"[1, 2]", "no conversation"),
        (b'{"model_type": "llama"}', "no conversation"),
        (b'{"format": "mlx_vlm_pipes conversation", "version": 2}', "format 2"),
        *(
            (b'{"format": "mlx_vlm_pipes conversation", "version": 1, "messages": [%b]}' % m, "dam")
            for m in (
                b"3",
                b'{"role": "system"}',
                b'{"role": "user", "content": 5}',
                b'{"role": "user", "content": [5]}',
                b'{"role": "user", "content": [{"type": []}]}',
                b'{"role": "user", "content": [{"type": "text", "text": null}]}',
            )
        ),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(
    content: bytes | None, words: str, pipe: Pipeline, tmp_path: Path
) -> None:
    file = tmp_path / "other.json"
    if content is not None:
        file.write_bytes(content)
    chat = pipe.chat(system="Hi")
    with pytest.raises(InputError, match=rf"other\.json: .*{words}"):
        chat.load(file)
    assert chat.system == "Hi"


def test_what_cannot_be_saved_leaves_no_file(pipe: Pipeline, tmp_path: Path) -> None:
    chat = pipe.chat()
    with pytest.raises(InputError, match="cannot be the name of a file"):
        chat.save(tmp_path / "a\0b.json")
    for name in ("no/chat.json", "a" * 255):
        with pytest.raises(InputError, match="cannot be written"):
            chat.save(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is there and no plain file"):
        chat.save(tmp_path / "pipe")
    (tmp_path / "pipe").unlink()
    circle: list[Any] = []
    circle.append(circle)
    chat.history.append({"role": "user", "content": circle})
    with pytest.raises(InputError, match="too deep"):
        chat.save(tmp_path / "chat.json")
    chat.history[-1] = {"role": "user", "content": "half a pair: \ud800"}
    with pytest.raises(InputError, match=r"cannot be written .*surrogates"):
        chat.save(tmp_path / "chat.json")
    chat.history.clear()
    chat.history.append({"role": "user", "content": {1, 2}})
    with pytest.raises(InputError, match="'content' of a message is a set"):
        chat.save(tmp_path / "chat.json")
    chat.history[0]["content"] = [{"type": "image", "image": bytes(21 << 20)}]
    with pytest.raises(MediaError, match="give its path"):
        chat.save(tmp_path / "chat.json")
    assert not list(tmp_path.iterdir())
