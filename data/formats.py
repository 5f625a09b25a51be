"""Data sets that lie as files on this disk → records: `{"images": [path], "texts": [{"user", "assistant"}, …], "id"}`.

Each reader: file → (training, validation), validation None where the set has no split of its own. A set that is not of its form
raises `UserError`. A record that is of the form and yet of no use is kept, so that it is dropped and counted where all are:
with an empty text, no text, or its reason as "problem". Further keys a record may have: "references" (texts that would be right
too), "turns": "branch" (the texts are independent questions, never to be chained into a conversation), "clip_score".
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, NamedTuple

from utils.errors import UserError, nearest
from utils.files import read_json

Record = dict[str, Any]
Splits = tuple[list[Record], list[Record] | None]

CAPTION_PROMPT = "Describe the image."
IMAGES_TRIED = 100
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can escape one ("\\ud83d"), no tokenizer takes it
KINDS: dict[type | UnionType, str] = {
    list: "a list ",
    str: "a text ",
    int | str: "a number or text ",
    object: "",
}


def field(entry: Any, key: str, kind: type | UnionType, where: str | Path) -> Any:
    """`entry[key]`, of the given kind. Errors: `UserError`."""
    if not isinstance(entry, dict) or key not in entry or not isinstance(entry[key], kind):
        raise UserError(f"{where}: expected an object with {KINDS[kind]}'{key}'")
    return entry[key]


def text(value: Any) -> str:
    """What is no text becomes an empty one, which is dropped and counted later: one such entry of 100,000 does not stop a run."""
    return value if isinstance(value, str) and not HALF_CHARACTER.search(value) else ""


def find_images(path: Path, roots: Sequence[Path], names: Sequence[Sequence[str]]) -> list[str]:
    """A path for each image of the set `path`. An image goes by several names; the n-th stands for the same place for all images.

    Root and n are those of the first image that is found, so that a set of 100,000 images is not looked up one by one; up to
    `IMAGES_TRIED`, spread over the set, are looked for. An image that is not there gets the path it should have.
    """
    tried = names[:: -(-len(names) // IMAGES_TRIED) or 1]
    for image in tried:
        for root in roots:
            for n, name in enumerate(image):
                if (root / name).is_file():
                    return [str(root / others[n]) for others in names]
    if not names:
        return []
    first = names[0][0]
    inner = list(dict.fromkeys(str(PurePosixPath(name).parent) for name in names[0][1:]))
    within = f" and their sub-folders {', '.join(inner)}" if inner else ""
    others = f" nor are {len(tried) - 1} others" if len(tried) > 1 else ""
    raise UserError(
        f"{path}: its images are not there: looked in {', '.join(map(str, roots))}{within}, {first} is in none of them{others}"
    )


class Captioned(NamedTuple):
    """An image of COCO. `folder` is the one that its entry tells, or ""."""

    split: str
    id: int | str
    folder: str
    file: str
    captions: list[str]


COCO_FOLDERS = ("train2014", "val2014", "train2017", "val2017")
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": ""}


def _official(path: Path, images: list[Any], annotations: list[Any]) -> list[Captioned]:
    entries = {}
    for i, image in enumerate(images):
        where = f"{path}: images[{i}]"
        number, file = field(image, "id", int | str, where), field(image, "file_name", str, where)
        if number in entries:
            raise UserError(f"{where}: an image before it has the id {number} too")
        year = re.match(r"COCO_([a-z]+\d+)_", file)  # COCO_train2014_000000000009.jpg lies in train2014/
        entries[number] = Captioned("train", number, year[1] if year else "", file, [])
    for i, annotation in enumerate(annotations):
        where = f"{path}: annotations[{i}]"
        number, caption = (
            field(annotation, "image_id", int | str, where),
            field(annotation, "caption", object, where),
        )
        if number not in entries:
            raise UserError(f"{where}: 'images' has no image with the id {number}")
        entries[number].captions.append(text(caption).strip())
    return list(entries.values())


def _karpathy(path: Path, images: list[Any]) -> list[Captioned]:
    entries = {}
    for i, image in enumerate(images):
        where = f"{path}: images[{i}]"
        sentences = field(image, "sentences", list, where)
        number, split = field(image, "cocoid", int | str, where), field(image, "split", str, where)
        if split not in KARPATHY_SPLITS:
            raise UserError(f"{where}: no split '{split}'{nearest(split, list(KARPATHY_SPLITS))}")
        if number in entries:
            raise UserError(f"{where}: an image before it has the cocoid {number} too")
        captions = [
            text(field(sentence, "raw", object, f"{where}.sentences")).strip() for sentence in sentences
        ]
        entries[number] = Captioned(
            KARPATHY_SPLITS[split],
            number,
            field(image, "filepath", str, where),
            field(image, "filename", str, where),
            captions,
        )
    return [entry for entry in entries.values() if entry.split]


def coco(path: Path) -> Splits:
    """COCO's captions: an official file (captions_train2017.json) is all training; Karpathy's (dataset_coco.json) has splits, its test part is left out.

    A record is an image, each caption a turn of its own. Images are looked for in the file's folder and the one above, there also in
    `images/`, and in all these in the sub-folder that an entry tells, else in `COCO_FOLDERS`.
    """
    found = read_json(path)
    images = field(found, "images", list, path)
    entries = (
        _official(path, images, field(found, "annotations", list, path))
        if "annotations" in found
        else _karpathy(path, images)
    )
    if not any(entry.split == "train" for entry in entries):
        raise UserError(f"{path}: expected captioned images, found none to train on among {len(images)}")
    near = path.absolute().parent
    roots = list(dict.fromkeys((near, near / "images", near.parent, near.parent / "images")))
    # A told folder takes the place of each of the four, so that a name's number means the same for every image.
    names = [(e.file, *(f"{e.folder or folder}/{e.file}" for folder in COCO_FOLDERS)) for e in entries]
    records: dict[str, list[Record]] = {"train": [], "validation": []}
    for entry, image in zip(entries, find_images(path, roots, names), strict=True):
        texts = [{"user": CAPTION_PROMPT, "assistant": caption} for caption in entry.captions]
        references = [caption for caption in entry.captions if caption]
        records[entry.split].append(
            {
                "images": [image],
                "texts": texts,
                "id": f"coco/{entry.id}",
                "turns": "branch",
                "references": references,
            }
        )
    return records["train"], records["validation"] or None


def ocr_vqa(path: Path) -> Splits:
    """OCR-VQA-200K (https://ocr-vqa.github.io): `dataset.json`, or the folder that holds it, with the images in `images/` beside it. Its test part is left out."""
    path = path / "dataset.json" if path.is_dir() else path
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(
            f'{path}: expected an object {{image id: {{"imageURL", "questions", "answers", "split"}}}}'
        )
    records: dict[int, list[Record]] = {1: [], 2: [], 3: []}
    for number, entry in found.items():
        where = f"{path}: '{number}'"
        split = field(entry, "split", object, where)
        if not isinstance(split, int) or split not in records:
            raise UserError(f"{where}: 'split' must be 1, 2 or 3, not {json.dumps(split)[:80]}")
        name = number + PurePosixPath(field(entry, "imageURL", str, where)).suffix
        pairs = zip_longest(
            field(entry, "questions", list, where), field(entry, "answers", list, where)
        )  # the half that is missing: empty, so counted
        records[split].append(
            {
                "images": [name],
                "texts": [{"user": text(q), "assistant": text(a)} for q, a in pairs],
                "id": f"ocr_vqa/{number}",
            }
        )
    if not records[1]:
        raise UserError(f"{path}: expected images with split 1, found none to train on among {len(found)}")
    used = records[1] + records[2]
    _place(path, used, [path.absolute().parent / "images"])
    return records[1], records[2] or None


def _place(path: Path, records: list[Record], roots: list[Path]) -> None:
    """Give the images of records, which are names so far, their paths."""
    places = iter(find_images(path, roots, [(name,) for record in records for name in record["images"]]))
    for record in records:
        record["images"] = [next(places) for _ in record["images"]]


LLAVA_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
PLACEHOLDER = "<image>"


def without_placeholders(value: str) -> str:
    """Text without `<image>` and one newline next to each: `"<image>\\nWhat?"` → `"What?"`, and `"A\\n<image>\\nB"` → `"A\\nB"`."""
    return re.sub(rf"{PLACEHOLDER}\n|\n?{PLACEHOLDER}", "", value).strip() if PLACEHOLDER in value else value


def _conversation(turns: list[Any], images: int, where: str) -> tuple[list[dict[str, str]], str]:
    """Turns of LLaVA's → texts, and the problem with them or ""."""
    roles = [LLAVA_ROLES.get(field(turn, "from", str, where), "") for turn in turns]
    values = [text(field(turn, "value", object, where)) for turn in turns]
    if "system" in roles:
        return (
            [],
            "system_turn",
        )  # the model's template has no place for one, and leaving it out would change what the answers answer
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        return [], "turn_order"
    clean = list(map(without_placeholders, values))
    texts = [{"user": q, "assistant": a} for q, a in zip(clean[::2], clean[1::2], strict=True)]
    return texts, "" if sum(value.count(PLACEHOLDER) for value in values) == images else "image_count"


def llava(path: Path) -> Splits:
    """LLaVA's conversations (arXiv 2304.08485): a list of `{"id", "image", "conversations": [{"from", "value"}]}`; no image: text only.

    Images are relative to the file's folder or to `images/` in it. An id that came before gets its place in the list added
    (llava_v1_5_mix665k.json has such): what is dropped is counted by id.
    """
    found = read_json(path)
    if not isinstance(found, list) or not found:
        raise UserError(
            f'{path}: expected a list of {{"id", "image", "conversations"}}, {"empty" if found == [] else type(found).__name__} found'
        )
    records: dict[str, Record] = {}
    for index, entry in enumerate(found):
        where = f"{path}: [{index}]"
        turns, image = field(entry, "conversations", list, where), entry.get("image")
        images = image if isinstance(image, list) else [] if image is None else [image]
        if not _texts(images):
            raise UserError(
                f"{where}: 'image' must be a path or a list of paths, not {json.dumps(image)[:80]}"
            )
        number = entry.get("id")
        name = f"llava/{index if number is None else number}"
        name = f"{name}@{index}" if name in records else name
        texts, problem = _conversation(turns, len(images), f"{where}.conversations")
        records[name] = {"images": images, "texts": texts, "id": name} | (
            {"problem": problem} if problem else {}
        )
    training = list(records.values())
    near = path.absolute().parent
    _place(path, training, [near, near / "images"])
    return training, None


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _turns(value: Any) -> bool:
    """Halves that are null are left for the pipeline to count; `source` and `ratings` are what The Cauldron's and FineVision's turns have besides."""
    return (
        isinstance(value, list)
        and value != []
        and all(
            isinstance(t, dict)
            and {"user", "assistant"} <= t.keys() <= TURN_KEYS
            and _texts([t["user"] or "", t["assistant"] or ""])
            for t in value
        )
    )


TURN_KEYS = {"user", "assistant", "source", "ratings"}
# key → what it must be, and whether it is
JSONL_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "images": ("a list of paths", lambda v: isinstance(v, list) and _texts([path or "" for path in v])),
    "image": ("a path", lambda v: v is None or isinstance(v, str)),
    "texts": ('a list of {"user": text, "assistant": text}, one at least', _turns),
    "id": ("a text", lambda v: isinstance(v, str)),
    "references": ("a list of texts", _texts),
    "turns": ('"branch"', lambda v: v == "branch"),
    "clip_score": (
        "a number",
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9,
    ),  # NaN is not < 1e9
}


def _jsonl_record(line: bytes, folder: Path, where: str, default_id: str) -> Record:
    try:
        found = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as problem:  # whose own text speaks of "line 1"
        raise UserError(f"{where}: not valid JSON: {problem.msg} at character {problem.pos + 1}") from None
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{where}: not valid JSON: {problem}") from None
    if b"\\u" in line and (half := HALF_CHARACTER.search(json.dumps(found, ensure_ascii=False))):
        raise UserError(f"{where}: not valid Unicode: half a character, \\u{ord(half[0]):x}")
    field(found, "texts", object, where)
    for key, value in found.items():
        if key not in JSONL_KEYS:
            raise UserError(f"{where}: no key '{key}'{nearest(key, list(JSONL_KEYS))}")
        form, fits = JSONL_KEYS[key]
        if not fits(value):
            raise UserError(f"{where}: '{key}' must be {form}, not {json.dumps(value)[:80]}")
    if "image" in found and "images" in found:
        raise UserError(f"{where}: 'image' and 'images' are both there; keep one")
    images = [found["image"]] if "image" in found else found.get("images", [])
    further = {key: found[key] for key in ("references", "turns", "clip_score") if key in found}
    return {
        "images": [image and str(folder / image) for image in images],
        "texts": found["texts"],
        "id": found.get("id", default_id),
    } | further


def jsonl(path: Path) -> Splits:
    """Records as they are, one a line; images are relative to the file's folder, `"image": path` is short for a list of one.

    `{"image": "cat.png", "texts": [{"user": "What is it?", "assistant": "A cat."}]}`. The first line that is not of the form
    raises `UserError` with its number: the file is the user's own, who can mend it.
    """
    records: list[Record] = []
    lines: dict[str, int] = {}
    folder = path.absolute().parent
    try:
        with open(path, "rb") as file:  # bytes: a line that is not UTF-8 can be named
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = _jsonl_record(line, folder, f"{path}:{number}", f"jsonl/{path.stem}/{number}")
                if lines.setdefault(record["id"], number) != number:
                    raise UserError(
                        f"{path}:{number}: line {lines[record['id']]} has the id '{record['id']}' too"
                    )
                records.append(record)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not records:
        raise UserError(f'{path}: expected lines of {{"images", "texts"}}, found none')
    return records, None
