"""Pictures of coloured shapes: how they are sampled, drawn and described. numpy and Pillow only.

Lengths are in units: a square picture is 64 units wide, whatever its size in pixels.
The rules (colours, radii, places) are those of the README beside this file.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64.0
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (235, 210, 40),
    "purple": (140, 40, 170),
    "orange": (240, 140, 30),
    "black": (10, 10, 10),
}
SHAPES = ("circle", "square", "triangle", "star")
RADII = {"small": (5.0, 7.0), "large": (11.0, 13.0)}
RELATIONS = ("above", "left of")
FIRST_BAND, SECOND_BAND, FREE_BAND = (14.0, 17.0), (47.0, 50.0), (16.0, 48.0)
UNLABELLED = -100
MAX_DRIFT = 28.0  # two shapes differ less than this across their relation, or it would be unclear


@dataclass(frozen=True)
class Thing:
    """One shape: centre (x, y) and radius in units."""

    shape: str
    colour: str
    size: str
    radius: float
    centre: tuple[float, float]

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One or two things on a light background (RGB, 0 to 255); extent is width, height in units."""

    things: tuple[Thing, ...]
    relation: str | None
    background: tuple[int, int, int]
    extent: tuple[float, float] = (SIDE, SIDE)

    @property
    def caption(self) -> str:
        if self.relation is None:
            return self.things[0].caption
        return f"{self.things[0].caption} {self.relation} {self.things[1].caption}"


@dataclass(frozen=True)
class Proportions:
    """Shapes in multiples of the radius. The defaults are the rule; training also varies them."""

    square_half: float = 1.0
    triangle_half_width: float = 1.0
    triangle_bottom: float = 1.0
    star_inner: float = 0.4


@dataclass(frozen=True)
class Mix:
    """How often things occur. EVEN is the task; training may look more often at what is hard."""

    small: float = 0.5  # share of the shapes
    single: float = 1 / 3  # share of the pictures
    ask: str = "all"  # "captions": descriptions only; "colours": colours of whatever can be asked
    tiled: float = 2 / 3  # share of InternVL's batches with pictures of several tiles


EVEN = Mix()


def pick(rng: np.random.Generator, options):
    """One of a sequence, as the Python object it is."""
    return options[int(rng.integers(len(options)))]


def sample_thing(rng: np.random.Generator, centre: tuple[float, float], mix: Mix = EVEN) -> Thing:
    """A random shape, colour and size at a given centre."""
    size = "small" if rng.random() < mix.small else "large"
    radius = float(rng.uniform(*RADII[size]))
    return Thing(pick(rng, SHAPES), pick(rng, tuple(COLOURS)), size, radius, centre)


def sample_background(rng: np.random.Generator) -> tuple[int, int, int]:
    """A light colour, each channel 200 to 255."""
    red, green, blue = (int(v) for v in rng.integers(200, 256, 3))
    return red, green, blue


def _free(rng: np.random.Generator, length: float) -> float:
    return float(rng.uniform(FREE_BAND[0], length - FREE_BAND[0]))


def _banded(rng: np.random.Generator, band: tuple[float, float], length: float) -> float:
    return float(rng.uniform(*band)) * length / SIDE


def sample_single(
    rng: np.random.Generator, extent: tuple[float, float] = (SIDE, SIDE), mix: Mix = EVEN
) -> Scene:
    """One thing, its centre at least 16 units from every edge."""
    centre = (_free(rng, extent[0]), _free(rng, extent[1]))
    return Scene((sample_thing(rng, centre, mix),), None, sample_background(rng), extent)


def sample_pair(
    rng: np.random.Generator, extent: tuple[float, float] = (SIDE, SIDE), mix: Mix = EVEN
) -> Scene:
    """Two things, the first above or left of the second, along a side of at least 64 units."""
    along = pick(rng, tuple(axis for axis in (1, 0) if extent[axis] >= SIDE))
    relation = RELATIONS[0] if along == 1 else RELATIONS[1]
    ends = [_banded(rng, band, extent[along]) for band in (FIRST_BAND, SECOND_BAND)]
    across = extent[1 - along]
    sides = [_free(rng, across), _free(rng, across)]
    while abs(sides[0] - sides[1]) > MAX_DRIFT:
        sides = [_free(rng, across), _free(rng, across)]
    centres = zip(sides, ends, strict=True) if along == 1 else zip(ends, sides, strict=True)
    things = tuple(sample_thing(rng, (float(x), float(y)), mix) for x, y in centres)
    return Scene(things, relation, sample_background(rng), extent)


def sample_scene(
    rng: np.random.Generator, extent: tuple[float, float] = (SIDE, SIDE), mix: Mix = EVEN
) -> Scene:
    """One or two things; EVEN: one in a third of the pictures."""
    sample = sample_single if rng.random() < mix.single else sample_pair
    return sample(rng, extent, mix)


def sample_proportions(rng: np.random.Generator) -> Proportions:
    """Mostly the rule; sometimes shapes that other people would draw."""
    if rng.random() < 0.6:
        return Proportions()
    return Proportions(
        square_half=float(rng.uniform(0.85, 1.0)),
        triangle_half_width=float(rng.uniform(0.85, 1.0)),
        triangle_bottom=float(rng.uniform(0.5, 1.0)),
        star_inner=float(rng.uniform(0.36, 0.46)),
    )


def outline(thing: Thing, proportions: Proportions) -> list[tuple[float, float]]:
    """Corners of a thing that has corners, in units."""
    (x, y), r = thing.centre, thing.radius
    if thing.shape == "square":
        half = r * proportions.square_half
        return [
            (x - half, y - half),
            (x + half, y - half),
            (x + half, y + half),
            (x - half, y + half),
        ]
    if thing.shape == "triangle":
        half, bottom = r * proportions.triangle_half_width, y + r * proportions.triangle_bottom
        return [(x, y - r), (x + half, bottom), (x - half, bottom)]
    radii = (r, r * proportions.star_inner)
    angles = [-math.pi / 2 + i * math.pi / 5 for i in range(10)]
    return [
        (x + radii[i % 2] * math.cos(a), y + radii[i % 2] * math.sin(a))
        for i, a in enumerate(angles)
    ]


def draw_scene(
    scene: Scene,
    side_px: int = 64,
    proportions: Proportions | None = None,
    oversampling: int = 1,
) -> Image.Image:
    """The picture of a scene, RGB, with side_px pixels for 64 units.

    oversampling above 1 draws that many times larger and averages, which smooths the edges.
    """
    proportions = proportions or Proportions()
    scale = side_px * oversampling / SIDE
    width, height = (round(length * side_px / SIDE) for length in scene.extent)
    picture = Image.new("RGB", (width * oversampling, height * oversampling), scene.background)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        colour = COLOURS[thing.colour]
        if thing.shape == "circle":
            (x, y), r = thing.centre, thing.radius
            box = ((x - r) * scale, (y - r) * scale, (x + r) * scale, (y + r) * scale)
            pen.ellipse(box, fill=colour)
        else:
            corners = outline(thing, proportions)
            pen.polygon([(px * scale, py * scale) for px, py in corners], fill=colour)
    return picture.reduce(oversampling) if oversampling > 1 else picture


def cell_labels(scene: Scene | None, rows: int, columns: int) -> np.ndarray:
    """What stands in each cell of a grid over the picture: [rows * columns, 3] int64.

    Columns are the indexes of shape (len(SHAPES): nothing there), colour and size; UNLABELLED
    where there is no answer. A thing stands in the cell of its centre and in cells whose centre
    lies within its radius.
    """
    if scene is None:
        return np.full((rows * columns, 3), UNLABELLED)
    labels = np.full((rows, columns, 3), UNLABELLED)
    labels[..., 0] = len(SHAPES)
    width, height = scene.extent[0] / columns, scene.extent[1] / rows
    x, y = (np.arange(columns) + 0.5) * width, (np.arange(rows) + 0.5) * height
    for thing in scene.things:
        across = np.abs(x - thing.centre[0]) < max(width / 2, thing.radius)
        down = np.abs(y - thing.centre[1]) < max(height / 2, thing.radius)
        kinds = (SHAPES.index(thing.shape), tuple(COLOURS).index(thing.colour))
        labels[np.ix_(down, across)] = (*kinds, tuple(RADII).index(thing.size))
    return labels.reshape(-1, 3)
