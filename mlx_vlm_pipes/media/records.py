"""What a model saw of a picture or clip: sizes, turn, tiles, limits, tokens, coordinates.

Processors write these records from the arithmetic that they do; nothing is worked out again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real

from mlx_vlm_pipes.errors import InputError, shown
from mlx_vlm_pipes.facts import Coordinates
from mlx_vlm_pipes.media.previews import Preview

Size = tuple[int, int]
Span = tuple[int, int]

# What EXIF orientations say is to be done before a picture is shown (TIFF 6.0, tag 274).
TURNS = {
    2: "mirrored", 3: "turned by 180°", 4: "flipped", 5: "turned clockwise and mirrored",
    6: "turned clockwise", 7: "turned anticlockwise and mirrored", 8: "turned anticlockwise",
}  # fmt: skip


FAR = 1e9  # no picture has so many pixels on a side


@dataclass(frozen=True)
class Cap:
    """A limit that decided a size. name: of the setting; value: in its own unit."""

    name: str
    value: int

    def __str__(self) -> str:
        return f"{self.name} {self.value}"


@dataclass(frozen=True)
class Tiles:
    """How a picture, or each frame of a clip, is cut.

    rows, columns: of tiles; 1 x 1 where it is read whole. size: (width, height) of a tile in
    pixels. tokens: (rows, columns) of tokens that a tile becomes. overview: whether the whole
    picture, resized to one tile, follows them.
    """

    rows: int
    columns: int
    size: Size
    tokens: tuple[int, int]
    overview: bool = False

    def __len__(self) -> int:
        return self.rows * self.columns + self.overview


@dataclass(frozen=True)
class MediaRecord:
    """What the model saw of one picture or clip. Sizes are (width, height) in pixels.

    kind: "image" or "video". source_size: as stored, before the EXIF turn; of a clip, its first
    frame's. orientation: the EXIF value, 1 for upright. resized_size: of the picture, or of each
    frame, that is cut into tiles. grid: rows and columns of frames or patches, or time, rows and
    columns in patches, as the family counts. cap: the limit that decided the size. num_frames:
    that were read, of total_frames; times_s: of each. start_idx, end_idx: half-open token range
    from its first to its last placeholder; tile_spans: of each of its `num_parts`. coordinates: in
    what the model writes places. preview: the picture as it was cut.
    """

    kind: str
    source_size: Size
    resized_size: Size
    grid: tuple[int, ...]
    tiles: Tiles
    orientation: int = 1
    cap: Cap | None = None
    num_frames: int = 1
    total_frames: int = 1
    times_s: tuple[float, ...] = ()
    num_tokens: int = 0
    start_idx: int = 0
    end_idx: int = 0
    tile_spans: tuple[Span, ...] = ()
    coordinates: Coordinates = Coordinates.FRACTIONS
    preview: Preview = field(default_factory=Preview, repr=False, compare=False)

    @property
    def span(self) -> Span:
        return self.start_idx, self.end_idx

    @property
    def turn(self) -> str:
        """What was done for its EXIF orientation; empty for a picture that is stored upright."""
        return TURNS.get(self.orientation, "")

    @property
    def upright_size(self) -> Size:
        """The size as the picture is displayed, which coordinates refer to."""
        width, height = self.source_size
        return (height, width) if self.orientation >= 5 else (width, height)

    @property
    def num_parts(self) -> int:
        """Tiles of a picture; frames of a clip, or its steps where several frames make one."""
        if self.kind == "image":
            return len(self.tiles)
        return self.grid[0] if len(self.grid) == 3 else self.num_frames

    @property
    def units(self) -> tuple[float, float]:
        """Width and height of the picture in the model's coordinates."""
        if self.coordinates is Coordinates.PIXELS:
            return self.resized_size
        return (1000, 1000) if self.coordinates is Coordinates.THOUSANDTHS else (1, 1)

    def to_source(self, box: Sequence[float]) -> tuple[float, ...]:
        """A point or box in the model's coordinates, in pixels of the picture as displayed.

        box: x, y of a point, or x, y, x, y of a box's corners. Places outside stay outside.
        Raises: InputError for anything else.
        """
        return _scaled(box, self.units, self.upright_size)

    def to_model(self, box: Sequence[float]) -> tuple[float, ...]:
        """The other way: as the model would write it, in whole units unless these are fractions."""
        values = _scaled(box, self.upright_size, self.units)
        if self.coordinates is Coordinates.FRACTIONS:
            return values
        return tuple(round(value) for value in values)

    def __str__(self) -> str:
        """One line."""
        sizes = f"{_times(self.source_size)}{self.turn and f', {self.turn},'} -> "
        frames = f"{self.num_frames} of {self.total_frames} frames, "
        tiles = self.tiles
        cut = f" in {tiles.rows}x{tiles.columns} tiles" if tiles.rows * tiles.columns > 1 else ""
        overview = " and the whole" if tiles.overview else ""
        cap = f" (limit: {self.cap})" if self.cap else ""
        return (
            f"{self.kind}: {frames if self.kind == 'video' else ''}{sizes}"
            f"{_times(self.resized_size)}{cut}{overview}{cap}, "
            f"{self.num_tokens} tokens at {self.start_idx} to {self.end_idx}"
        )


def _scaled(
    box: Sequence[float], whole: tuple[float, float], target: tuple[float, float]
) -> tuple[float, ...]:
    values = list(box) if isinstance(box, Iterable) else []
    good = all(isinstance(value, Real) and abs(value) < FAR for value in values)  # no NaN passes
    if len(values) not in (2, 4) or not good:
        raise InputError(f"box is {shown(box)}; expected the 2 numbers of a point or 4 of a box")
    return tuple(value * target[i % 2] / whole[i % 2] for i, value in enumerate(values))


def _times(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
