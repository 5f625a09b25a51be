"""Filters: turns by rating and length, and duplicate images. Every drop is counted under a reason."""

from itertools import islice
from typing import Any

import numpy as np

from configs.train import FilterConfig
from data.images import open_image

RATINGS = ("relevance", "visual_dependency", "image_correspondence", "formatting")  # FineVision's, 1 to 5
BITS = 384
MAX_DISTANCE = 7  # differing bits up to which two images count as the same
BAND_BITS = BITS // (MAX_DISTANCE + 1)
NOISE = 2  # levels of 255


def turn_problem(turn: dict[str, Any], filters: FilterConfig) -> str | None:
    """Return the reason to drop a turn, or None.

    Reasons: a missing half, a rating below its minimum, a length (in characters) out of bounds.
    """
    user, assistant = turn.get("user"), turn.get("assistant")
    if not (isinstance(user, str) and isinstance(assistant, str) and user.strip() and assistant.strip()):
        return "empty_text"
    for name in RATINGS:
        minimum, rating = getattr(filters, f"min_{name}"), (turn.get("ratings") or {}).get(name)
        if minimum and isinstance(rating, int | float) and rating < minimum:
            return f"rating_{name}"
    for text, name in ((user, "question"), (assistant, "answer")):
        if len(text) < getattr(filters, f"min_{name}"):
            return f"short_{name}"
        if len(text) > (getattr(filters, f"max_{name}") or len(text)):
            return f"long_{name}"
    return None


def image_hash(image: Any) -> int:
    """Return a perceptual hash of 384 bits. Errors: `ImageError`.

    The same picture, scaled or compressed again, differs in few bits. Per colour channel, 64 bits say where
    an 8 × 8 thumbnail grows lighter from a cell to its right neighbour (Krawetz's dHash; `NOISE` levels are
    ignored), and 64 bits encode the mean.
    """
    thumbnail = np.asarray(open_image(image).resize((9, 8)), dtype=np.int16)  # (8, 9, 3)
    lighter = thumbnail[:, 1:] - thumbnail[:, :-1] > NOISE
    mean = thumbnail.mean((0, 1))[:, None] > np.arange(2, 256, 4)  # (3, 64)
    return int.from_bytes(np.packbits(np.concatenate([lighter.ravel(), mean.ravel()])).tobytes(), "big")


class DuplicateImages:
    """Maps the image hashes of a record to the first record that used them, its owner.

    Two hashes that differ in at most `MAX_DISTANCE` bits agree in at least one of `MAX_DISTANCE` + 1 bands.
    Only hashes that share a band are compared.
    """

    def __init__(self) -> None:
        self.owners: dict[tuple[int, ...], tuple[int, int]] = {}
        self.bands: dict[tuple[int, int, int], list[tuple[int, ...]]] = {}

    def seen(self, images: list[Any], owner: tuple[int, int]) -> bool:
        """Return whether another owner has these images; else register `owner`. Errors: `ImageError`."""
        hashes = tuple(map(image_hash, images))
        for key in self._keys(hashes):
            for other in self.bands.get(key, ()):
                if self.owners[other] != owner and all(
                    (a ^ b).bit_count() <= MAX_DISTANCE for a, b in zip(hashes, other, strict=True)
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
        """Return the first `count` entries as plain JSON for `load`."""
        return [[*map(hex, hashes), *owner] for hashes, owner in islice(self.owners.items(), count)]

    def load(self, images: list[list[Any]]) -> None:
        for *hashes, source, record in images:
            self.add(tuple(int(h, 16) for h in hashes), (source, record))

    def _keys(self, hashes: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """Bucket keys: the number of images, and each band of the first image's hash."""
        mask = (1 << BAND_BITS) - 1
        return [
            (len(hashes), band, (hashes[0] >> band * BAND_BITS) & mask) for band in range(MAX_DISTANCE + 1)
        ]
