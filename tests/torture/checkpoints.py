"""Changed, cut and hostile checkpoints of every fixture: they work, or one line says why not."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from mlx_vlm_pipes import check, load
from mlx_vlm_pipes.conversion import ConvertOptions, convert
from mlx_vlm_pipes.errors import PipesError
from tests.fixtures_helper import FIXTURES, cases, copy_case
from tests.torture import section
from tests.torture.mutations import file_of, header_of, places, spoiled
from tests.torture.section import Case, one_line, require

NAMES = [folder.name for folder in cases()]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON_NAMES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
              "preprocessor_config.json", "processor_config.json", "chat_template.json",
              "special_tokens_map.json", "video_preprocessor_config.json", "vocab.json",
              INDEX]  # fmt: skip
DTYPES = ["F32", "F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "F8_E4M3", "X9", "U32"]
Change = Callable[[Path, random.Random], str]


def json_value(folder: Path, rng: random.Random) -> str:
    """One value of one JSON file becomes nonsense."""
    path = rng.choice([folder / name for name in JSON_NAMES if (folder / name).is_file()])
    (text,) = spoiled(path.read_text(), rng, 1)
    path.write_text(text)
    return f"a value of {path.name}"


def config_number(folder: Path, rng: random.Random) -> str:
    """One number of config.json becomes a neighbour, its double, its half."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    numbers = [spot for spot in places(values) if type(_at(values, spot)) in (int, float)]
    spot = rng.choice(numbers)
    value = _at(values, spot)
    changed = rng.choice(
        [value + 1, value - 1, value * 2, value // 2, value * 3, -value, value + 7]
    )
    _put(values, spot, changed)
    path.write_text(json.dumps(values))
    return f"{'.'.join(map(str, spot))} {value} -> {changed}"


def json_key(folder: Path, rng: random.Random) -> str:
    """One key of one JSON file is missing."""
    path = rng.choice([folder / name for name in JSON_NAMES if (folder / name).is_file()])
    values = json.loads(path.read_text())
    keys = [spot for spot in places(values) if spot and isinstance(spot[-1], str)]
    if not keys:
        return f"nothing of {path.name}"
    spot = rng.choice(keys)
    del _at(values, spot[:-1])[spot[-1]]
    path.write_text(json.dumps(values))
    return f"{path.name} without {'.'.join(map(str, spot))[:60]}"


def exchanged(folder: Path, rng: random.Random) -> str:
    """One file is another checkpoint's."""
    path, other = rng.choice(_files(folder)), rng.choice(NAMES)
    source = FIXTURES / other / path.name
    if source.exists():
        shutil.copyfile(source, path)
    return f"{path.name} of {other}"


def file_bytes(folder: Path, rng: random.Random) -> str:
    """One file is cut, or some of its bytes are others."""
    path = rng.choice(_files(folder))
    data = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "changed", "head changed", "grown", "doubled"])
    if kind == "cut":
        data = data[: rng.randrange(len(data))]
    elif kind == "grown":
        data += rng.randbytes(rng.randint(1, 999))
    elif kind == "doubled":
        data = data * 2
    else:
        reach = len(data) if kind == "changed" else min(2000, len(data))
        for _ in range(rng.randint(1, 9)):
            data[rng.randrange(reach)] = rng.randrange(256)
    path.write_bytes(bytes(data))
    return f"{path.name} {kind}"


def no_file(folder: Path, rng: random.Random) -> str:
    """One file is missing, empty, or no file."""
    path = rng.choice([*_files(folder), folder / rng.choice(JSON_NAMES)])
    path.unlink(missing_ok=True)
    kind = rng.choice(["missing", "empty", "a folder", "a FIFO", "/dev/zero", "a loop", "noise",
                       "nested", "null", "a list", "a BOM", "latin-1"])  # fmt: skip
    if kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind in ("/dev/zero", "a loop"):
        path.symlink_to(path if kind == "a loop" else "/dev/zero")
    elif kind != "missing":
        texts = {"empty": b"", "noise": rng.randbytes(999), "nested": b"[" * 10**5,
                 "null": b"null", "a list": b"[]", "a BOM": b"\xef\xbb\xbf{}",
                 "latin-1": b'{"\xe9": 1}'}  # fmt: skip
        path.write_bytes(texts[kind])
    return f"{path.name} {kind}"


def header(folder: Path, rng: random.Random) -> str:
    """The header of the weights lies in one place."""
    path = _weights(folder, rng)
    values, body = header_of(path.read_bytes())
    kind = rng.choice(["spoiled", "dtype", "shape", "offsets", "name", "missing", "twice", "long"])
    names = sorted(name for name in values if name != "__metadata__")
    name, other = rng.choice(names), rng.choice(names)
    entry, text = values[name], ""
    if kind == "spoiled":
        (text,) = spoiled(json.dumps(values), rng, 1)
    elif kind == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == "shape":
        entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [], [2**31] * 2])
    elif kind == "offsets":
        entry["data_offsets"] = values[other]["data_offsets"]
    elif kind == "name":
        values[f"{name}{rng.choice(['x', '.weight', '.lora', chr(0), 'é'])}"] = values.pop(name)
    elif kind == "missing":
        del values[name]
    elif kind == "twice":
        text = json.dumps(values)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    else:
        values["__metadata__"] = {"x": "y" * 10**6}
    path.write_bytes(file_of(text or json.dumps(values), body))
    return f"the header's {kind}: {name}"


def tensors(folder: Path, rng: random.Random) -> str:
    """A true safetensors file whose tensors are not the model's."""
    path = _weights(folder, rng)
    values, body = header_of(path.read_bytes())
    names = sorted(name for name in values if name != "__metadata__")
    name = rng.choice(names)
    parts = {n: _bytes_of(values[n], body) for n in names}
    kind = rng.choice(["missing", "extra", "turned", "taller", "NaN", "flat", "no rows", "zeros"])
    shape = values[name]["shape"]
    size = len(parts[name]) // max(1, int(np.prod(shape)))
    if kind == "missing":
        del parts[name]
    elif kind == "extra":
        values["model.extra.weight"], parts["model.extra.weight"] = values[name], parts[name]
    elif kind == "turned":
        values[name]["shape"] = shape[::-1]
    elif kind == "taller" and shape:
        row = len(parts[name]) // shape[0]
        values[name]["shape"], parts[name] = [shape[0] + 1, *shape[1:]], parts[name] + bytes(row)
    elif kind == "flat":
        values[name]["shape"] = [int(np.prod(shape))]
    elif kind == "no rows":
        values[name]["shape"], parts[name] = [0, *shape[1:]], b""
    else:
        parts[name] = (b"\xff" if kind == "NaN" else b"\0") * size * int(np.prod(shape))
    _write(path, values, parts)
    return f"a tensor {kind}: {name}"


def index_file(folder: Path, rng: random.Random) -> str:
    """An index over the weights that does not fit them."""
    names = [name for name in header_of(_weights(folder, rng).read_bytes())[0] if name[0] != "_"]
    files = [WEIGHTS, "none.safetensors", "../x.safetensors", "/etc/passwd", "", "config.json", 5]
    part = rng.sample(names, rng.randint(0, min(9, len(names))))
    whole: dict[str, Any] = {name: rng.choice(files[:1]) for name in names}
    whole |= {name: rng.choice(files) for name in part}
    shown = rng.choice([whole, {name: WEIGHTS for name in part}, []])
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shown}))
    return f"an index of {len(shown)} names"


CHANGES: list[Change] = [json_value, config_number, json_key, exchanged, file_bytes, no_file,
                         header, tensors, index_file]  # fmt: skip


class Section(section.Section):
    """One fixture with one to three changes: examined, loaded, asked, and converted."""

    small: ClassVar[int] = 24

    @property
    def whole(self) -> int:
        return 1500

    def draw(self, index: int) -> Case:
        rng = self.rng(index)
        name, folder = rng.choice(NAMES), self.folder / f"model-{index}"
        copy_case(name, folder)
        changes = [rng.choice(CHANGES)] if rng.random() < 0.8 else rng.choices(CHANGES, k=3)
        told = ", ".join(_changed(change, folder, rng) for change in changes)
        converts = rng.random() < 0.25
        about = f"{name}: {told}".encode("ascii", "replace").decode()
        return Case(" ".join(about.split()), lambda: self._try(name, folder, converts=converts))

    def _try(self, name: str, folder: Path, *, converts: bool) -> None:
        try:
            usable = _examined(folder)
            refusal = self._asked(name, folder)
            if converts:
                self._converted(folder)
        finally:
            shutil.rmtree(folder)
        # A tokenizer or template is examined, not tried out: only weights and config must agree.
        about_tensors = isinstance(refusal, PipesError) and type(refusal).__name__ == "WeightsError"
        require(not (usable and about_tensors), f"check says good, but {refusal}")

    def _asked(self, name: str, folder: Path) -> PipesError | None:
        """Why it was refused, None where it answered."""
        sees = (FIXTURES / name / "media").is_dir()
        pictures = [Image.new("RGB", (40, 30), (200, 30, 30))] if sees else []
        try:
            with load(folder, dtype="float32") as pipe:
                pipe.plan("What?", pictures, max_tokens=2)
                answer = pipe.generate("What?", pictures, max_tokens=2, ignore_eos=True)
                require(len(answer.tokens) == 2, f"tokens {answer.tokens}")
        except PipesError as error:
            one_line(error)
            return error
        return None

    def _converted(self, folder: Path) -> None:
        out = folder.parent / f"{folder.name}-out"
        with contextlib.suppress(PipesError):
            convert(ConvertOptions(model=folder, out=out, bits=8, group_size=32, measure=False))
            require(out.exists(), "converted, and not there")
            shutil.rmtree(out)
        left = [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]
        require(not out.exists() and not left, f"left behind: {left}")


def _examined(folder: Path) -> bool:
    """What the check command says of it, in text and in JSON."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = check.main([str(folder), "--json"])
    require(status in (0, 1), f"check ends with {status}: {err.getvalue()}")
    require(isinstance(json.loads(out.getvalue()), dict), "no JSON")
    return status == 0


def _changed(change: Change, folder: Path, rng: random.Random) -> str:
    """What was done; nothing where an earlier change has left no file that can be read."""
    try:
        return change(folder, rng)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, struct.error):
        return f"no {change.__name__}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _weights(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in folder.glob("*.safetensors") if path.is_file()))


def _at(values: Any, spot: tuple[Any, ...]) -> Any:
    for key in spot:
        values = values[key]
    return values


def _put(values: Any, spot: tuple[Any, ...], value: object) -> None:
    _at(values, spot[:-1])[spot[-1]] = value


def _bytes_of(entry: dict[str, Any], body: bytes) -> bytes:
    begin, end = entry["data_offsets"]
    return body[begin:end]


def _write(path: Path, values: dict[str, Any], parts: dict[str, bytes]) -> None:
    header, body = {}, b""
    for name, data in parts.items():
        header[name] = {**values[name], "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    path.write_bytes(file_of(json.dumps(header), body))
