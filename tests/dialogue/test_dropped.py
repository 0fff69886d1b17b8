"""Files dragged into a terminal: each way of writing their paths, and what only looks like one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes.dialogue.dropped import dropped_files, first_word, is_clip, leading_files

NAMES = ("cat.png", "my cat.JPG", "it's a (dog) & cat.png", "ünï.webp", "film.mp4", "notes.txt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "Pictures of me"
    folder.mkdir()
    for name in NAMES:
        (folder / name).touch()
    return folder


def escaped(path: Path) -> str:
    """As Terminal and iTerm write it."""
    return "".join(f"\\{c}" if c in " '()&\\" else c for c in str(path))


def quoted(path: Path) -> str:
    """As GNOME's terminal writes it."""
    return "'" + str(path).replace("'", "'\\''") + "'"


@pytest.mark.parametrize("name", NAMES[:5])
@pytest.mark.parametrize("write", [escaped, quoted, lambda p: f'"{p}"', Path.as_uri, str])
def test_every_way_a_terminal_writes_a_path(name: str, write, folder: Path) -> None:
    path = folder / name
    written = write(path)
    assert dropped_files(f"{written} ") == ("", [path])
    assert dropped_files(f"what's in {written}") == ("what's in", [path])
    assert dropped_files(f"{written} what's this?") == ("what's this?", [path])


def test_several_at_once_and_words_between(folder: Path) -> None:
    one, two = folder / "cat.png", folder / "my cat.JPG"
    assert dropped_files(f"{escaped(one)} {escaped(two)} ") == ("", [one, two])
    for write in (escaped, quoted):
        assert dropped_files(f"is {write(one)} like {write(two)}?") == ("is like ?", [one, two])


@pytest.mark.parametrize(
    "line",
    [
        "and/or", "cat.png", "/no/such/cat.png", "what is /etc?", "'quoted' words", "1/2", "/", "~",
        "/tmp", "file:///", "file://[", "/" + "x" * 5000 + ".png", "a \0 /\0.png", '"/', "\\",
    ],
)  # fmt: skip
def test_other_words_stay_words(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert dropped_files(line) == (line.strip(), [])
    assert dropped_files(f"{folder}/notes.txt {line}")[1] == []


def test_named_after_a_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There relative names count, and what follows the files is text."""
    monkeypatch.chdir(folder)
    cats = [Path("cat.png"), Path("my cat.JPG")]
    assert leading_files("cat.png my\\ cat.JPG") == (cats, "")
    assert leading_files("cat.png 'my cat.JPG' notes.txt?") == (cats, "notes.txt?")
    assert leading_files("my cat.JPG what is it?") == (cats[1:], "what is it?")
    assert leading_files("what is it?") == ([], "what is it?")
    assert first_word("'a b'\\''s' c") == "a b's"


def test_an_animation_is_a_clip_and_a_still_is_none(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8), shade, np.uint8)) for shade in (0, 255)]
    frames[0].save(tmp_path / "still.gif")
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    names = ("still.gif", "moving.gif", "broken.gif", "film.MOV", "x.png")
    assert [is_clip(tmp_path / n) for n in names] == [False, True, False, True, False]
