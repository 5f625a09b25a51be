"""What is left out on purpose: turns by rating and length, images that were seen before. Every drop has a reason that is counted."""

from itertools import islice
from typing import Any

import numpy as np

from configs.train import FilterConfig
from data.images import open_image

RATINGS = ("relevance", "visual_dependency", "image_correspondence", "formatting")  # FineVision's, 1 to 5
BITS = 384
NEAR = 7  # differing bits up to which two images count as the same
WIDTH = BITS // (NEAR + 1)
NOISE = 2  # levels of 255


def turn_problem(turn: dict[str, Any], filters: FilterConfig) -> str | None:
    """Why a turn cannot be used: a missing half, a rating or a length out of bounds (characters); or None."""
    user, assistant = turn.get("user"), turn.get("assistant")
    if not (isinstance(user, str) and isinstance(assistant, str) and user.strip() and assistant.strip()):
        return "empty_text"
    for name in RATINGS:
        least, rating = getattr(filters, f"min_{name}"), (turn.get("ratings") or {}).get(name)
        if least and isinstance(rating, int | float) and rating < least:
            return f"rating_{name}"
    for text, name in ((user, "question"), (assistant, "answer")):
        if len(text) < getattr(filters, f"min_{name}"):
            return f"short_{name}"
        if len(text) > (getattr(filters, f"max_{name}") or len(text)):
            return f"long_{name}"
    return None


def image_hash(image: Any) -> int:
    """384 bits of what an image looks like: the same picture scaled or compressed anew differs in few of them. Errors: `ImageError`.

    Of each colour, where an 8 × 8 thumbnail grows lighter from a cell to its right neighbour (Krawetz's dHash; a few
    levels are noise), and the mean in sixty-four steps.
    """
    thumbnail = np.asarray(open_image(image).resize((9, 8)), dtype=np.int16)  # (8, 9, 3)
    lighter = thumbnail[:, 1:] - thumbnail[:, :-1] > NOISE
    mean = thumbnail.mean((0, 1))[:, None] > np.arange(2, 256, 4)  # (3, 64)
    return int.from_bytes(np.packbits(np.concatenate([lighter.ravel(), mean.ravel()])).tobytes(), "big")


class DuplicateImages:
    """Whose images were seen first. Two hashes that differ in at most `NEAR` bits agree in one of `NEAR` + 1 bands: only those are compared."""

    def __init__(self) -> None:
        self.owners: dict[tuple[int, ...], tuple[int, int]] = {}
        self.bands: dict[tuple[int, int, int], list[tuple[int, ...]]] = {}

    def seen(self, images: list[Any], owner: tuple[int, int]) -> bool:
        """Were these images seen with another owner? Else they are this one's from now on. Errors: `ImageError`."""
        hashes = tuple(map(image_hash, images))
        for key in self._keys(hashes):
            for other in self.bands.get(key, ()):
                if self.owners[other] != owner and all(
                    (a ^ b).bit_count() <= NEAR for a, b in zip(hashes, other, strict=True)
                ):
                    return True
        self.add(hashes, owner)
        return False

    def add(self, hashes: tuple[int, ...], owner: tuple[int, int]) -> None:
        if hashes not in self.owners:
            self.owners[hashes] = owner
            for key in self._keys(hashes):
                self.bands.setdefault(key, []).append(hashes)

    def first(self, count: int) -> list[list[Any]]:
        """The first `count` images, as plain JSON for `load`."""
        return [[*map(hex, hashes), *owner] for hashes, owner in islice(self.owners.items(), count)]

    def load(self, images: list[list[Any]]) -> None:
        for *hashes, source, record in images:
            self.add(tuple(int(h, 16) for h in hashes), (source, record))

    def _keys(self, hashes: tuple[int, ...]) -> list[tuple[int, int, int]]:
        return [(len(hashes), band, hashes[0] >> band * WIDTH & (1 << WIDTH) - 1) for band in range(NEAR + 1)]
