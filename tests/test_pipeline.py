"""The public API: options and what they do to an answer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.errors import ContextTooLong, InputError
from mlx_vlm_pipes.options import OPTIONS, PROMPT_OPTIONS
from mlx_vlm_pipes.pipeline import collect
from mlx_vlm_pipes.processing.chat_template import ChatTemplate
from tests.fixtures_helper import FIXTURES

PROMPT = "Tell me about it."
SHAPES = Path(__file__).parent.parent / "examples" / "images" / "shapes.png"


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    made = load(FIXTURES / "llama-tied", dtype="float32")
    yield made
    made.close()


@pytest.fixture(scope="module")
def greedy(pipe: Pipeline) -> list[int]:
    return pipe.generate(PROMPT, max_tokens=30, ignore_eos=True).tokens


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return (
        x
        - x.max(-1, keepdims=True)
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )


def test_a_stream_is_the_answer_in_pieces(pipe: Pipeline, greedy: list[int]) -> None:
    chunks = list(pipe.stream(PROMPT, max_tokens=30, ignore_eos=True))
    whole = pipe.generate(PROMPT, max_tokens=30, ignore_eos=True)
    assert [c.token for c in chunks] == greedy == whole.tokens
    assert "".join(c.text for c in chunks) == whole.text == pipe.tokenizer.decode(greedy)
    assert [c.finish_reason for c in chunks] == [None] * 29 + ["length"]
    assert whole.usage.completion_tokens == 30


def test_logprobs_are_the_log_softmax_of_the_logits(pipe: Pipeline, greedy: list[int]) -> None:
    result = pipe.generate(PROMPT, max_tokens=6, ignore_eos=True, logprobs=4, prompt_logprobs=True)
    ids = pipe.encode(PROMPT).input_ids
    everything = [*ids, *greedy[:6]]
    context = pipe.processor.new_context(pipe.encode(PROMPT), max_length=200)
    context.tokens = type(context.tokens)(np.array(everything))
    expected = log_softmax(pipe.engine.prompt_logits(context))
    assert result.logprobs is not None
    for i, place in enumerate(result.logprobs):
        row = expected[len(ids) - 1 + i]
        assert place.token_log_probabilities == pytest.approx([row[greedy[i]]], abs=1e-4)
        (top,) = place.top_log_probabilities
        assert list(top) == np.argsort(-row)[:4].tolist()
        assert list(top.values()) == pytest.approx(np.sort(row)[::-1][:4], abs=1e-4)
    prompt = result.prompt_logprobs
    assert prompt is not None
    own = [expected[i, token] for i, token in enumerate(ids[1:])]
    assert prompt.token_log_probabilities == pytest.approx(own, abs=1e-4)
    assert len(prompt.top_log_probabilities) == len(ids) - 1
    assert ids[1] in prompt.top_log_probabilities[0]


def test_prompt_logprobs_do_not_depend_on_slices_or_neighbours(pipe: Pipeline) -> None:
    from dataclasses import replace

    alone = pipe.generate(PROMPT, max_tokens=2, prompt_logprobs=True).prompt_logprobs
    state = pipe.engine.scheduler.state
    whole, state.config = state.config, replace(state.config, prefill_chunk=5, running_chunk=3)
    try:
        both = pipe.generate_batch(
            [{"prompt": PROMPT, "prompt_logprobs": True}, "Something else", {"prompt": PROMPT}],
            max_tokens=2,
        )
    finally:
        state.config = whole
    assert alone is not None
    assert both[0].prompt_logprobs is not None
    assert both[2].prompt_logprobs is None
    np.testing.assert_allclose(
        both[0].prompt_logprobs.token_log_probabilities, alone.token_log_probabilities, atol=1e-4
    )


def test_a_stop_string_across_tokens_ends_the_answer_and_is_not_shown(
    pipe: Pipeline, greedy: list[int]
) -> None:
    whole = pipe.generate(PROMPT, max_tokens=30, ignore_eos=True).text
    clean = next(i for i in range(4, len(whole) - 5) if "\ufffd" not in whole[i : i + 4])
    stop = whole[clean : clean + 4]
    result = pipe.generate(PROMPT, max_tokens=30, ignore_eos=True, stop=stop)
    assert result.text == whole[: whole.index(stop)]
    assert result.finish_reason == "stop"
    assert result.tokens == greedy[: len(result.tokens)]
    shown = ""
    for chunk in pipe.stream(PROMPT, max_tokens=30, ignore_eos=True, stop=[stop, "never"]):
        shown += chunk.text
        assert whole.startswith(shown)
        assert stop not in shown
    assert shown == result.text


def test_stop_tokens_end_tokens_and_min_tokens(pipe: Pipeline, greedy: list[int]) -> None:
    stop = greedy[5]
    first = greedy.index(stop)
    result = pipe.generate(PROMPT, max_tokens=30, ignore_eos=True, stop_token_ids=[stop])
    assert (result.tokens, result.finish_reason) == (greedy[: first + 1], "stop")
    assert result.text == pipe.tokenizer.decode(greedy[:first])  # a stop token is no text
    late = pipe.generate(
        PROMPT, max_tokens=30, ignore_eos=True, stop_token_ids=[stop], min_tokens=9
    )
    assert stop not in late.tokens[:9]
    assert len(late.tokens) >= 10 or late.finish_reason == "length"


def test_every_eos_id_of_generation_config_ends() -> None:
    pipe = load(FIXTURES / "llama-stop", dtype="float32")
    try:
        ends = pipe.processor.eos_token_ids
        assert len(ends) > 1
        free = pipe.generate(PROMPT, max_tokens=12, ignore_eos=True).tokens
        for end in sorted(ends):
            forced = pipe.generate(PROMPT, max_tokens=12, logit_bias={end: 1e4})
            assert (forced.tokens, forced.text, forced.finish_reason) == ([end], "", "stop")
        assert len(free) == 12
    finally:
        pipe.close()


def test_penalties_and_bias_change_the_answer(pipe: Pipeline, greedy: list[int]) -> None:
    banned = pipe.generate(PROMPT, max_tokens=8, ignore_eos=True, logit_bias={greedy[0]: -1e4})
    assert greedy[0] not in banned.tokens
    varied = pipe.generate(
        PROMPT, max_tokens=30, ignore_eos=True, frequency_penalty=2.0, presence_penalty=2.0
    )
    again = pipe.generate(PROMPT, max_tokens=30, ignore_eos=True, repetition_penalty=5.0)
    assert len(set(varied.tokens)) > len(set(greedy)) or len(set(greedy)) == 30
    assert len(set(again.tokens)) == 30


SAMPLED: dict[str, Any] = {
    "temperature": 1.3,
    "top_p": 0.95,
    "top_k": 50,
    "max_tokens": 16,
    "ignore_eos": True,
}


def test_a_seed_gives_the_same_tokens_in_any_batch(pipe: Pipeline) -> None:
    alone = [pipe.generate(PROMPT, seed=i, **SAMPLED).tokens for i in range(5)]
    assert len({tuple(t) for t in alone}) == 5
    requests: list[Any] = [{"prompt": PROMPT, "seed": i} for i in range(5)]
    requests.insert(2, {"prompt": "A greedy neighbour", "temperature": 0.0})
    batch = [r.tokens for r in pipe.generate_batch(requests, **SAMPLED)]
    assert batch[:2] + batch[3:] == alone


def test_n_answers(pipe: Pipeline) -> None:
    alone = [pipe.generate(PROMPT, seed=7 + i, **SAMPLED).tokens for i in range(3)]
    assert [r.tokens for r in pipe.generate_n(PROMPT, 3, seed=7, **SAMPLED)] == alone
    free = [tuple(r.tokens) for r in pipe.generate_n(PROMPT, 3, **SAMPLED)]
    assert len(set(free)) == 3
    with pytest.raises(InputError, match="n is 0"):
        pipe.generate_n(PROMPT, 0)


def test_whole_characters_only(pipe: Pipeline) -> None:
    wanted = "héllo 世界 🙂🙃 ok"
    ids = pipe.tokenizer.encode(wanted, add_special_tokens=False)
    stream, shown = pipe.tokenizer.stream_decoder(), []
    for token in ids:
        shown.append(stream.add(token))
    shown.append(stream.flush())
    assert "".join(shown) == wanted
    assert not any("\ufffd" in piece for piece in shown)
    assert len(ids) > len(wanted)  # some characters are several tokens


def test_mistakes_are_one_line_errors(pipe: Pipeline) -> None:
    with pytest.raises(TypeError, match="no pair of model and processor; write pipe = load"):
        _, _ = pipe  # pyright: ignore[reportGeneralTypeIssues]  # as mlx-vlm's load is used
    with pytest.raises(InputError, match="unknown option 'max_token'"):
        pipe.generate(PROMPT, max_token=3)  # pyright: ignore[reportCallIssue]  # the mistake under test
    with pytest.raises(InputError, match="unknown option 'min_p'; options: allow_private, chat_"):
        pipe.encode(PROMPT, min_p=0.1)  # pyright: ignore[reportCallIssue]  # of an answer, not a prompt
    with pytest.raises(InputError, match="temperature is -1, expected"):
        pipe.plan(PROMPT, temperature=-1)
    with pytest.raises(InputError, match="seed is 'x', expected"):
        pipe.generate_n(PROMPT, 2, seed="x")
    with pytest.raises(InputError, match="either 'prompt' or 'messages'"):
        pipe.generate_batch([{"max_tokens": 3}])
    with pytest.raises(ContextTooLong, match="make"):
        pipe.generate(PROMPT, max_tokens=10**6)
    with pytest.raises(InputError, match="no adapter 'x'; loaded: none"):
        pipe.generate(PROMPT, adapter="x")


def test_one_bad_request_fails_the_batch_and_nothing_stays_behind(pipe: Pipeline) -> None:
    with pytest.raises(InputError):
        pipe.generate_batch([PROMPT, {"prompt": "x", "temperature": -1.0}], max_tokens=50)
    assert len(pipe.generate(PROMPT, max_tokens=3, ignore_eos=True).tokens) == 3


@pytest.fixture(scope="module")
def qwen() -> Iterator[Pipeline]:
    made = load(FIXTURES / "qwen25vl-v5", dtype="float32")
    yield made
    made.close()


PICTURE = np.arange(56 * 56 * 3, dtype=np.uint8).reshape(56, 56, 3)


def lone_media(tmp_path: Path) -> dict[str, tuple[str, Any]]:
    image, file = Image.fromarray(PICTURE), tmp_path / "picture.png"
    image.save(file)
    return {
        "array": ("images", PICTURE),
        "PIL": ("images", image),
        "path": ("images", file),
        "text": ("images", str(file)),
        "bytes": ("images", file.read_bytes()),
        "clip": ("videos", np.stack([PICTURE, 255 - PICTURE])),
    }


@pytest.mark.parametrize("kind", ["array", "PIL", "path", "text", "bytes", "clip"])
def test_one_picture_or_clip_given_alone_counts_as_a_list_of_one(
    qwen: Pipeline, tmp_path: Path, kind: str
) -> None:
    name, medium = lone_media(tmp_path)[kind]
    alone, listed = {name: medium}, {name: [medium]}
    pixels = "pixel_values" if name == "images" else "pixel_values_videos"
    expected = getattr(qwen.encode(PROMPT, **listed), pixels)
    assert np.array_equal(getattr(qwen.encode(PROMPT, **alone), pixels), expected)
    assert np.array_equal(qwen.logits(PROMPT, **alone), qwen.logits(PROMPT, **listed))
    want = qwen.generate(PROMPT, max_tokens=4, **listed).tokens
    assert qwen.generate(PROMPT, max_tokens=4, **alone).tokens == want
    assert [c.token for c in qwen.stream(PROMPT, max_tokens=4, **alone)] == want
    assert [c.token for c in qwen.submit(PROMPT, max_tokens=4, **alone)] == want
    assert qwen.generate_n(PROMPT, 1, max_tokens=4, **alone)[0].tokens == want
    assert qwen.generate_batch([{"prompt": PROMPT, **alone}], max_tokens=4)[0].tokens == want
    assert qwen.plan(PROMPT, **alone).prompt_tokens == qwen.plan(PROMPT, **listed).prompt_tokens


def test_none_means_no_pictures(qwen: Pipeline) -> None:
    assert qwen.encode(PROMPT, None, None).input_ids == qwen.encode(PROMPT).input_ids
    assert qwen.plan(PROMPT, None, None).prompt_tokens == qwen.plan(PROMPT).prompt_tokens


def test_options_show_in_help_and_signature(pipe: Pipeline) -> None:
    names = inspect.signature(pipe.generate).parameters
    assert names["max_tokens"].default == 256
    assert set(names) == {"prompt", "images", "videos", *OPTIONS}
    said = inspect.getdoc(Pipeline.stream) or ""
    assert all(f"{name}: {option.help}" in said for name, option in OPTIONS.items())
    assert set(inspect.signature(pipe.logits).parameters) > PROMPT_OPTIONS.keys()


def test_names_and_forms_that_others_use(pipe: Pipeline) -> None:
    with load() as bundled:
        plain = bundled.generate("Describe the picture.", SHAPES, max_tokens=3)
        other: dict[str, Any] = {"image": SHAPES, "max_new_tokens": 3, "temp": 0.0}
        assert bundled.generate("Describe the picture.", **other).tokens == plain.tokens
        with pytest.raises(InputError, match="image and images are the same option"):
            bundled.generate("Describe the picture.", SHAPES, **other)
        own: Any = {"prompt": "Describe the picture.", "images": SHAPES, "max_tokens": 3}
        shared: dict[str, Any] = {
            "max_new_tokens": 1,
            "image": b"x",
        }  # the request's own come first
        assert bundled.generate_batch([own], **shared)[0].tokens == plain.tokens
        assert repr(bundled).startswith("Pipeline(idefics3: 5.33 MB of weights, float32, cpu:0")
    assert str(plain) == plain.text
    messages = [{"role": "user", "content": PROMPT}]
    batch = pipe.generate_batch([messages, PROMPT], max_tokens=3)
    assert batch[0].tokens == batch[1].tokens


def test_tools_and_variables_reach_the_template_from_every_method(monkeypatch) -> None:
    source = "{{ tools | tojson }}{{ enable_thinking }}{{ messages[0].content }}"
    given = {"tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": 0}}
    with load() as pipe:
        for name in ("chat_template", "tool_template"):
            monkeypatch.setattr(pipe.tokenizer, name, ChatTemplate(source, "here"))
        text = pipe.encode("Hello", **given).text
        assert text.startswith('[{"name": "f"}]0')
        tokens = len(pipe.encode("Hello", **given).input_ids)
        assert pipe.logits("Hello", **given).shape[0] == tokens
        assert pipe.plan("Hello", **given, max_tokens=1).prompt_tokens == tokens
        answers = [
            pipe.generate("Hello", **given, max_tokens=1),
            collect(pipe.submit("Hello", **given, max_tokens=1)),
            *pipe.generate_n("Hello", 2, **given, max_tokens=1),
            *pipe.generate_batch([{"prompt": "Hello", **given}], max_tokens=1),
            *pipe.generate_batch(["Hello"], **given, max_tokens=1),
        ]
        *_, last = pipe.stream("Hello", **given, max_tokens=1)
        assert {a.usage.prompt_tokens for a in answers} == {tokens}
        assert last.usage is not None
        assert last.usage.prompt_tokens == tokens
        with pytest.raises(InputError, match="does not read x; it reads enable_thinking"):
            pipe.generate("Hello", chat_template_kwargs={"x": 1})
        with pytest.raises(InputError, match="give chat_template_kwargs="):
            pipe.generate("Hello", enable_thinking=False)  # pyright: ignore[reportCallIssue]  # theirs
