"""Hostile GGUF files: one line of error each, in no time and no memory."""

import os
import random
import struct
import time
from pathlib import Path

import pytest

from mlx_vlm_pipes import check, generate
from mlx_vlm_pipes.errors import CheckpointError, CheckpointNotFound
from mlx_vlm_pipes.gguf.documents import DOCUMENTS, gguf_document
from mlx_vlm_pipes.gguf.header import MAX_HEADER_BYTES, read_gguf
from mlx_vlm_pipes.loading import load, resolve_folder
from mlx_vlm_pipes.weights import read_header
from tests.gguf_file import write_case
from tests.test_hostile_files import EFFORT, run

pytest.importorskip("gguf", reason="the gguf package writes these files")

STRING, LIST, U8, U32 = 8, 9, 0, 4
START = b"GGUF" + struct.pack("<I", 3)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_case(tmp_path_factory.mktemp("gguf") / "sound.gguf", "llama-tied", "Q4_0")
    return path.read_bytes()


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def counts(tensors: int, entries: int) -> bytes:
    return START + struct.pack("<QQ", tensors, entries)


def tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    form = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return counts(1, 0) + text(name) + form


FILES = {
    "empty": b"",
    "other": b"PK\3\4" * 100,
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "many tensors": counts(2**63, 0) + bytes(64),
    "many entries": counts(0, 2**63) + bytes(64),
    "endless text": counts(0, 1) + entry(b"a", STRING, struct.pack("<Q", 2**63)),
    "endless name": counts(0, 1) + struct.pack("<Q", 2**40),
    "endless list": counts(0, 1) + entry(b"a", LIST, struct.pack("<IQ", U8, 2**60)) + bytes(99),
    "long list": counts(0, 1) + entry(b"a", LIST, struct.pack("<IQ", U32, 2**21)),
    "list of lists": counts(0, 1) + entry(b"a", LIST, struct.pack("<IQ", LIST, 2**20)),
    "no such type": counts(0, 1) + entry(b"a", 77, b""),
    "not UTF-8": counts(0, 1) + entry(b"\xff", U8, b"\1"),
    "twice": counts(0, 2) + entry(b"a", U8, b"\1") * 2,
    "alignment": counts(0, 1) + entry(b"general.alignment", U32, struct.pack("<I", 0)),
    "no dimensions": tensor(b"w", []),
    "many dimensions": counts(1, 0) + text(b"w") + struct.pack("<I", 2**31),
    "no rows": tensor(b"w", [4, 0]),
    "overflow": tensor(b"w", [2**31 - 1] * 4),
    "beyond int32": tensor(b"w", [2**33]),
    "far away": tensor(b"w", [4], offset=2**64 - 8) + bytes(64),
    "cut blocks": tensor(b"w", [33], kind=2) + bytes(64),
    "no such tensor type": tensor(b"w", [4], kind=5) + bytes(64),
    "nothing in it": counts(0, 0),
}


def outcome(path: Path) -> str:
    """What every reader of a file says, "" where all are content; at most two seconds."""
    started = time.perf_counter()
    said = []
    for read in (read_gguf, read_header, *(lambda p, n=n: gguf_document(p / n) for n in DOCUMENTS)):
        try:
            read(path)
        except CheckpointError as error:
            said.append(str(error))
    assert time.perf_counter() - started < 2
    assert not [line for line in said if len(line.splitlines()) > 1 or str(path) not in line]
    return "; ".join(said)


@pytest.mark.parametrize("name", FILES)
def test_a_broken_header_is_one_line_of_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(FILES[name])
    assert outcome(path)
    assert run(check.main, [str(path)]) == 1
    assert run(generate.main, ["--model", str(path), "--prompt", "x"]) == 2


def test_files_cut_short(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "m.gguf"
    rng = random.Random(0)
    for _ in range(int(40 * EFFORT)):
        path.write_bytes(sound[: rng.randrange(len(sound))])
        assert outcome(path)


def test_flipped_bytes(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "m.gguf"
    rng = random.Random(1)
    for i in range(int(150 * EFFORT)):
        changed = bytearray(sound)
        for _ in range(rng.choice([1, 1, 4])):
            changed[rng.randrange(20_000)] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
        path.write_bytes(changed)
        outcome(path)
        if i % 30 == 0:
            run(check.main, [str(path)])
            run(generate.main, ["--model", str(path), "--prompt", "hi", "--max-tokens", "1"])


def test_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    with pytest.raises(CheckpointNotFound, match="no model at"):
        load(pipe)
    with pytest.raises(CheckpointError, match="regular file"):
        read_header(pipe)
    endless = tmp_path / "zero.gguf"
    endless.symlink_to("/dev/zero")
    with pytest.raises(CheckpointNotFound):
        load(endless)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(tmp_path / "folder.gguf")


def test_a_header_is_not_read_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        length = MAX_HEADER_BYTES + 1
        file.write(counts(0, 1) + entry(b"a", STRING, struct.pack("<Q", length)))
        file.truncate(2 * MAX_HEADER_BYTES)  # sparse
    with pytest.raises(CheckpointError, match=f"text of {length} bytes"):
        read_gguf(path)


def test_a_folder_with_one_file_stands_for_it(tmp_path: Path, sound: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(sound)
    (tmp_path / "README.md").write_text("x")
    assert resolve_folder(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(sound)
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(a\.gguf, b\.gguf\)"):
        resolve_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("key", ["tokens", "eos_token_id", "eot_token_id", "padding_token_id"])
def test_metadata_of_another_type(tmp_path: Path, key: str) -> None:
    for value in (5.5, "x", [5]):
        path = write_case(tmp_path / "m.gguf", "llama-tied", **{f"tokenizer__ggml__{key}": value})
        assert f"tokenizer.ggml.{key} is" in outcome(path)
        assert run(check.main, [str(path)]) == 1
        assert run(generate.main, ["--model", str(path), "--prompt", "x"]) == 2


def test_a_piece_of_endless_length(tmp_path: Path) -> None:
    tokens = [*(f"t{i}" for i in range(323)), "a" * 2**20]
    names = {f"tokenizer__ggml__{key}_token_id": 1 for key in ("bos", "eos")}
    changes = {"model": "llama", "tokens": tokens, "scores": [0.5] * 324, "merges": None}
    entries = {f"tokenizer__ggml__{key}": value for key, value in changes.items()} | names
    path = write_case(tmp_path / "m.gguf", "llama-tied", **entries)
    assert "a token of 1048576 characters" in outcome(path)
