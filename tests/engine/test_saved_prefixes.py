"""Prefixes and vision rows in files: written in one process, taken in another, refused by name."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes import EngineConfig, InputError, OutOfBudget, Pipeline, PrefixError, load
from mlx_vlm_pipes.engine import prefix_file
from mlx_vlm_pipes.engine.prefix_file import read_prefix_header, write_prefix
from mlx_vlm_pipes.weights.safetensors import HostArray
from tests.engine.driving import IDEFICS3, LLAMA
from tests.fixtures_helper import FIXTURES, copy_case
from tests.torture.mutations import file_of, header_of, spoiled

ASK, LONGER = "What is it?", "What is it? And what is beside it?"
# what is written elsewhere: folder (None: the bundled model), kv_bits, pictures
CASES = {
    "text": (str(LLAMA), None, 0),
    "pictures, 8 bits": (None, 8, 2),
    "pictures, 4 bits": (None, 4, 1),
    "turns on three axes": (str(FIXTURES / "qwen25vl"), None, 2),
    "rows for several layers": (str(FIXTURES / "qwen3vl"), None, 1),
}
WRITER = """
import json, sys
import numpy as np
from PIL import Image
from mlx_vlm_pipes import load

for name, (folder, bits, count) in json.loads(sys.argv[1]).items():
    images = [Image.fromarray(np.load(sys.argv[3])[i]) for i in range(count)]
    with load(folder, dtype="float32", kv_bits=bits) as pipe:
        pipe.save_prefix(f"{sys.argv[2]}/{name}", sys.argv[4], images)
"""


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, 40, 40, 3), dtype=np.uint8)


def pictures(count: int) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in noise(2)[:count]]


def answer(pipe: Pipeline, prompt: str, images: list[Any]) -> tuple[Any, ...]:
    """Everything of an answer that must be equal."""
    result = pipe.generate(prompt, images, max_tokens=6, logprobs=3)
    usage = result.usage
    return result.tokens, result.logprobs, usage.cached_tokens, usage.images_encoded


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of CASES by name, written in another process."""
    folder = tmp_path_factory.mktemp("prefixes")
    np.save(folder / "pixels.npy", noise(2))
    arguments = [json.dumps(CASES), str(folder), str(folder / "pixels.npy"), ASK]
    subprocess.run([sys.executable, "-c", WRITER, *arguments], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_another_process_goes_on_as_the_one_that_wrote(elsewhere: Path, name: str) -> None:
    folder, bits, count = CASES[name]
    images = pictures(count)
    with load(folder, dtype="float32", kv_bits=bits) as pipe:
        cold = pipe.generate(LONGER, images, max_tokens=6)
        pipe.engine.forget()
        pipe.generate(ASK, images, max_tokens=1)
        expected = answer(pipe, LONGER, images)
        pipe.engine.forget()
        saved = pipe.load_prefix(elsewhere / name)
        assert (saved.images > 0) == (count > 0)
        assert answer(pipe, LONGER, images) == expected
        tokens, _, cached, encoded = expected
        assert tokens == cold.tokens
        assert 0 < cached < saved.tokens  # the question's end differs
        assert encoded == 0
        pipe.engine.forget()
        pipe.load_prefix(elsewhere / name)
        assert answer(pipe, ASK, images)[2:] == (saved.tokens - 1, 0)
        if count:  # rows of pictures also where the tokens before them differ
            assert answer(pipe, f"Look! {LONGER}", images[::-1])[3] == 0


@pytest.fixture(scope="module")
def idefics3() -> Iterator[Pipeline]:
    with load(IDEFICS3, dtype="float32") as made:
        yield made


@pytest.fixture
def pipe(idefics3: Pipeline) -> Pipeline:
    idefics3.engine.forget()
    return idefics3


@pytest.fixture(scope="module")
def good(idefics3: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two different pictures, one of them twice."""
    path = tmp_path_factory.mktemp("good") / "a.prefix"
    first, second = pictures(2)
    idefics3.save_prefix(path, ASK, [first, second, first])
    return path


def test_what_is_cached_is_written_as_what_is_computed(pipe: Pipeline, tmp_path: Path) -> None:
    computed = pipe.save_prefix(tmp_path / "computed", ASK, pictures(1))
    pipe.generate(LONGER, pictures(1), max_tokens=3)
    before = pipe.engine.stats
    cached = pipe.save_prefix(tmp_path / "cached", ASK, pictures(1))
    after = pipe.engine.stats
    assert (after.prefill_tokens, after.images_encoded) == (
        before.prefill_tokens,
        before.images_encoded,
    )
    assert cached == replace(computed, path=tmp_path / "cached")
    metadata = [read_prefix_header(one.path).header.metadata for one in (computed, cached)]
    assert metadata[0] == metadata[1]


def test_several_prefixes_live_together(pipe: Pipeline, tmp_path: Path) -> None:
    prompts = ["One is here.", "Two is there!", "Three?"]
    saved = [pipe.save_prefix(tmp_path / p, p, pictures(i)) for i, p in enumerate(prompts)]
    pipe.engine.forget()
    for one in saved:
        assert pipe.load_prefix(one.path) == one
        assert pipe.load_prefix(one.path) == one  # again: nothing is held twice
    assert len(pipe.engine.scheduler.state.prefixes) == len(prompts)
    for i, (prompt, one) in enumerate(zip(prompts, saved, strict=True)):
        assert answer(pipe, prompt, pictures(i))[2] == one.tokens - 1


def refusal(pipe: Pipeline, path: Path) -> str:
    """The one line that says why a file is not taken; the caches stay as they are."""
    caches = pipe.engine.scheduler.state.prefixes, pipe.engine.scheduler.state.images
    before = [cache.nbytes for cache in caches]
    with pytest.raises(InputError) as caught:
        pipe.load_prefix(path)
    assert [cache.nbytes for cache in caches] == before
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def test_what_does_not_fit_is_refused_by_name(good: Path, tmp_path: Path) -> None:
    changed = copy_case("idefics3", tmp_path / "changed")
    tensors: Any = mx.load(str(changed / "model.safetensors"))
    name = max(tensors, key=lambda name: tensors[name].size)
    tensors[name] = tensors[name] * 1.01
    mx.save_safetensors(str(changed / "model.safetensors"), tensors)
    moved = copy_case("idefics3", tmp_path / "moved")
    values = json.loads((moved / "config.json").read_text())
    values["text_config"]["rope_theta"] = 1234.0
    (moved / "config.json").write_text(json.dumps(values))
    refused = {
        "another idefics3 model": {"path": changed},
        "its config.json differ": {"path": moved},
        "dtype float32, this pipeline has float16": {"path": IDEFICS3, "dtype": "float16"},
        "type idefics3, this pipeline has llama": {"path": LLAMA},
        "tokens, this pipeline holds 8; load with a larger max_length": {
            "path": IDEFICS3,
            "max_length": 8,
        },
    }
    for words, arguments in refused.items():
        with load(**{"dtype": "float32", **arguments}) as pipe:
            assert words in refusal(pipe, good)
    copied, frames = copy_case("idefics3", tmp_path / "copied"), read_prefix_header(good).num_images
    with load(copied, dtype="float32") as pipe:  # where the files lie does not matter
        assert pipe.load_prefix(good).images == frames
    with load() as pipe:
        pipe.save_prefix(tmp_path / "plain", ASK)
    with load(kv_bits=8) as pipe:
        said = refusal(pipe, tmp_path / "plain")
        assert "cache of float32, this pipeline has 8 bits in groups of 32" in said


def test_an_adapter_has_prefixes_of_its_own(tmp_path: Path) -> None:
    def write(folder: Path, seed: int) -> str:
        folder.mkdir(parents=True)
        a, b = mx.random.split(mx.random.key(seed))
        at = "model.layers.0.self_attn.v_proj"
        tensors: Any = mx.load(str(LLAMA / "model.safetensors"))
        shape = tensors[f"{at}.weight"].shape
        pairs = {
            f"{at}.lora_a": mx.random.normal((shape[1], 4), key=a),
            f"{at}.lora_b": mx.random.normal((4, shape[0]), key=b),
        }
        mx.save_safetensors(str(folder / "adapters.safetensors"), pairs)
        options = {"rank": 4, "scale": 2.0, "dropout": 0.0}
        settings = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": options}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return str(folder)

    one, two = write(tmp_path / "one", 1), write(tmp_path / "two", 2)
    with load(LLAMA, dtype="float32", adapter=[two, one]) as pipe:
        saved = pipe.save_prefix(tmp_path / "with one", ASK, adapter="one")
        pipe.save_prefix(tmp_path / "base", ASK, adapter="base")
        expected = pipe.generate(LONGER, adapter="one", max_tokens=5).tokens
    with load(LLAMA, dtype="float32", adapter=f"renamed={one}") as pipe:
        found = pipe.load_prefix(tmp_path / "with one")
        assert (saved.adapter, found.adapter) == ("one", "renamed")
        assert pipe.generate(LONGER, adapter="base", max_tokens=5).usage.cached_tokens == 0
        result = pipe.generate(LONGER, max_tokens=5)
        assert (result.tokens, result.usage.cached_tokens > 1) == (expected, True)
    for adapters in (None, two):
        with load(LLAMA, dtype="float32", adapter=adapters) as pipe:
            assert "with the adapter 'one'; loaded are" in refusal(pipe, tmp_path / "with one")
            assert pipe.load_prefix(tmp_path / "base").adapter == ""


def test_keys_of_another_rotary_table_are_not_taken(tmp_path: Path) -> None:
    """LongRoPE turns all tokens of a longer prompt otherwise."""
    short, long = "a b", "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    with load(FIXTURES / "phi3-longrope", dtype="float32") as pipe:
        cold = {text: pipe.generate(text, raw=True, max_tokens=4).tokens for text in (short, long)}
        for text in cold:
            pipe.save_prefix(tmp_path / text, text, raw=True)
        for saved, other in ((short, long), (long, short)):
            pipe.engine.forget()
            pipe.load_prefix(tmp_path / saved)
            found = [pipe.generate(text, raw=True, max_tokens=4) for text in (other, saved)]
            assert [result.tokens for result in found] == [cold[other], cold[saved]]
            assert [result.usage.cached_tokens > 0 for result in found] == [False, True]


def test_no_byte_of_a_file_may_differ(pipe: Pipeline, good: Path, tmp_path: Path) -> None:
    data, path = good.read_bytes(), tmp_path / "spoiled"
    numbers = random.Random(3)
    (length,) = np.frombuffer(data[:8], "<u8").tolist()
    places = [numbers.randrange(8 + length) for _ in range(60)]
    places += [numbers.randrange(8 + length, len(data)) for _ in range(20)]
    for place in places:
        path.write_bytes(
            data[:place] + bytes([data[place] ^ 1 << numbers.randrange(8)]) + data[place + 1 :]
        )
        refusal(pipe, path)
    for size in (0, 7, 8, 8 + length, len(data) - 1):
        path.write_bytes(data[:size])
        refusal(pipe, path)
    header, body = header_of(data)
    for text in spoiled(json.dumps(header), numbers, 60):
        path.write_bytes(file_of(text, body))
        refusal(pipe, path)
    renamed = header | {"token": header["tokens"]}
    path.write_bytes(file_of(json.dumps({k: v for k, v in renamed.items() if k != "tokens"}), body))
    assert "damaged" in refusal(pipe, path)
    header["__metadata__"]["version"] = "2"
    path.write_bytes(file_of(json.dumps(header), body))
    assert "version 2, this package reads 1; update" in refusal(pipe, path)
    assert "no saved prefix" in refusal(pipe, IDEFICS3 / "model.safetensors")
    assert "no such file" in refusal(pipe, tmp_path / "none")
    assert "not a file" in refusal(pipe, tmp_path)


Arrays = dict[str, HostArray]


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: arrays | {name: replace(arrays[name], data=change(arrays[name].data))}


def _set(place: Any, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        data = data.copy()
        data[place] = value
        return data

    return change


def _few_rows(arrays: Arrays) -> Arrays:
    return changed("features.0", lambda data: data[:-1])(arrays)


FORGED = [
    changed("tokens", _set(0, 10**6)),
    changed("tokens", _set(0, -1)),
    changed("tokens", lambda data: data[:-1]),
    changed("images", _set((1, 0), 0)),
    changed("images", _set((2, 1), 10**9)),
    changed("images", _set((0, 2), -5)),
    changed("images", lambda data: data[:2, :2]),
    changed("images", lambda data: data[:1]),
    changed("cache.0.0", lambda data: data[:, :, :, :-1]),
    changed("cache.1.0", lambda data: data.astype(np.float16).view(np.float32)),
    changed("features.1", lambda data: data[:, 1:]),
    changed("features.0", lambda data: data.view(np.int32)),
    _few_rows,
    lambda arrays: {name: array for name, array in arrays.items() if name != "features.1"},
    lambda arrays: arrays | {"more": arrays["tokens"]},
]  # fmt: skip


@pytest.mark.parametrize("forge", FORGED)
def test_a_forged_file_with_true_digests_is_refused(
    pipe: Pipeline, good: Path, tmp_path: Path, forge: Callable[[Arrays], Arrays]
) -> None:
    header, path = read_prefix_header(good), tmp_path / "forged"
    arrays = forge(header.read())
    arrays = {
        name: HostArray.of(mx.array(array.data)) for name, array in arrays.items()
    }  # true dtypes
    prefix_file.write_prefix(path, header.owner, arrays)
    assert "damaged" in refusal(pipe, path)


def test_a_forged_rotary_table_is_refused(pipe: Pipeline, good: Path, tmp_path: Path) -> None:
    header = read_prefix_header(good)
    write_prefix(tmp_path / "a", replace(header.owner, rope_table=10**8), header.read())
    assert "rotary table" in refusal(pipe, tmp_path / "a")


def test_a_file_appears_whole_or_not_at_all(
    pipe: Pipeline, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.prefix"
    shutil.copy(good, path)

    def fail(partial: Path, *_: object) -> None:
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    (tmp_path / ".a.prefix.incomplete-99999999").write_bytes(b"of a process that was killed")
    with monkeypatch.context() as patch:
        patch.setattr(prefix_file, "write_host_arrays", fail)
        with pytest.raises(KeyboardInterrupt):
            pipe.save_prefix(path, ASK)
    assert [p.name for p in tmp_path.iterdir()] == ["a.prefix"]
    assert path.read_bytes() == good.read_bytes()
    assert pipe.save_prefix(path, ASK).images == 0  # another prefix may be replaced
    other = tmp_path / "model.safetensors"
    shutil.copy(IDEFICS3 / other.name, other)
    with pytest.raises(PrefixError, match="no whole prefix file; choose another name"):
        pipe.save_prefix(other, ASK)
    with pytest.raises(PrefixError, match="there is no such folder; make it first"):
        pipe.save_prefix(tmp_path / "no folder" / "a", ASK)


def test_the_budget_holds(pipe: Pipeline, good: Path, tmp_path: Path) -> None:
    state = pipe.engine.scheduler.state
    budget, state.prefixes.budget_bytes = state.prefixes.budget_bytes, 1000
    try:
        with pytest.raises(OutOfBudget, match=r"keeps at most 0\.001 MB of prefixes"):
            pipe.load_prefix(good)
        with pytest.raises(OutOfBudget, match="raise EngineConfig"):
            pipe.save_prefix(tmp_path / "a", ASK)
    finally:
        state.prefixes.budget_bytes = budget
    assert not list(tmp_path.iterdir())
    forgetful = EngineConfig(enable_prefix_caching=False)
    with load(IDEFICS3, engine=forgetful) as without, pytest.raises(InputError, match="no prefix"):
        without.load_prefix(good)


def test_what_others_do_meanwhile_costs_no_prefix(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an empty prefix cache behind the prompt, nor a file that is replaced."""
    path, state = tmp_path / "a", pipe.engine.scheduler.state
    with monkeypatch.context() as patch:
        patch.setattr(state, "remember", lambda _: pipe.engine.forget())
        saved = pipe.save_prefix(path, ASK, pictures(1))
    assert len(state.prefixes) == 0
    assert pipe.load_prefix(path) == saved
    assert answer(pipe, ASK, pictures(1))[2:] == (saved.tokens - 1, 0)
    header = read_prefix_header(path)
    pipe.save_prefix(path, LONGER, pictures(1))
    with pytest.raises(PrefixError, match="replaced while it was read; load it again"):
        header.read()
