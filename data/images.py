"""Image file → 8-bit RGB tiles. Any file gives either pixels or one `ImageError` with the reason."""

import base64
import importlib
import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resize_image

from configs.model import VisionConfig
from data.svg import draw
from utils.errors import ImageError, UserError
from utils.files import POINTER

# A path, encoded bytes, a Pillow image, or a function that draws one.
ImageSource = str | Path | bytes | Image.Image | Callable[[], Image.Image] | None
Grid = tuple[int, int]  # rows and columns of tiles; (1, 1): one square
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb
MAX_SIDE = 20_000
EXIF_ORIENTATION = 0x0112
UPRIGHT = {  # orientation → what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # chunks; the others are metadata
# Formats that Pillow reads with a package: part of the first bytes → name, package, module that registers it.
PLUGINS = {
    b"ftyphei": ("HEIC", "pillow-heif", "pillow_heif"),
    b"ftyphev": ("HEIC", "pillow-heif", "pillow_heif"),
    b"ftypmif1": ("HEIC", "pillow-heif", "pillow_heif"),
    b"ftypavi": ("AVIF", "pillow-heif", "pillow_heif"),
    b"JXL \r\n": ("JPEG XL", "pillow-jxl-plugin", "pillow_jxl"),
    b"\xff\x0a": ("JPEG XL", "pillow-jxl-plugin", "pillow_jxl"),
}
# Of JPEG, PNG, GIF, WebP and TIFF.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\x00", b"MM\x00*")


class Tiles(NamedTuple):
    """A decoded image as the model takes it."""

    grid: Grid
    pixels: Tensor  # (N, 3, h, w) uint8: the whole image in a square, then its parts row by row


def open_image(source: ImageSource) -> Image.Image:
    """Open an image as an upright RGB image.

    Of an animation, the first frame. Transparency is composited on white. Grey of more than 8 bits is scaled
    to 8. Metadata that is damaged is ignored. Errors: `ImageError`.
    """
    context = _name(source)
    source = source() if callable(source) else data_url(source)
    if isinstance(source, str) and source.startswith(("https:", "http:", "ftp:", "s3:", "gs:")):
        raise ImageError("remote", f"{context} is on the web: fetch it first, with img2dataset for example")
    if not isinstance(source, str | Path | bytes | Image.Image):
        raise ImageError(
            "missing", f"{context} is of type {type(source).__name__}, not a path, bytes or a Pillow image"
        )
    try:
        if isinstance(source, Image.Image):
            if not source.width or not source.height:
                raise ImageError("empty", f"{context} has no pixels")
            return to_rgb(source, orientation_of(source))
        if isinstance(source, str | Path) and not Path(source).is_file():
            kind = "is a folder, not an image" if Path(source).is_dir() else "does not exist"
            raise ImageError("missing", f"{context} {kind}")
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        if not data:
            raise ImageError("empty", f"{context} is empty (0 bytes)")
        if b"<svg" in data[:2000] and not data.startswith(SIGNATURES):
            data = draw(data, context)
        try:
            return decode(data, context)
        except (UserError, MemoryError, Image.DecompressionBombError):
            raise
        except Exception:
            if not data.startswith(PNG):
                raise
            return decode(_without_metadata(data), context)  # a damaged or huge chunk of text, say
    except UnidentifiedImageError:
        if data.startswith(POINTER):
            raise ImageError(
                "not_an_image", f"{context} is a git-lfs pointer, not the file itself: run 'git lfs pull'"
            ) from None
        if plugin := _plugin(data):
            name, package, _ = plugin
            raise ImageError(
                "not_an_image", f"{context} is a {name} image: it is read if {package} is installed"
            ) from None
        if data.startswith(SIGNATURES):
            raise ImageError(
                "damaged", f"{context} begins like an image but cannot be decoded: truncated or damaged"
            ) from None
        raise ImageError("not_an_image", f"{context} is not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise ImageError("too_large", f"{context} has more than {MAX_PIXELS:,} pixels") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise ImageError(
            "damaged", f"{context} cannot be decoded: {getattr(error, 'strerror', None) or error}"
        ) from None


def decode(data: bytes, context: str) -> Image.Image:
    if plugin := _plugin(data):
        with suppress(ImportError):
            _register(plugin[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the size is checked below; decoding errors raise
        image = Image.open(io.BytesIO(data))
    width, height = image.size
    _check_size(width, height, context)
    orientation = orientation_of(image)
    image.load()
    return to_rgb(image, orientation)


def _plugin(data: bytes) -> tuple[str, str, str] | None:
    return next((plugin for mark, plugin in PLUGINS.items() if mark in data[:16]), None)


@cache
def _register(module: str) -> None:
    """Teach Pillow a format. Errors: `ImportError`."""
    plugin = importlib.import_module(module)  # pillow_jxl registers itself
    if module == "pillow_heif":
        plugin.register_heif_opener()


def _without_metadata(data: bytes) -> bytes:
    """Return a PNG without chunks that are not needed for its pixels."""
    chunks, start = [data[: len(PNG)]], len(PNG)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        if data[start + 4 : start + 8] in PNG_PIXELS:
            chunks.append(data[start:end])
        start = end
    return b"".join(chunks)


def _name(source: Any) -> str:
    name = str(source) if isinstance(source, str | Path) else "image"
    return name if len(name) <= 300 else f"{name[:60]}…"  # it may be a whole image in base64


def _head(source: str | Path | bytes) -> bytes:
    """Return the first 16 bytes; none if the file cannot be read."""
    if isinstance(source, bytes):
        return source[:16]
    try:
        if not Path(source).is_file():  # reading a pipe would block
            return b""
        with Path(source).open("rb") as file:
            return file.read(16)
    except (OSError, ValueError):
        return b""


def _check_size(width: int, height: int, context: str) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(
            "too_large",
            f"{context} is {width}×{height} pixels: "
            f"more than {MAX_PIXELS:,} pixels or a side above {MAX_SIDE:,}",
        )


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of an image that is not decoded yet; 1 if its EXIF is damaged.

    An orientation that a PNG stores after its pixels is ignored: reading it would decode the whole image,
    even when only the size is needed.
    """
    metadata = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
    if image.format == "PNG" and not metadata & set(image.info):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is damaged
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # Pillow's parser raises many types
        return 1
    return orientation if orientation in range(2, 9) else 1


def to_rgb(image: Image.Image, orientation: int) -> Image.Image:
    if orientation != 1:
        image = image.transpose(UPRIGHT[orientation])
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_grey(np.asarray(image, dtype=np.float32), image.mode == "F"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(values: np.ndarray, is_float: bool) -> np.ndarray:
    """Scale grey to 8 bits. Of floats, the range; of integers, the bits that the largest needs: 8, 12 or 16.

    Cameras and scanners store 12 bits in 16, and some programs 8 in 32: scaled as 16 they would be black.
    """
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if is_float:
        values, top = values - low, high - low or 1.0
    else:
        top = next((top for top in (255.0, 4095.0, 65535.0) if high <= top), high)
    return (values * (255.0 / top)).clip(0, 255).round().astype(np.uint8)


def data_url(source: Any) -> Any:
    """Decode a `data:` URL to bytes; anything else is returned as it is. Errors: `ImageError`."""
    if not isinstance(source, str) or not source.startswith("data:"):
        return source
    try:
        return base64.b64decode("".join(source.partition(",")[2].split()), validate=True)
    except ValueError as error:
        raise ImageError("damaged", f"an image is not base64: {error}") from None


def image_size(source: ImageSource) -> tuple[int, int]:
    """Return width and height of the upright image, from its header if possible. Errors: `ImageError`."""
    source = data_url(source)
    width, height, orientation = _header(source) or (*open_image(source).size, 1)
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def _header(source: Any) -> tuple[int, int, int] | None:
    """Read width, height and orientation from the header of a JPEG, PNG, GIF or WebP; else None."""
    if not isinstance(source, str | Path | bytes) or not _head(source).startswith(SIGNATURES[:4]):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        with image:
            width, height = image.size
            orientation = orientation_of(image)
        _check_size(width, height, _name(source))
        return width, height, orientation
    except (UserError, MemoryError):
        raise
    except Exception:  # open_image will raise the reason
        return None


def grid_of(width: int, height: int, config: VisionConfig) -> Grid:
    """Choose the grid of tiles for an image size, as nanoVLM does.

    The longer side is rounded up to the next multiple of the tile side, at most `max_side` (with `enlarge`,
    always `max_side`). The shorter side is scaled in proportion and rounded up to the next multiple.

    >>> grid_of(640, 480, VisionConfig(image_size=512, max_side=2048))
    (2, 2)
    """
    if not config.max_side:
        return (1, 1)
    max_tiles = config.max_side // config.image_size
    long, short = max(width, height), min(width, height)
    along = max_tiles if config.enlarge else min(max_tiles, -(-long // config.image_size))
    across = -(-short * along // long)
    return (across, along) if width >= height else (along, across)


def tile_count(grid: Grid) -> int:
    """Count the tiles of one image: the whole in one square, plus the parts of a grid larger than (1, 1)."""
    return 1 + (grid[0] * grid[1] if grid != (1, 1) else 0)


def open_pixels(source: ImageSource) -> Tensor:
    """Decode an image to (3, H, W) uint8. Errors: `ImageError`."""
    return pixels_of(open_image(source))


def pixels_of(image: Image.Image) -> Tensor:
    """Convert an RGB image to (3, H, W) uint8, channels last in memory: the fast path of resizing."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_tiles(pixels: Tensor, config: VisionConfig) -> Tiles:
    """Resize (3, H, W) uint8 pixels to a square and, if the grid is larger than (1, 1), to its parts."""
    pixels = pixels[None]  # (1, 3, H, W)
    side, (rows, columns) = config.image_size, grid_of(pixels.shape[3], pixels.shape[2], config)
    square = _resize(pixels, side, side)
    if (rows, columns) == (1, 1):
        return Tiles((1, 1), square)
    whole = _resize(pixels, rows * side, columns * side)[0]  # (3, rows·h, columns·w)
    parts = whole.unflatten(2, (columns, side)).unflatten(1, (rows, side))  # (3, rows, h, columns, w)
    parts = parts.permute(1, 3, 0, 2, 4).flatten(0, 1)  # (rows·columns, 3, h, w)
    return Tiles((rows, columns), torch.cat([square, parts]))


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize by bicubic interpolation in 8 bits.

    Within two levels of Pillow's result, and six times as fast with AVX2 (docs/log/experiments.md).
    """
    return resize_image(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True).contiguous()
