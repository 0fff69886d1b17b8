"""Draw the pictures and the clip in examples/images.

python -m tools.train_tiny.draw_examples [--out examples/images]
"""

import argparse
from pathlib import Path

import numpy as np

from .shapes import Scene, Thing, draw_scene

SIDE_PX, OVERSAMPLING = 256, 2
FRAMES, FRAME_MS, CLIP_PX = 8, 500, 128
CREAM, SKY, ROSE, MINT = (250, 246, 232), (224, 238, 252), (252, 232, 236), (228, 246, 230)

SCENES = {
    "shapes": Scene(
        (
            Thing("circle", "red", "large", 12.0, (30.0, 15.5)),
            Thing("square", "blue", "small", 6.0, (38.0, 48.5)),
        ),
        "above",
        CREAM,
    ),
    "red_circle": Scene((Thing("circle", "red", "large", 12.0, (30.0, 34.0)),), None, SKY),
    "black_circle": Scene((Thing("circle", "black", "small", 6.0, (40.0, 26.0)),), None, MINT),
    "green_star": Scene((Thing("star", "green", "large", 12.5, (32.0, 30.0)),), None, ROSE),
    "star_and_triangle": Scene(
        (
            Thing("star", "purple", "small", 6.5, (16.0, 38.0)),
            Thing("triangle", "yellow", "large", 12.0, (48.0, 28.0)),
        ),
        "left of",
        SKY,
    ),
    "wide": Scene(
        (
            Thing("square", "orange", "large", 12.0, (31.0, 30.0)),
            Thing("triangle", "green", "small", 6.5, (97.0, 36.0)),
        ),
        "left of",
        MINT,
        (128.0, 64.0),
    ),
}


def moving_circle() -> list:
    """Frames of a red circle that moves right."""
    things = [
        Thing("circle", "red", "large", 11.5, (float(x), 34.0)) for x in np.linspace(16, 48, FRAMES)
    ]
    return [draw_scene(Scene((thing,), None, CREAM), CLIP_PX) for thing in things]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("examples/images"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, scene in SCENES.items():
        picture = draw_scene(scene, SIDE_PX, oversampling=OVERSAMPLING)
        picture.save(args.out / f"{name}.png", optimize=True)
        print(f"{name}.png  {picture.width}x{picture.height}  {scene.caption}")
    first, *rest = moving_circle()
    first.save(
        args.out / "moving_circle.gif",
        save_all=True,
        append_images=rest,
        duration=FRAME_MS,
        loop=0,
    )
    print("moving_circle.gif  the red circle moves right")


if __name__ == "__main__":
    main()
