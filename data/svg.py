"""SVG → PNG, drawn by a process of its own: a drawing that asks for too much ends that process, never this one."""

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
MAX_TALL = 78  # times as tall as wide
MAX_BYTES, MAX_ELEMENTS, MAX_LEVELS = (
    2_000_000,
    20_000,
    64,
)  # a drawing of OpenMoji has at most 35,000, 112 and 8
SECONDS, MEMORY = 5, 1 << 30  # that drawing one may take; a few milliseconds are usual
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
        answer = b"+" + bytes(resvg_py.svg_to_bytes(svg_string=svg, width={WIDTH}, height=height, background="white", skip_system_fonts=True, dpi=96.0))
    except Exception as error:
        answer = b"-" + str(error).encode()
    sys.stdout.buffer.write(struct.pack("<i", len(answer)) + answer)
    sys.stdout.buffer.flush()
"""


def draw(data: bytes, where: str) -> bytes:
    """SVG → PNG bytes on white, `WIDTH` pixels wide. `where` is for the errors: `ImageError`, or `UserError` where there is nothing to draw with."""
    try:
        import resvg_py  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("drawing an SVG needs the package resvg-py (pip install resvg-py)") from None
    if len(data) > MAX_BYTES:
        raise ImageError("too_large", f"{where} is an SVG of {len(data):,} bytes: more than {MAX_BYTES:,}")
    svg = data.decode()
    tall = _proportion(_checked(svg, where), where)
    if not 0 < tall <= MAX_TALL:
        raise ImageError("too_large", f"{where} is {tall:.3g} times as tall as wide")
    return _drawer(os.getpid()).draw(svg.encode(), max(1, round(WIDTH * tall)), where)


def _checked(svg: str, where: str) -> dict[str, str]:
    """The root's attributes, of an SVG that is all there is to the drawing: one that refers to files, embeds images, declares entities or is too large is refused."""
    level = elements = 0
    root: dict[str, str] = {}

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal level, elements
        level, elements = level + 1, elements + 1
        if level > MAX_LEVELS or elements > MAX_ELEMENTS:
            raise ImageError(
                "too_large",
                f"{where} is an SVG of more than {MAX_ELEMENTS:,} elements or {MAX_LEVELS} levels",
            )
        if elements == 1:
            root.update(attributes)
        for key, value in attributes.items():
            if (
                key.rpartition(":")[2] == "href"
                and name.rpartition(":")[2] != "a"
                and not value.strip().startswith("#")
            ):
                raise ImageError(
                    "damaged",
                    f"{where} refers to other files or embeds images: an SVG may hold drawings alone",
                )

    def end(_: str) -> None:
        nonlocal level
        level -= 1

    def entity(*_: object) -> None:
        raise ImageError("damaged", f"{where} declares XML entities: write out what they stand for")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.EntityDeclHandler = start, end, entity
    try:
        parser.Parse(svg, True)
    except expat.ExpatError as error:
        raise ImageError("damaged", f"{where} is no whole SVG: {error}") from None
    return root


def _proportion(root: dict[str, str], where: str) -> float:
    """Height ÷ width, of `width` and `height` or else of `viewBox`; without both 1."""
    number = r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(?:px|pt|mm|cm|in)?\s*"
    sides = [re.fullmatch(number, root.get(name, "")) for name in ("width", "height")]
    box = root.get("viewBox", "").replace(",", " ").split()
    try:
        width, height = (
            (float(side[1]) for side in sides)
            if all(sides)
            else map(float, box[2:])
            if len(box) == 4
            else (1.0, 1.0)
        )  # type: ignore[index]
        return height / width
    except (ValueError, ZeroDivisionError):
        raise ImageError("damaged", f"{where} is an SVG without a size") from None


class _Drawer:
    """The process that draws, started when it is first needed and again after each end. It ends by itself when nobody can ask it any more."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def draw(self, svg: bytes, height: int, where: str) -> bytes:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = _started()
            answer = b""
            try:
                answer = _asked(self.process, svg, height)
            finally:
                if not answer:  # it ended, or there was an interrupt: its next answer would be this drawing's
                    self.process.kill()
                    self.process.wait()
        if not answer:
            raise ImageError(
                "too_large", f"{where} cannot be drawn within {SECONDS} s and {MEMORY >> 20:,} MB"
            )
        if answer[:1] == b"-":
            raise ImageError(
                "damaged", f"{where} cannot be drawn: {' '.join(answer[1:].decode().split())[:200]}"
            )
        return answer[1:]


def _started() -> subprocess.Popen[bytes]:
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


def _asked(process: subprocess.Popen[bytes], svg: bytes, height: int) -> bytes:
    """Its answer; nothing where it ended, or had to be ended."""
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
def _drawer(process: int) -> _Drawer:
    """One for each process: a forked worker has its own."""
    return _Drawer()
