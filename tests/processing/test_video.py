"""Frames from lists, folders, animations and films; sampling; what cannot be read."""

import io

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes.errors import MediaError
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


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.webm", "libvpx")])
def test_film(tmp_path, name, codec) -> None:
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"no {codec} encoder")
    path = tmp_path / name
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
    clip = load_clip(path, PLAN)
    assert clip.source_size == (32, 32)
    assert clip.fps == pytest.approx(10 * 5 / 9)
    assert clip.timestamps_s == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    levels = [np.asarray(f).mean() for f in clip.frames]
    assert levels == pytest.approx([0, 50, 100, 150, 200], abs=8)
    with pytest.raises(MediaError, match="cannot be decoded"):
        load_clip(path.read_bytes()[:200], PLAN)


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
