"""Runs one case on both sides and says how they compare."""

import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.conversion import ConvertOptions, convert
from mlx_vlm_pipes.errors import PipesError
from tools.make_fixtures.case import Json
from tools.make_fixtures.families import Encoded

from .checkpoint import Checkpoint, make
from .dequantise import with_weights_of
from .knobs import TEXT, draw_knobs
from .limits import OURS, THEIRS, limit_for
from .reference import Reference, answer, encode
from .requests import Media, draw_request, make_media, messages_of

LOGITS_BAR = 2e-5  # of the largest logit
PIXELS_BAR = 1e-2
TIE = 5e-5  # two best logits nearer than this may swap, relative to the largest
COMPANION: Json = {
    "raw": False, "fps": 2.0, "turns": [{"role": "user", "parts": ["Which doctor reads?"]}],
}  # fmt: skip
FAILURES = ("refused by ours", "taken by ours", "differs", "crashed")
NOTHING_TO_PACK = "divide no matrix"  # part of what `convert` says of a checkpoint too narrow
Setting = Json  # {"family": ..., "knobs": {...}, "request": {...}}


@dataclass(frozen=True)
class Verdict:
    """kind: see `FAILURES` and the package's docstring; detail: figure, reason or error."""

    kind: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.kind in FAILURES


class _Differs(Exception):
    pass


@dataclass(frozen=True)
class _Theirs:
    """What transformers gives: both prompts alone, or why it refuses."""

    drawn: Reference
    companion: Reference


def draw_setting(family: str, seed: int) -> Setting:
    rng = random.Random(f"{family} {seed}")
    return {
        "family": family,
        "knobs": draw_knobs(family, rng),
        "request": draw_request(family, rng),
    }


def judge(setting: Setting, keep: Path | None = None) -> Verdict:
    """keep: a folder to leave the checkpoint in."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-")) if keep is None else keep
    try:
        return _judge(setting, folder)
    finally:
        if keep is None:
            shutil.rmtree(folder)


def _judge(setting: Setting, folder: Path) -> Verdict:
    source, media_folder = folder / "model", folder / "media"
    media_folder.mkdir(parents=True)
    try:
        checkpoint = make(setting["family"], setting["knobs"], source)
    except Exception as error:  # transformers has no common base for its refusals
        return Verdict("not made", _line(error))
    converts = setting["knobs"].get("image.do_convert_rgb", True)
    media = make_media(setting["request"], media_folder, converts=converts)
    served, refusal = source, None
    if "convert" in setting["knobs"]:
        served = folder / "converted"
        try:
            convert(ConvertOptions(model=source, out=served, measure=False,
                                   **setting["knobs"]["convert"]))  # fmt: skip
        except Exception as error:
            served, refusal = source, error
            if isinstance(error, PipesError) and NOTHING_TO_PACK in str(error):
                refusal = None  # rightly said: compared as it is
    theirs: _Theirs | Exception
    try:
        theirs = _ask_transformers(checkpoint, setting, media, served)
    except Exception as error:
        theirs = error
    if refusal is not None:
        return _refused(refusal, theirs)
    return _compare(checkpoint, setting, media, served, theirs)


def _ask_transformers(
    checkpoint: Checkpoint, setting: Setting, media: Media, served: Path
) -> _Theirs:
    max_new = 16 if setting["family"] in TEXT else 6
    model = checkpoint.family.reload()
    encoded = [
        encode(checkpoint, setting["request"], media),
        encode(checkpoint, COMPANION, Media([], [], [])),
    ]
    if served != checkpoint.folder:
        model = with_weights_of(model, served)

    def run(one: Encoded) -> Reference:
        return answer(checkpoint, model, one, max_new)

    return _Theirs(run(encoded[0]), run(encoded[1]))


def _compare(
    checkpoint: Checkpoint,
    setting: Setting,
    media: Media,
    served: Path,
    theirs: _Theirs | Exception,
) -> Verdict:
    try:
        with_pipe = load(served, dtype="float32")
    except Exception as error:
        return _refused(error, theirs)
    try:
        if isinstance(theirs, Exception):
            return _try_ours(with_pipe, setting, media, theirs)
        return _check_all(with_pipe, setting, media, theirs)
    except _Differs as difference:
        return Verdict("differs", str(difference))
    except Exception as error:
        return _refused(error, theirs)
    finally:
        with_pipe.close()


def _try_ours(pipe: Pipeline, setting: Setting, media: Media, error: Exception) -> Verdict:
    """Where transformers refuses we go on for a reason that `limits` names, or fail."""
    pipe.logits(**_arguments(setting, media, None))
    reason = limit_for(str(error), THEIRS)
    if reason:
        return Verdict("within a limit", reason)
    return Verdict("taken by ours", f"transformers: {_line(error)}")


def _refused(error: Exception, theirs: _Theirs | Exception) -> Verdict:
    if not isinstance(error, PipesError):
        return Verdict("crashed", _line(error))
    if isinstance(theirs, Exception):
        return Verdict("refused by both", f"{_line(error)} / {_line(theirs)}")
    reason = limit_for(str(error), OURS)
    return Verdict("within a limit", reason) if reason else Verdict("refused by ours", _line(error))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, PipesError) else f"{type(error).__name__}: {text}"


def _arguments(setting: Setting, media: Media, text: str | None) -> Json:
    """text: the rendered chat, for a request that gives it raw."""
    request, clips = setting["request"], [list(clip) for clip in media.clips]
    raw = request["raw"] and text is not None
    prompt: Any = text
    if not raw:
        prompt = messages_of(request, as_strings=setting["family"] in TEXT)
    return {
        "prompt": prompt,
        "images": media.given,
        "videos": clips,
        "raw": raw,
        "fps": request["fps"],
    }


def _check_all(pipe: Pipeline, setting: Setting, media: Media, theirs: _Theirs) -> Verdict:
    drawn = theirs.drawn
    ask = _arguments(setting, media, drawn.text)
    encoded = pipe.encode(**ask)
    _same_ids(encoded.input_ids, drawn.ids)
    for name, want in drawn.arrays.items():
        if name in encoded.hf_arrays:
            _same_array(name, encoded.hf_arrays[name], want)
    got, want = pipe.logits(**ask), drawn.logits
    if got.shape != want.shape:
        raise _Differs(f"logits {got.shape}, transformers {want.shape}")
    off = float(np.abs(got - want).max() / np.abs(want).max())
    if not off < LOGITS_BAR:
        raise _Differs(f"logits off by {off:.2g} of the largest")
    length = {"max_tokens": 16 if setting["family"] in TEXT else 6, "temperature": 0.0}
    _same_greedy("alone", pipe.generate(**ask, **length).tokens, drawn)
    pipe.engine.forget()
    other = _arguments({**setting, "request": COMPANION}, Media([], [], []), None)
    both: list[Any] = [_as_request(ask), _as_request(other)]
    for name, result, want in zip(
        ("in a batch", "beside it"),
        pipe.generate_batch(both, **length),
        (drawn, theirs.companion),
        strict=True,
    ):
        _same_greedy(name, result.tokens, want)
    return Verdict("equal", f"{off:.1e}")


def _as_request(ask: Json) -> Json:
    """As `generate_batch` takes it: messages have a key of their own."""
    ask = dict(ask)
    if not ask["raw"]:
        ask["messages"] = ask.pop("prompt")
    return ask


def _same_ids(got: list[int], want: list[int]) -> None:
    if got != want:
        first = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
        raise _Differs(f"ids: {len(got)} for {len(want)}, first at {first}")


def _same_array(name: str, got: np.ndarray, want: np.ndarray) -> None:
    if got.shape != want.shape:
        raise _Differs(f"{name} {got.shape}, transformers {want.shape}")
    off = float(np.abs(got.astype(np.float64) - want).max())
    if not off < PIXELS_BAR:
        raise _Differs(f"{name} off by {off:.3g}")


def _same_greedy(where: str, got: list[int], want: Reference) -> None:
    for i, (a, b) in enumerate(zip(got, want.greedy, strict=False)):
        if a != b:
            if want.gaps[i] < TIE:
                return  # what follows a tie is another answer
            raise _Differs(f"greedy token {i} {where} is {a}, transformers {b}")
    if len(got) != len(want.greedy):
        raise _Differs(f"{len(got)} greedy tokens {where}, transformers {len(want.greedy)}")
