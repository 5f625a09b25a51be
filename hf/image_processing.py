"""Images for `transformers.AutoImageProcessor` → the tiles of the model."""

import urllib.request
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from configs.model import VisionConfig
from configs.serialization import from_dict
from data.conversations import plain_image
from data.images import Tiles, data_url, decode, orientation_of, pixels_of, to_rgb, to_tiles
from hf.configuration import InputError
from utils.errors import ImageError

TIMEOUT_S = 30


class DualTowerImageProcessor(BaseImageProcessor):
    """Resizes images and splits them into tiles. `vision` is a `VisionConfig` as a dictionary."""

    model_input_names = ["pixel_values"]  # noqa: RUF012  # as in transformers

    def __init__(self, vision: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vision = vision or {}
        from_dict(VisionConfig, self.vision, "image processor: vision")  # raises UsageError for a wrong one

    def __call__(self, images: Any, return_tensors: str | None = None, **options: Any) -> BatchFeature:
        """Images, or lists of them → `pixel_values` (N, 3, h, w) uint8, and the tiles of each, `num_patches`.

        An image is a path, a URL (`data:` too), bytes or a Pillow image. Errors: `ImageError`; `InputError`
        for options: tiles follow from the model (`crop_to_patches=True` asks for what is done anyway).
        """
        if unknown := [name for name, value in options.items() if (name, value) != ("crop_to_patches", True)]:
            raise InputError(f"image processor: the argument {unknown[0]} is not supported")
        tiles = [self.tiles(image) for image in _flat(images)]
        counts = torch.tensor([len(image.pixels) for image in tiles], dtype=torch.int64)
        data = {"pixel_values": self.stack(tiles), "num_patches": counts}
        return BatchFeature(data, tensor_type=return_tensors)

    def tiles(self, image: Any) -> Tiles:
        config = from_dict(VisionConfig, self.vision, "image processor: vision")
        return to_tiles(pixels_of(_opened(image)), config)

    def stack(self, tiles: list[Tiles]) -> torch.Tensor:
        """(N, 3, h, w) uint8, the tiles of all images."""
        side = self.vision["image_size"]
        return torch.cat([torch.empty(0, 3, side, side, dtype=torch.uint8), *(t.pixels for t in tiles)])


def _flat(images: Any) -> list[Any]:
    if not isinstance(images, list | tuple):
        return [] if images is None else [images]
    return [image for part in images for image in _flat(part)]


def _opened(image: Any) -> Image.Image:
    """A path, URL, bytes or Pillow image → an upright RGB image. Errors: `ImageError`."""
    image = plain_image(image)
    name = image if isinstance(image, str) and len(image) <= 300 else "image"
    try:
        if isinstance(image, Image.Image):
            if not image.width or not image.height:
                raise ImageError("empty", f"{name} has no pixels")
            return to_rgb(image, orientation_of(image))
        image = data_url(image)
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            with urllib.request.urlopen(image, timeout=TIMEOUT_S) as answer:
                image = answer.read()
        return decode(image if isinstance(image, bytes) else Path(image).read_bytes(), str(name))
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types, and so does the network
        raise ImageError(
            "damaged", f"{name} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
