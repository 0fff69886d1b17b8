"""Headers and weight files are untrusted: every lie is a one-line WeightsError, nothing crashes."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import CheckpointNotFound, InputError, WeightsError
from mlx_vlm_pipes.weights import find_weight_files, read_header
from mlx_vlm_pipes.weights.safetensors import (
    INDEX_NAME,
    write_file,
)

from .conftest import WriteRaw


def entry(dtype: object, shape: object, start: object, end: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_header_of_a_file_that_mlx_wrote(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    arrays = {"w": mx.ones((2, 3), dtype=mx.bfloat16), "empty": mx.zeros((0, 4))}
    mx.save_safetensors(str(path), arrays, metadata={"format": "mlx"})
    header = read_header(path)
    info = header.tensors["w"]
    assert (info.dtype, info.shape, info.path) == (DType.bfloat16, (2, 3), path)
    assert info.nbytes == 12
    assert header.tensors["empty"].shape == (0, 4)
    assert header.metadata == {"format": "mlx"}


def test_a_written_file_is_read_alike_by_mlx_and_by_numpy(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "a.safetensors"
    rows = mx.arange(12, dtype=mx.float32).reshape(3, 4)
    arrays = {
        "transposed": rows.T, "half": rows.astype(mx.float16), "brain": rows.astype(mx.bfloat16),
        "packed": mx.array([2**31, 7], mx.uint32), "empty": mx.zeros((0, 4)),
        "scalar": mx.array(2.5), "flags": mx.array([True, False, True]),
    }  # fmt: skip
    write_file(path, arrays)
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert isinstance(loaded, dict)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert mx.array_equal(loaded[name], array), name
    with safe_open(path, framework="numpy") as file:
        assert np.array_equal(file.get_tensor("transposed"), np.arange(12).reshape(3, 4).T)
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0
    (folder / "other").touch()
    assert path.stat().st_mode == (folder / "other").stat().st_mode


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent/a\.safetensors: cannot be written \(.*No such"):
        write_file(tmp_path / "absent" / "a.safetensors", {"w": mx.ones((2,))})


GOOD = entry("F32", [2], 0, 8)
LIES = {
    "ends past the file": ({"w": entry("F32", [4], 0, 16)}, "cut short"),
    "size is not the shape's": ({"w": entry("F32", [3], 0, 8)}, "needs 12 bytes"),
    "negative dimension": ({"w": entry("F32", [-2], 0, 8)}, "shape"),
    "boolean dimension": ({"w": entry("F32", [True], 0, 8)}, "shape"),
    "huge dimension": ({"w": entry("F32", [0, 2**40], 0, 0)}, "shape"),
    "rank 100": ({"w": entry("F32", [1] * 100, 0, 4)}, "shape"),
    "unknown dtype": ({"w": entry("Q9", [2], 0, 8)}, "unknown dtype 'Q9'"),
    "dtype is a list": ({"w": entry(["F32"], [2], 0, 8)}, "unknown dtype"),
    "start after end": ({"w": entry("F32", [2], 8, 0)}, "data_offsets"),
    "offset is text": ({"w": entry("F32", [2], "0", 8)}, "data_offsets"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [2]}}, "data_offsets"),
    "entry is a number": ({"w": 5}, "not an object"),
    "overlap": ({"w": GOOD, "v": entry("F32", [1], 4, 8)}, "tensor `v`.*overlap"),
    "gap": ({"w": entry("F32", [1], 4, 8)}, "tensor `w`.*gap"),
    "more data than tensors": ({"w": entry("F32", [1], 0, 4)}, "fill the file"),
    "two of three lie": ({"w": GOOD, "v": 1, "u": entry("Q9", [], 0, 0)}, r"'v'.*and 1 more"),
    "a name that is half a character": (b'{"\\ud800": {}}', "entry|dtype|broken"),
    "metadata of numbers": ({"__metadata__": {"format": 1}}, "not a string"),
    "metadata is a list": ({"__metadata__": [1], "w": GOOD}, "not a string"),
    "name twice": (b'{"w": {}, "w": {}}', "twice"),
    "broken JSON": (b'{"w": ', "broken JSON"),
    "nested too deeply": (b"[" * 100_000, "broken JSON"),
    "not UTF-8": (b"\xff\xfe{}", "broken JSON"),
    "not an object": (b"[]", "expected an object"),
    "a number of 10,000 digits": (b'{"w": ' + b"9" * 10_000 + b"}", "broken JSON|not an object"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_by_file_and_in_one_line(lie: str, write_raw: WriteRaw) -> None:
    header, message = LIES[lie]
    path = write_raw(header, bytes(8))
    with pytest.raises(WeightsError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_a_header_longer_than_the_file_or_too_short_a_file_is_refused(write_raw: WriteRaw) -> None:
    with pytest.raises(WeightsError, match="cut short"):
        read_header(write_raw({"w": GOOD}, bytes(8), length=2**62))
    path = write_raw({}, name="empty.safetensors")
    path.write_bytes(b"123")
    with pytest.raises(WeightsError, match="too short"):
        read_header(path)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_header(path.with_name("absent.safetensors"))


def test_fuzzed_headers_give_errors_or_headers_that_mlx_reads(write_raw: WriteRaw) -> None:
    """Seeded byte damage: nothing but WeightsError, and what passes, MLX loads."""
    rng = random.Random(7)
    header = json.dumps({"w": GOOD, "v": entry("F16", [2, 2], 8, 16), "__metadata__": {}}).encode()
    passed = 0
    for _ in range(600):
        raw = bytearray(struct.pack("<Q", len(header)) + header + bytes(16))
        for _ in range(rng.choice((1, 1, 2, 8))):
            raw[rng.randrange(len(raw))] = rng.choice((0, 34, 44, 45, 48, 57, 91, 123, 255))
        if rng.random() < 0.2:
            del raw[rng.randrange(len(raw)) :]
        path = write_raw(b"", name="fuzz.safetensors")
        path.write_bytes(bytes(raw))
        try:
            tensors = read_header(path).tensors
        except WeightsError:
            continue
        passed += 1
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        assert {n: tuple(a.shape) for n, a in loaded.items()} == {
            name: info.shape for name, info in tensors.items()
        }
    assert passed > 10  # the damage is not always fatal, so both ways are tested


def save(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / name), {"w": mx.zeros((1,))})


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_weight_files(folder)]


def test_all_safetensors_count_but_consolidated_adapters_and_hidden(tmp_path: Path) -> None:
    for name in ("b", "a", "consolidated.00", "adapters", "adapter_model", "._a"):
        save(tmp_path, f"{name}.safetensors")
    assert names(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_an_index_decides_which_files_count(tmp_path: Path) -> None:
    for name in ("one", "two", "left-over"):
        save(tmp_path, f"{name}.safetensors")
    index = {"weight_map": {"x": "two.safetensors", "y": "one.safetensors"}}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    assert names(tmp_path) == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"x": "absent.safetensors"}}, "missing"),
        ({"weight_map": {"x": "../outside.safetensors"}}, "outside the folder"),
        ({"weight_map": {"x": "/etc/x.safetensors"}}, "outside the folder"),
        ({"weight_map": {"x": "a\0.safetensors"}}, "outside the folder"),
        ({"weight_map": {"x": "weights.bin"}}, "not a .safetensors"),
        ({"weight_map": {"x": 3}}, "not a .safetensors"),
        ({"weight_map": []}, "no weight_map"),
        ({}, "no weight_map"),
        ([], "expected an object"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, index: object, message: str) -> None:
    save(tmp_path, "outside.safetensors")
    folder = tmp_path / "model"
    save(folder, "model.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=message):
        find_weight_files(folder)


def test_links_may_leave_the_folder_only_into_the_hub_caches_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    save(blobs, "0123.safetensors")
    (blobs / "0123.safetensors").rename(blobs / "0123")
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert names(snapshot) == ["model.safetensors"]
    linked = tmp_path / "by-link"
    linked.symlink_to(snapshot)
    assert len(find_weight_files(linked)) == 1

    save(tmp_path / "elsewhere", "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("../elsewhere/secret.safetensors")
    with pytest.raises(WeightsError, match="outside the folder"):
        find_weight_files(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(WeightsError, match="missing"):
        find_weight_files(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [("m.gguf", "GGUF.*name the .gguf file"), ("pytorch_model.bin", "pickle"), ("x.txt", "no \\*")],
)
def test_folders_without_safetensors_say_what_to_use(
    tmp_path: Path, file: str, message: str
) -> None:
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(WeightsError, match=message):
        find_weight_files(tmp_path)
    with pytest.raises(CheckpointNotFound):
        find_weight_files(tmp_path / "absent")
