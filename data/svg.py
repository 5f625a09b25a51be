"""SVG → PNG, drawn in a separate process: a drawing that needs too much ends that process, never this one."""

import os
import re
import struct
import subprocess
import sys
import threading
from functools import cache
from xml.parsers import expat

from utils.errors import ImageError, UserError

WIDTH = 256
MAX_RATIO = 78  # height ÷ width
MAX_BYTES = 2_000_000  # OpenMoji's drawings have at most 35,000
MAX_ELEMENTS = 20_000  # OpenMoji's: 112
MAX_LEVELS = 64  # of nesting; OpenMoji's: 8
SECONDS, MEMORY = 5, 1 << 30  # limits of drawing one SVG; a few milliseconds are usual
PROGRAM = f"""
import resource, signal, struct, sys
import resvg_py
signal.signal(signal.SIGINT, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
sys.stdout.buffer.write(b".")
sys.stdout.buffer.flush()
while head := sys.stdin.buffer.read(8):
    size, height = struct.unpack("<2i", head)
    svg = sys.stdin.buffer.read(size).decode()
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width={WIDTH}, height=height, background="white", skip_system_fonts=True, dpi=96.0
        )
        answer = b"+" + bytes(png)
    except Exception as error:
        answer = b"-" + str(error).encode()
    sys.stdout.buffer.write(struct.pack("<i", len(answer)) + answer)
    sys.stdout.buffer.flush()
"""


def draw(data: bytes, context: str) -> bytes:
    """Draw an SVG on white, `WIDTH` pixels wide, and return it as PNG bytes.

    `context` names the image in errors: `ImageError`, or `UserError` if resvg-py is not installed.
    """
    try:
        import resvg_py  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("drawing an SVG needs the package resvg-py (pip install resvg-py)") from None
    if len(data) > MAX_BYTES:
        raise ImageError("too_large", f"{context} is an SVG of {len(data):,} bytes: more than {MAX_BYTES:,}")
    svg = data.decode()
    ratio = _aspect_ratio(_validate(svg, context), context)
    if not 0 < ratio <= MAX_RATIO:
        raise ImageError("too_large", f"{context} is {ratio:.3g} times as tall as wide")
    return _drawer(os.getpid()).draw(svg.encode(), max(1, round(WIDTH * ratio)), context)


def _validate(svg: str, context: str) -> dict[str, str]:
    """Check that an SVG is safe to draw, and return its root's attributes.

    Refused with `ImageError`: references to other files, embedded images, XML entities, and too many
    elements or levels.
    """
    level = elements = 0
    root: dict[str, str] = {}

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal level, elements
        level, elements = level + 1, elements + 1
        if level > MAX_LEVELS or elements > MAX_ELEMENTS:
            raise ImageError(
                "too_large",
                f"{context} is an SVG of more than {MAX_ELEMENTS:,} elements or {MAX_LEVELS} levels",
            )
        if elements == 1:
            root.update(attributes)
        for key, value in attributes.items():
            is_reference = key.rpartition(":")[2] == "href" and name.rpartition(":")[2] != "a"
            if is_reference and not value.strip().startswith("#"):
                raise ImageError(
                    "damaged",
                    f"{context} refers to other files or embeds images: an SVG may hold drawings alone",
                )

    def end(_: str) -> None:
        nonlocal level
        level -= 1

    def entity(*_: object) -> None:
        raise ImageError("damaged", f"{context} declares XML entities: write out what they stand for")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.EntityDeclHandler = start, end, entity
    try:
        parser.Parse(svg, True)
    except expat.ExpatError as error:
        raise ImageError("damaged", f"{context} is no whole SVG: {error}") from None
    return root


def _aspect_ratio(root: dict[str, str], context: str) -> float:
    """Return height ÷ width, from `width` and `height`, else from `viewBox`, else 1. Errors: `ImageError`."""
    number = r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(?:px|pt|mm|cm|in)?\s*"
    width = re.fullmatch(number, root.get("width", ""))
    height = re.fullmatch(number, root.get("height", ""))
    box = root.get("viewBox", "").replace(",", " ").split()
    try:
        if width and height:
            return float(height[1]) / float(width[1])
        return float(box[3]) / float(box[2]) if len(box) == 4 else 1.0
    except (ValueError, ZeroDivisionError):
        raise ImageError("damaged", f"{context} is an SVG without a size") from None


class _Drawer:
    """The drawing process: started at first use and after each end.

    It ends by itself when its standard input closes, that is, with this process.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def draw(self, svg: bytes, height: int, context: str) -> bytes:
        """Return the PNG. Errors: `ImageError`."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = _start_process()
            answer = b""
            try:
                answer = _request(self.process, svg, height)
            finally:
                if not answer:  # after an interrupt, the next answer would still be this drawing's
                    self.process.kill()
                    self.process.wait()
        if not answer:
            raise ImageError(
                "too_large", f"{context} cannot be drawn within {SECONDS} s and {MEMORY >> 20:,} MB"
            )
        if answer[:1] == b"-":
            raise ImageError(
                "damaged", f"{context} cannot be drawn: {' '.join(answer[1:].decode().split())[:200]}"
            )
        return answer[1:]


def _start_process() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    if not process.stdout or process.stdout.read(1) != b".":
        raise UserError(
            f"the process that draws SVGs does not start; try {sys.executable} -c 'import resvg_py'"
        )
    return process


def _request(process: subprocess.Popen[bytes], svg: bytes, height: int) -> bytes:
    """Send one SVG and return the answer: b"+" and the PNG, or b"-" and an error. Empty if the process ended.

    After `SECONDS` the process is killed.
    """
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(SECONDS, process.kill)
    timer.start()
    try:
        process.stdin.write(struct.pack("<2i", len(svg), height) + svg)
        process.stdin.flush()
        if len(head := process.stdout.read(4)) < 4:
            return b""
        answer = process.stdout.read(length := struct.unpack("<i", head)[0])
        return answer if len(answer) == length else b""
    except BrokenPipeError:
        return b""
    finally:
        timer.cancel()


@cache
def _drawer(process_id: int) -> _Drawer:
    """Return the drawer of a process: a forked worker has its own."""
    return _Drawer()
