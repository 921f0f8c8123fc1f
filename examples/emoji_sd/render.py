"""The data: which emoji there are, what they are called, and how a picture with a caption is drawn from them.

Concepts, colours and templates are data at the top of this file.  A picture is a 64x64 RGB array, drawn from a numpy
random generator alone, so a seed fixes it.  The sprites are the Fluent 3D emoji of Microsoft (MIT licence), as the npm
package `@lobehub/fluent-emoji-3d` 1.1.0 has them; short names are ours, after those of the PyPI package `emoji`.
"""

import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
PACKAGE_URL = "https://registry.npmjs.org/@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz"

# category: "name:file ..."; a category is a class noun that the captions use too ("a bird on a red background").
TRAINED = {
    "food": "coffee:2615 pizza:1f355 hamburger:1f354 hotdog:1f32d fries:1f35f doughnut:1f369 cookie:1f36a "
    "ice_cream:1f366 lollipop:1f36d popcorn:1f37f croissant:1f950 cheese:1f9c0 egg:1f95a pretzel:1f968 sushi:1f363 "
    "wine_glass:1f377 beer:1f37a honey:1f36f",
    "fruit": "avocado:1f951 carrot:1f955 broccoli:1f966 eggplant:1f346 tomato:1f345 corn:1f33d pepper:1f336-fe0f "
    "apple:1f34e banana:1f34c grapes:1f347 watermelon:1f349 lemon:1f34b tangerine:1f34a strawberry:1f353 "
    "cherries:1f352 pineapple:1f34d peach:1f351 pear:1f350 kiwi:1f95d coconut:1f965",
    "animal": "cat:1f431 rabbit:1f430 fox:1f98a bear:1f43b panda:1f43c koala:1f428 tiger:1f42f lion:1f981 "
    "cow:1f42e pig:1f437 frog:1f438 horse:1f434 bee:1f41d butterfly:1f98b snail:1f40c ladybug:1f41e turtle:1f422 "
    "octopus:1f419 crab:1f980 fish:1f41f dolphin:1f42c whale:1f40b elephant:1f418 giraffe:1f992 zebra:1f993 "
    "dinosaur:1f996 jellyfish:1fabc",
    "bird": "penguin:1f427 chick:1f424 parrot:1f99c flamingo:1f9a9",
    "plant": "cactus:1f335 palm_tree:1f334 pine:1f332 tree:1f333 tulip:1f337 sunflower:1f33b clover:1f340 "
    "leaf:1f341 blossom:1f338",
    "vehicle": "rocket:1f680 airplane:2708-fe0f helicopter:1f681 car:1f697 bus:1f68c fire_truck:1f692 "
    "tractor:1f69c bicycle:1f6b2 sailboat:26f5 train:1f682 ufo:1f6f8",
    "building": "house:1f3e0 castle:1f3f0 tent:26fa volcano:1f30b church:26ea ferris_wheel:1f3a1",
    "toy": "football:26bd basketball:1f3c0 rugby_ball:1f3c8 dice:1f3b2 balloon:1f388 gamepad:1f3ae gift:1f381 "
    "puzzle:1f9e9",
    "instrument": "violin:1f3bb trumpet:1f3ba drum:1f941 saxophone:1f3b7 maracas:1fa87",
    "shoe": "sneaker:1f45f heel:1f460",
    "bag": "handbag:1f45c briefcase:1f4bc suitcase:1f9f3",
    "clothes": "crown:1f451 top_hat:1f3a9 glasses:1f453 shirt:1f455 dress:1f457",
    "tool": "hammer:1f528 scissors:2702-fe0f axe:1fa93 screwdriver:1fa9b key:1f511 pencil:270f-fe0f umbrella:2602-fe0f",
    "object": "sun:2600-fe0f moon:1f319 star:2b50 rainbow:1f308 fire:1f525 heart:2764-fe0f diamond:1f48e bomb:1f4a3 "
    "lamp:1f4a1 candle:1f56f-fe0f camera:1f4f7 tv:1f4fa clock:23f0 lock:1f512 magnet:1f9f2 chair:1fa91 bucket:1faa3 "
    "bell:1f514 trophy:1f3c6 anchor:2693",
    "monster": "alien:1f47d invader:1f47e skull:1f480 pumpkin:1f383",
}

# Held out of the generator's training altogether: the DreamBooth subjects.
HELD_OUT = {
    "animal": "dog:1f436 unicorn:1f984",
    "bird": "duck:1f986 owl:1f989",
    "toy": "teddy_bear:1f9f8 robot:1f916 snowman:26c4",
    "monster": "ghost:1f47b",
    "instrument": "guitar:1f3b8",
    "shoe": "boot:1f97e",
    "bag": "backpack:1f392",
    "plant": "mushroom:1f344 potted_plant:1fab4",
    "food": "cupcake:1f9c1",
    "object": "teapot:1fad6",
}

# The half of TRAINED that the shipped pipeline draws: few concepts learned well.  The autoencoder sees them all.
DRAWN = (
    "pizza hamburger fries doughnut cookie ice_cream croissant carrot eggplant tomato corn apple banana grapes "
    "watermelon lemon strawberry cherries pineapple pear avocado cat rabbit fox bear panda koala tiger lion pig "
    "frog octopus fish elephant penguin chick parrot flamingo cactus palm_tree tree tulip sunflower rocket car "
    "bus sailboat house castle football basketball dice balloon violin drum sneaker heel handbag suitcase crown "
    "top_hat shirt hammer key umbrella sun moon star heart diamond bomb camera alien skull pumpkin"
)

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (250, 222, 60),
    "green": (60, 160, 60),
    "teal": (20, 150, 150),
    "blue": (40, 80, 210),
    "purple": (125, 50, 170),
    "pink": (250, 160, 195),
    "brown": (120, 75, 40),
    "gray": (140, 140, 140),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}


def _parse(table: dict[str, str]) -> dict[str, tuple[str, str]]:
    pairs = [(item.split(":"), category) for category, items in table.items() for item in items.split()]
    return {name.replace("_", " "): (file, category) for (name, file), category in pairs}


TRAINED_CONCEPTS = _parse(TRAINED)  # name -> (file stem, category)
HELD_OUT_CONCEPTS = _parse(HELD_OUT)
DRAWN_CONCEPTS = {n: TRAINED_CONCEPTS[n] for n in (word.replace("_", " ") for word in DRAWN.split())}
CONCEPTS = TRAINED_CONCEPTS | HELD_OUT_CONCEPTS
CATEGORIES = list(TRAINED)
PLURALS = {n: n if n.endswith("s") else n + "s" for n in CONCEPTS} | {
    "bus": "buses", "wine glass": "wine glasses", "cactus": "cactuses", "octopus": "octopuses", "dress": "dresses",
    "peach": "peaches", "strawberry": "strawberries", "leaf": "leaves", "church": "churches", "fox": "foxes",
    "butterfly": "butterflies", "fish": "fish",
}  # fmt: skip
LAYOUTS = ("centre", "large", "small", "left", "right", "two")
TEMPLATES = ("{}", "{}", "a photo of {}", "a picture of {}")


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def sprite_of_file(package: tarfile.TarFile, file: str, size: int = 128) -> Image.Image:
    """A picture of an open npm package, cropped to what is not transparent, its longer side `size`."""
    image = Image.open(package.extractfile(f"package/assets/{file}.webp")).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = size / max(image.size)
    return image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.LANCZOS)


def load_sprites(package: Path, names=None) -> dict[str, Image.Image]:
    """All sprites of the npm package at path `package` (a .tgz)."""
    if not Path(package).is_file():
        raise FileNotFoundError(f"{package}: no such file; get it with `npm pack @lobehub/fluent-emoji-3d@1.1.0`")
    with tarfile.open(package) as tar:
        return {name: sprite_of_file(tar, CONCEPTS[name][0]) for name in names or CONCEPTS}


def background(rng: np.random.Generator, colour: str, style: str, size: int = SIZE) -> Image.Image:
    """A background of a named colour: "plain", or "gradient" or "striped" between two shades of it."""
    base = np.clip(np.array(COLOURS[colour], float) + rng.normal(0, 4, 3), 0, 255)
    other = base * 0.78 if base.mean() > 60 else base * 0.6 + 0.4 * 70  # a darker shade, or a lighter one of black
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    along = np.cos(angle) * x + np.sin(angle) * y
    if style == "plain":
        mix = np.zeros((size, size))
    elif style == "gradient":
        mix = np.clip(along + 0.5, 0, 1)
    elif style == "striped":
        mix = np.clip(0.5 + 4 * np.sin(along * 2 * np.pi * rng.uniform(3, 5)), 0, 1) * 0.8
    else:
        raise ValueError(f"background style {style!r}: not plain, gradient or striped")
    image = base + mix[..., None] * (other - base)
    return Image.fromarray(image.round().astype(np.uint8))


def paste(canvas: Image.Image, sprite: Image.Image, centre, side: float, angle: float, flip: bool) -> None:
    """Draw a sprite with its longer side `side`, turned by `angle` degrees about its `centre`, kept on the canvas."""
    if flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # premultiplied alpha ("RGBa") keeps transparent pixels from bleeding in while turning and scaling
    sprite = sprite.convert("RGBa").rotate(angle, Image.Resampling.BICUBIC, expand=True)
    scale = side / 128
    size = [max(1, min(canvas.width, round(s * scale))) for s in sprite.size]
    sprite = sprite.resize(size, Image.Resampling.BOX).convert("RGBA")
    corner = [round(min(max(c - s / 2, 0), limit - s)) for c, s, limit in zip(centre, size, canvas.size, strict=True)]
    canvas.paste(sprite, corner, sprite)


def draw(sprites, rng, name, colour, style="plain", layout="centre", size=SIZE) -> np.ndarray:
    """One picture.  `layout`: centre, left, right, small, large, two."""
    canvas = background(rng, colour, style, size)
    unit = size / 64

    def put(x, y, side, turn=12):
        x, y = x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)
        angle, flip = rng.uniform(-turn, turn), rng.random() < 0.5
        paste(canvas, sprites[name], (x * unit, y * unit), side * unit, angle, flip)

    if layout == "centre":
        put(32, 32, rng.uniform(40, 52))
    elif layout == "large":
        put(32, 32, rng.uniform(54, 58))
    elif layout == "small":
        put(32 + rng.uniform(-8, 8), 32 + rng.uniform(-8, 8), rng.uniform(24, 30))
    elif layout in ("left", "right"):
        put(19 if layout == "left" else 45, 32 + rng.uniform(-6, 6), rng.uniform(31, 36))
    elif layout == "two":
        side = rng.uniform(28, 30)
        put(16, 32 + rng.uniform(-6, 6), side)
        put(48, 32 + rng.uniform(-6, 6), side)
    else:
        raise ValueError(f"layout {layout!r} is unknown")
    return np.asarray(canvas)


def caption(rng, name, colour, style="plain", layout="centre", category=None) -> str:
    """What `draw` with the same arguments drew, in words; some captions leave the colour or the exact noun out."""
    noun = category if category and rng.random() < 0.06 else name
    if layout == "two":
        thing = "two " + (PLURALS[name] if noun == name else noun + "s")
    else:
        thing = article(f"{layout} {noun}" if layout in ("small", "large") else noun)
    if rng.random() < 0.92:
        thing += f" on {article(colour if style == 'plain' else f'{style} {colour}')} background"
    if layout in ("left", "right"):
        thing += f" on the {layout}"
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(thing)


def random_scene(rng, names) -> dict:
    """The arguments of `draw` and `caption` for a random picture."""
    return {
        "name": names[rng.integers(len(names))],
        "colour": list(COLOURS)[rng.integers(len(COLOURS))],
        "style": str(rng.choice(["plain", "gradient", "striped"], p=[0.7, 0.15, 0.15])),
        "layout": str(rng.choice(LAYOUTS, p=[0.6, 0.1, 0.1, 0.06, 0.06, 0.08])),
    }


def render(sprites, seed: int, count: int, names) -> tuple[np.ndarray, list[str], list[dict]]:
    """`count` random pictures (uint8, N x 64 x 64 x 3) of the concepts `names`, their captions and scenes."""
    rng = np.random.default_rng(seed)
    images, captions, scenes = np.empty((count, SIZE, SIZE, 3), np.uint8), [], []
    for i in range(count):
        scene = random_scene(rng, names)
        images[i] = draw(sprites, rng, **scene)
        captions.append(caption(rng, **scene, category=CONCEPTS[scene["name"]][1]))
        scenes.append(scene)
    return images, captions, scenes
