"""What the models are asked: pictures, clips, questions and answers. numpy and Pillow only.

Every task is a function of a seeded generator that returns a Case; training and evaluation use
the same functions with different seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from PIL import Image

from .shapes import (
    COLOURS,
    EVEN,
    RADII,
    RELATIONS,
    SHAPES,
    SIDE,
    Mix,
    Scene,
    Thing,
    draw_scene,
    pick,
    sample_background,
    sample_proportions,
    sample_scene,
    sample_single,
    sample_thing,
)

DESCRIBE = "Describe the picture."
OTHER_DESCRIBE = (
    "Describe this picture.",
    "Describe the image.",
    "Describe this image.",
    "What is in the picture?",
    "What is in this picture?",
    "What is in this image?",
    "What do you see?",
)
HOW_MANY = "How many shapes are there?"
NUMBERS = ("one", "two")
CLIP_QUESTIONS = ("What happens?", "What happens in the video?", "Describe the video.")
COMPARE = "Do the pictures show the same shape?"
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
ROLES = ("User:", "Assistant:", "user\n", "assistant\n", "system\n")

EVALUATION_STREAM = 20_000_003  # first word of the seeds of unseen cases
QWEN_CLIP_SHARE = 0.4
PIXTRAL_PAIR_SHARE = 0.3
PIXTRAL_RATIOS = ((1.0, 1.0), (1.0, 1.0), (1.0, 0.7), (0.7, 1.0), (1.0, 0.8), (0.8, 1.0))
INTERNVL_KINDS = (  # pixels for 64 units; width and height: 1, 4, 2, 2 and 6 tiles
    ((64,), (1.0, 1.0)),
    ((96, 128, 192, 256), (1.0, 1.0)),
    ((64, 96, 128), (2.0, 1.0)),
    ((64, 96, 128), (1.0, 2.0)),
    ((128, 160), (1.5, 1.0)),
)

Turn = tuple[str, str]  # question, answer


@dataclass
class Case:
    """Pictures or one clip, and a conversation about them.

    The media precede the first question, or follow it (OpenAI's order) where media_last is set.
    """

    turns: list[Turn]
    images: list[Image.Image] = field(default_factory=list)
    clip: list[Image.Image] = field(default_factory=list)
    fps: float = 2.0
    scenes: list[Scene] = field(default_factory=list)  # of the pictures, or of the frames
    media_last: bool = False


HARD_CAPTIONS = Mix(small=0.7, single=0.25, ask="captions")
HARD_CHATS = Mix(small=0.65, single=0.25)
HARD_COLOURS = Mix(small=0.65, single=0.0, ask="colours")
MIXES = {  # what a training concentrates on: (share of its batches, mix)
    "even": ((1.0, EVEN),),
    "captions": ((0.6, HARD_CAPTIONS), (0.4, HARD_CHATS)),
    "colours": ((0.3, HARD_CAPTIONS), (0.5, HARD_COLOURS), (0.2, HARD_CHATS)),
}
Task = Callable[[np.random.Generator], Case]


def colour_question(shape: str) -> str:
    """The question for the colour of a shape that occurs once."""
    return f"What color is the {shape}?"


def singles(scene: Scene) -> list[Thing]:
    """The things whose shape occurs once: their colour can be asked."""
    shapes = [thing.shape for thing in scene.things]
    return [thing for thing in scene.things if shapes.count(thing.shape) == 1]


def colour_turns(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """The colour question for a shape that occurs once, if there is one."""
    asked = singles(scene)
    if not asked:
        return []
    thing = pick(rng, asked)
    return [(colour_question(thing.shape), thing.colour)]


def questions_about(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """One question of each kind that the scene answers, in random order."""
    ask = DESCRIBE if rng.random() < 0.7 else pick(rng, OTHER_DESCRIBE)
    turns = [(ask, scene.caption), (HOW_MANY, NUMBERS[len(scene.things) - 1])]
    turns += colour_turns(scene, rng)
    return [turns[int(i)] for i in rng.permutation(len(turns))]


def conversation_about(scene: Scene, rng: np.random.Generator, mix: Mix = EVEN) -> list[Turn]:
    """Two different questions about a scene; half begin with the description."""
    turns = questions_about(scene, rng)
    if mix.ask == "captions":
        return [turn for turn in turns if turn[1] == scene.caption]
    if mix.ask == "colours":
        asked = [(colour_question(thing.shape), thing.colour) for thing in singles(scene)]
        return [asked[int(i)] for i in rng.permutation(len(asked))] or turns[:1]
    if rng.random() < 0.5:
        turns.sort(key=lambda turn: turn[1] != scene.caption)
    return turns[:2]


def draw_varied(scene: Scene, rng: np.random.Generator, side_px: int) -> Image.Image:
    """A picture as somebody else might draw it: proportions and edge smoothing vary."""
    if rng.random() < 0.5:
        return draw_scene(scene, side_px)
    oversampling = 4 if rng.random() < 0.5 and side_px <= 128 else 1
    return draw_scene(scene, side_px, sample_proportions(rng), oversampling)


def picture_case(
    rng: np.random.Generator,
    sides_px: tuple[int, ...] = (64,),
    ratios: tuple[tuple[float, float], ...] = ((1.0, 1.0),),
    mix: Mix = EVEN,
) -> Case:
    """One picture, one of sides_px pixels for 64 units, width and height 64 times one of ratios."""
    wide, high = pick(rng, ratios)
    scene = sample_scene(rng, (SIDE * wide, SIDE * high), mix)
    picture = draw_varied(scene, rng, pick(rng, sides_px))
    return Case(conversation_about(scene, rng, mix), images=[picture], scenes=[scene])


def comparison_case(
    rng: np.random.Generator, side_px: int = 64, extent: tuple[float, float] = (SIDE, SIDE)
) -> Case:
    """Two pictures of one thing each: is it the same shape?"""
    first, second = sample_single(rng, extent), sample_single(rng, extent)
    if rng.random() < 0.4:  # a quarter of random pairs agree already
        same = replace(second.things[0], shape=first.things[0].shape)
        second = replace(second, things=(same,))
    agree = first.things[0].shape == second.things[0].shape
    pictures = [draw_varied(scene, rng, side_px) for scene in (first, second)]
    answer = "yes" if agree else "no"
    return Case([(COMPARE, answer)], images=pictures, scenes=[first, second])


def clip_case(rng: np.random.Generator, frame_counts: tuple[int, ...] = (4, 6, 8)) -> Case:
    """One thing that moves at least 24 units in a straight line at constant speed."""
    way = pick(rng, tuple(DIRECTIONS))
    thing = sample_thing(rng, (0.0, 0.0))
    start = float(rng.uniform(14.0, 22.0))
    stop = float(rng.uniform(max(42.0, start + 24.0), 50.0))
    across = float(rng.uniform(16.0, 48.0))
    places = np.linspace(start, stop, pick(rng, frame_counts))
    if way in ("left", "up"):
        places = places[::-1]
    background, proportions = sample_background(rng), sample_proportions(rng)
    side_px = pick(rng, (64, 64, 96, 128))
    scenes = []
    for place in places:
        centre = (float(place), across) if DIRECTIONS[way][0] else (across, float(place))
        scenes.append(Scene((replace(thing, centre=centre),), None, background))
    frames = [draw_scene(scene, side_px, proportions) for scene in scenes]
    ask = CLIP_QUESTIONS[0] if rng.random() < 0.7 else pick(rng, CLIP_QUESTIONS)
    fps = pick(rng, (1.0, 2.0, 2.0, 2.0, 4.0))
    answer = f"the {thing.colour} {thing.shape} moves {way}"
    return Case([(ask, answer)], clip=frames, fps=fps, scenes=scenes)


def idefics3_case(rng: np.random.Generator, mix: Mix = EVEN) -> Case:
    """Pictures of many sizes, one in ten a little wider or higher than square."""
    square = rng.random() < 0.9
    ratios = ((1.0, 1.0),) if square else ((1.15, 1.0), (1.0, 1.15), (1.3, 1.0), (1.0, 1.3))
    sides_px = (64, 64, 64, 96, 128, 128, 160, 200, 224, 256, 320)
    return picture_case(rng, sides_px, ratios, mix)


def qwen_picture_case(rng: np.random.Generator, mix: Mix = EVEN) -> Case:
    """Square pictures of many sizes."""
    return picture_case(rng, (64, 64, 64, 96, 128, 200, 256), mix=mix)


def qwen_case(rng: np.random.Generator) -> Case:
    """Clips and square pictures."""
    return clip_case(rng) if rng.random() < QWEN_CLIP_SHARE else qwen_picture_case(rng)


def internvl_case(rng: np.random.Generator, kind: int | None = None, mix: Mix = EVEN) -> Case:
    """Pictures of one tile, or of 2, 4 or 6 tiles and a thumbnail; kind indexes INTERNVL_KINDS."""
    sides_px, ratio = pick(rng, INTERNVL_KINDS) if kind is None else INTERNVL_KINDS[kind]
    return picture_case(rng, sides_px, (ratio,), mix)


def pixtral_cases(rng: np.random.Generator, size: int = 1, mix: Mix = EVEN) -> list[Case]:
    """Pictures of one shape and size in pixels: size of them, or three quarters as many pairs."""
    ratio, side_px = pick(rng, PIXTRAL_RATIOS), pick(rng, (64, 64, 64, 96, 128, 200, 256))
    if rng.random() >= PIXTRAL_PAIR_SHARE:
        return [picture_case(rng, (side_px,), (ratio,), mix) for _ in range(size)]
    extent = (SIDE * ratio[0], SIDE * ratio[1])
    return [comparison_case(rng, side_px, extent) for _ in range(max(1, size * 3 // 4))]


TASKS: dict[str, Task] = {  # by model_type of config.json
    "idefics3": idefics3_case,
    "qwen2_5_vl": qwen_case,
    "internvl": internvl_case,
    "llava": lambda rng: pixtral_cases(rng)[0],
}


def unseen_case(model_type: str, seed: int, index: int, *, media_last: bool = False) -> Case:
    """Case number index of an evaluation; no training draws from these generators.

    The last turn is the one to answer, after the true answers of the turns before it.
    """
    rng = np.random.default_rng((EVALUATION_STREAM, seed, index))
    case = TASKS[model_type](rng)
    turns = case.turns[: int(rng.integers(1, len(case.turns) + 1))]
    return replace(case, turns=turns, media_last=media_last)


def messages_of(case: Case) -> list[dict]:
    """The chat up to the last question in Hugging Face's content-list form."""
    media = [{"type": "image"} for _ in case.images] + [{"type": "video"}] * bool(case.clip)
    messages = []
    for question, answer in case.turns:
        text = [{"type": "text", "text": question}]
        content = text + media if case.media_last else media + text
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        media = []
    return messages[:-1]


def corpus() -> list[str]:
    """Every kind of sentence of the tasks, for the tokenizer."""
    things = [
        f"a {size} {colour} {shape}" for size in RADII for colour in COLOURS for shape in SHAPES
    ]
    moves = product(COLOURS, SHAPES, DIRECTIONS)
    lines = [DESCRIBE, HOW_MANY, *OTHER_DESCRIBE]
    lines += [colour_question(shape) for shape in SHAPES]
    lines += [f" {first} {relation} {first}" for first in things for relation in RELATIONS]
    lines += [f"{thing} {word}" for thing in things for word in NUMBERS]
    lines += [
        *ROLES,
        *CLIP_QUESTIONS,
        COMPARE,
        "yes no first second",
        "You are a helpful assistant.",
    ]
    lines += [f"the {colour} {shape} moves {way}" for colour, shape, way in moves]
    return lines * 4
