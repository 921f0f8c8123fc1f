"""Draw the DreamBooth subjects: five pictures of each held-out emoji, on different backgrounds and in different poses.

python -m examples.emoji_sd.subjects PACKAGE.tgz
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from .render import COLOURS, HELD_OUT_CONCEPTS, draw, load_sprites

SUBJECTS = Path(__file__).resolve().parent.parent / "assets" / "subjects"
POSES = [("plain", "centre"), ("plain", "large"), ("gradient", "centre"), ("striped", "centre"), ("plain", "small")]


def write_subjects(package: Path, folder: Path = SUBJECTS) -> None:
    sprites = load_sprites(package, HELD_OUT_CONCEPTS)
    index = {}
    for number, (name, (_, category)) in enumerate(HELD_OUT_CONCEPTS.items()):
        rng = np.random.default_rng(1000 + number)
        colours = rng.permutation(list(COLOURS))[: len(POSES)]
        key = name.replace(" ", "_")
        path = folder / key / "input"
        path.mkdir(parents=True, exist_ok=True)
        for i, (colour, (style, layout)) in enumerate(zip(colours, POSES, strict=True)):
            Image.fromarray(draw(sprites, rng, name, str(colour), style, layout)).save(path / f"{i:02d}.png")
        index[key] = {"class_noun": category, "concept": name, "colours": [str(c) for c in colours]}
    (folder / "subjects.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    write_subjects(parser.parse_args().package)
