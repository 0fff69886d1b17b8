"""Frames from lists, folders, animations and films; sampling; what cannot be read."""

import base64
import contextlib
import io
import os
import random
import time

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes.errors import MediaError
from mlx_vlm_pipes.processing import video
from mlx_vlm_pipes.processing.animations import read_animation
from mlx_vlm_pipes.processing.video import ClipPlan, VideoInfo, load_clip
from tests.processing.folders import picture


def every_second(info: VideoInfo) -> np.ndarray:
    return np.arange(0, info.num_frames, 2)


PLAN = ClipPlan(4.0, every_second, lambda frame, first, count: frame)


def colours(number: int) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), (20 * i, 0, 200 - 20 * i)) for i in range(number)]


def test_a_list_is_not_sampled_again(tmp_path) -> None:
    frames = colours(11)
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"f{i}.png")  # f10 comes after f9
    (tmp_path / "notes.txt").write_text("x")
    array = np.stack([np.asarray(f) for f in frames])
    for source in (frames, tmp_path, str(tmp_path), array):
        clip = load_clip(source, PLAN)
        assert [np.asarray(f)[0, 0, 0] for f in clip.frames] == [20 * i for i in range(11)]
        assert (clip.fps, clip.timestamps_s[3], clip.duration_s) == (4.0, 0.75, 2.75)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animation_is_sampled_by_its_own_clock(form) -> None:
    frames = colours(6)
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], duration=200)
    clip = load_clip(buffer.getvalue(), PLAN)
    assert len(clip.frames) == 3
    assert clip.fps == pytest.approx(2.5)
    assert clip.timestamps_s == pytest.approx([0, 0.4, 0.8])
    reds = [np.asarray(f)[..., 0].mean() for f in clip.frames]
    assert reds == pytest.approx([0, 40, 80], abs=6)


def encoded(frames: list[Image.Image], form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("form", "options"),
    [("GIF", {}), ("WEBP", {}), ("PNG", {}), ("PNG", {"default_image": True})],
)
def test_durations_are_those_that_pillow_reads(form, options) -> None:
    durations = [100, 40, 250, 70, 1000, 20][len(options) :]
    data = encoded(colours(6), form, duration=durations, **options)
    image, expected = Image.open(io.BytesIO(data)), []
    for i in range(6):
        image.seek(i)
        image.load()
        expected.append(image.info.get("duration") or 0)
    animation = read_animation(data, image.size)
    assert animation.durations_ms == expected
    assert animation.num_pixels == 6 * 16 * 16


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_cut_and_spoiled_animations_are_read_or_refused(form) -> None:
    data = encoded(colours(6), form, duration=50)
    rng = random.Random(form)
    for i in range(150):
        spoiled = bytearray(data[: rng.randrange(13, len(data))] if i % 2 else data)
        for _ in range(i % 5):
            spoiled[rng.randrange(12, len(spoiled))] = rng.randrange(256)
        with contextlib.suppress(MediaError):
            load_clip(bytes(spoiled), PLAN)


def test_a_small_file_of_many_large_frames_is_refused_at_once() -> None:
    one = encoded([Image.new("P", (6000, 6000))], "GIF")
    start = one.index(b",\0\0\0\0")  # the first frame's descriptor; the last byte ends the file
    data = one[:-1] + one[start:-1] * 60 + b";"
    begun = time.perf_counter()
    with pytest.raises(MediaError, match=r"61 frames of 6000x6000, 2196000000 pixels in all"):
        load_clip(data, PLAN)
    assert time.perf_counter() - begun < 2


def test_frames_beyond_the_screen_count_with_their_own_size() -> None:
    one = bytearray(encoded([Image.new("P", (6000, 6000))], "GIF"))
    start = one.index(b",\0\0\0\0")
    one[6:10] = bytes([1, 0, 1, 0])  # the screen is said to be 1 x 1
    with pytest.raises(MediaError, match="61 frames of 6000x6000"):
        load_clip(bytes(one[:-1] + one[start:-1] * 60 + b";"), PLAN)


def test_long_data_urls_and_names(tmp_path) -> None:
    noise = [Image.effect_noise((64, 64), 90) for _ in range(4)]
    data = encoded(noise, "GIF")
    url = "data:image/gif;base64," + base64.b64encode(data).decode()
    assert len(url) > 4096
    assert len(load_clip(url, PLAN).frames) == 2
    for source, message in (
        ("http://127.0.0.1/" + "x" * 5000, "no public address"),
        ("n" * 300 + ".gif", "File name too long"),
        ("~no-such-user/a.gif", "no such file"),
        ("~$a.gif", "no such file"),
        ("/dev/zero", "a device"),
    ):
        with pytest.raises(MediaError, match=message):
            load_clip(source, PLAN)


def test_huge_files_are_refused_unread(tmp_path) -> None:
    pytest.importorskip("av")
    for head, message in ((b"GIF89a", "limit of 268435456"), (b"", "cannot be decoded")):
        path = tmp_path / "huge"
        with path.open("wb") as file:
            file.write(head)
            file.truncate(40 * 2**30)  # a hole: it takes no room
        with pytest.raises(MediaError, match=message):
            load_clip(path, PLAN)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_folder_without_permission(tmp_path) -> None:
    (tmp_path / "closed").mkdir(mode=0o000)
    for path in (tmp_path / "closed", tmp_path / "closed" / "a.gif"):
        with pytest.raises(MediaError, match="Permission denied"):
            load_clip(path, PLAN)


def write_film(path, codec: str = "mpeg4") -> None:
    """Nine frames of 32 x 32, each a step brighter, ten a second."""
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"no {codec} encoder")
    with av.open(str(path), "w") as film:
        stream = film.add_stream(codec, rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(9):
            still = Image.new("RGB", (32, 32), (25 * i, 25 * i, 25 * i))
            for packet in stream.encode(av.VideoFrame.from_image(still)):
                film.mux(packet)
        for packet in stream.encode():
            film.mux(packet)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.webm", "libvpx")])
def test_film(tmp_path, name, codec) -> None:
    path = tmp_path / name
    write_film(path, codec)
    clip = load_clip(path, PLAN)
    assert clip.source_size == (32, 32)
    assert clip.fps == pytest.approx(10 * 5 / 9)
    assert clip.timestamps_s == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    levels = [np.asarray(f).mean() for f in clip.frames]
    assert levels == pytest.approx([0, 50, 100, 150, 200], abs=8)
    with pytest.raises(MediaError, match="cannot be decoded"):
        load_clip(path.read_bytes()[:200], PLAN)


def test_a_film_of_too_many_pixels(tmp_path, monkeypatch) -> None:
    write_film(tmp_path / "a.mp4")
    monkeypatch.setattr(video, "MAX_FILM_PIXELS", 9 * 32 * 32)
    assert len(load_clip(tmp_path / "a.mp4", PLAN).frames) == 5
    monkeypatch.setattr(video, "MAX_FILM_PIXELS", 9 * 32 * 32 - 1)
    with pytest.raises(
        MediaError, match="9 frames of 32x32, 9216 pixels in all; the limit is 9215"
    ):
        load_clip(tmp_path / "a.mp4", PLAN)


def test_a_film_with_a_broken_table(tmp_path) -> None:
    """The kind of its codec is nulled: there is a stream, but nothing that decodes it."""
    write_film(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    kind, table = data.index(b"mp4v"), data.index(b"esds")
    unknown = data[:kind] + b"zzzz" + data[kind + 4 : table] + bytes(40) + data[table + 40 :]
    for broken in (unknown, data[: len(data) // 2] + bytes(len(data) // 2)):
        with pytest.raises(MediaError, match="holds no video stream that can be decoded"):
            load_clip(broken, PLAN)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "0 frames"),
        ("/nowhere.mp4", "no such file"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "cannot be decoded"),
        (b"", "cannot be decoded"),
        ([b"junk"], "cannot be read"),
        (picture(2, 2), "is one picture"),
    ],
)
def test_unusable(source, message) -> None:
    pytest.importorskip("av")
    with pytest.raises(MediaError, match=message):
        load_clip(source, PLAN)


def test_missing_pyav_names_the_extra(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MediaError, match=r"mlx-vlm-pipes\[video\]"):
        load_clip(b"\x00\x00\x00\x18ftypmp42", PLAN)
    with pytest.raises(MediaError, match="no pictures"):
        load_clip(tmp_path, PLAN)
    assert load_clip([picture(3, 2)], PLAN).source_size == (3, 2)
