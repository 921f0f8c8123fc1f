"""The tokenizer: CLIP's byte-level BPE, with merges made here so that every caption word is one token.

Any other text falls back to smaller pieces, down to bytes.  `RARE` words are tokens that no caption names a thing with:
identifiers for DreamBooth.
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .render import CATEGORIES, COLOURS, CONCEPTS, PLURALS

LENGTH = 24
RARE = ("sks", "zwx", "qev", "phu", "olis", "vtk", "wug", "xan")
OTHER = (
    "a an the one two three of on in at to and with by near under over left right small large big tiny photo picture "
    "image drawing painting background plain gradient striped floating wearing standing sitting top front behind "
    "beach snow jungle city street wooden floor table water sunset night grass field forest mountain blue house my new"
)


def words() -> list[str]:
    names = [*CONCEPTS, *PLURALS.values(), *COLOURS, *CATEGORIES, *[c + "s" for c in CATEGORIES]]
    return sorted(set(" ".join([*names, *RARE, OTHER]).split()))


def learn_merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding, run until every word of the vocabulary is one token."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges = []
    while True:
        pairs = Counter(pair for word in pieces for pair in pairwise(word))
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json and merges.txt to `folder` and load them."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(words())
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *[c + "</w>" for c in letters], *["".join(m) for m in merges]]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]):
    """Token ids, N x LENGTH."""
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
