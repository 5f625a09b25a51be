"""Image file → 8-bit RGB tiles. Whatever a file holds, the answer is pixels or one `ImageError` that says what is wrong."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from configs.errors import UserError

MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb
MAX_SIDE = 20_000
SVG_WIDTH = 256
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\x00", b"MM\x00*")  # JPEG, PNG, GIF, WebP, TIFF


class ImageError(UserError):
    """An image that cannot be used; `reason` is a short word for counting."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def open_image(source: str | Path | bytes | Image.Image | None) -> Image.Image:
    """A path, encoded bytes or a Pillow image → an upright RGB image; the first frame of an animation.

    Transparency is laid on white, 16-bit and float grey are scaled to 8 bits. Errors: `ImageError`.
    """
    where = str(source) if isinstance(source, str | Path) else "image"
    if not isinstance(source, str | Path | bytes | Image.Image):
        raise ImageError("missing", f"{where} is {source!r}")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        if isinstance(source, str | Path) and not Path(source).is_file():
            kind = "is a folder, not an image" if Path(source).is_dir() else "does not exist"
            raise ImageError("missing", f"{where} {kind}")
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        if not data:
            raise ImageError("empty", f"{where} is empty (0 bytes)")
        if b"<svg" in data[:2000]:
            data = _draw(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked below, before decoding; what cannot be decoded raises
            image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise ImageError("too_large", f"{where} is {width}×{height} pixels: more than {MAX_PIXELS:,} pixels or a side above {MAX_SIDE:,}")
        image.load()
        return _to_rgb(image)
    except UnidentifiedImageError:
        if data.startswith(SIGNATURES):
            raise ImageError("damaged", f"{where} begins like an image but cannot be decoded: cut short or damaged") from None
        raise ImageError("not_an_image", f"{where} is not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise ImageError("too_large", f"{where} has more than {MAX_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise for damaged files
        raise ImageError("damaged", f"{where} cannot be decoded: {error}") from None


def _draw(svg: bytes) -> bytes:
    """SVG → PNG bytes on white, `SVG_WIDTH` pixels wide. Nothing outside the file is read."""
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise UserError("drawing an SVG needs the package resvg-py (pip install resvg-py)") from None
    return bytes(resvg_py.svg_to_bytes(svg_string=svg.decode("utf-8"), width=SVG_WIDTH, background="white", skip_system_fonts=True))


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
        if image.mode == "F":
            span = float(np.ptp(grey)) or 1.0
            grey = (grey - grey.min()) * (65535.0 / span)
        image = Image.fromarray((grey / 257.0).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def to_tiles(image: Image.Image, image_size: int) -> Tensor:
    """RGB image → tiles (1, 3, image_size, image_size) uint8: one square, the aspect ratio given up."""
    square = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]  # (1, 3, h, w)
