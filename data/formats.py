"""Local data-set files → records in the format of `data/conversations.py`, with a path for each image.

Each reader maps a file to (training, validation); validation is None if the set has no split of its own. A
file of another form raises `UserError`. A well-formed but unusable record is returned with an empty text,
no texts, or a reason under "problem", so that the pipeline drops and counts it.

Optional keys of a record:
    "references"       further correct answers
    "turns": "branch"  "texts" are independent questions, never chained into one conversation
    "clip_score"       image–text similarity, for `data.filters.min_clip_score`
    "problem"          the reason to drop it
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, NamedTuple

from data.conversations import (
    ADDRESS,
    ANSWERS,
    CAPTION_PROMPT,
    HALF_CHARACTER,
    IMAGE_PART,
    LLAVA_ROLES,
    QUESTIONS,
    TEXTS,
    ConversationError,
    Part,
    as_text,
    checked_parts,
    collect_images,
    conversations_of,
    locate,
    text_part,
)
from data.splits import files_below
from utils.errors import UsageError, UserError, nearest
from utils.files import lines_of, read_json

Record = dict[str, Any]
Splits = tuple[list[Record], list[Record] | None]

IMAGES_TRIED = 100
KINDS: dict[type | UnionType, str] = {
    list: "a list ",
    str: "a text ",
    int: "a number ",
    int | str: "a number or text ",
    object: "",
}


def field(entry: Any, key: str, kind: type | UnionType, context: str | Path) -> Any:
    """Return `entry[key]`, checked to be of the given kind. Errors: `UserError`, which names `context`."""
    if not isinstance(entry, dict) or key not in entry or not isinstance(entry[key], kind):
        raise UserError(f"{context}: expected an object with {KINDS[kind]}'{key}'")
    return entry[key]


def find_images(path: Path, roots: Sequence[Path], names: Sequence[Sequence[str]]) -> list[str]:
    """Return a path for each image of the set in the file `path`.

    `names` holds the candidate names of each image; the n-th candidate means the same folder for all
    images. Up to `IMAGES_TRIED` images, spread over the set, are looked up; root and n of the first that
    exists serve for all. So 100,000 images are not looked up one by one, and a missing image gets the path
    it should have. Errors: `UserError` if none exists.
    """
    tried = names[:: -(-len(names) // IMAGES_TRIED) or 1]
    for candidates in tried:
        for root in roots:
            for n, name in enumerate(candidates):
                if (root / name).is_file():
                    return [str(root / image[n]) for image in names]
    if not names:
        return []
    first = names[0][0]
    folders = list(dict.fromkeys(str(PurePosixPath(name).parent) for name in names[0][1:]))
    sub_folders = f" and their sub-folders {', '.join(folders)}" if folders else ""
    others = f" nor are {len(tried) - 1} others" if len(tried) > 1 else ""
    raise UserError(
        f"{path}: its images are not there: looked in {', '.join(map(str, roots))}{sub_folders}, "
        f"{first} is in none of them{others}"
    )


class Captioned(NamedTuple):
    """An image of COCO with its captions. `folder` comes from its entry, or is ""."""

    split: str
    id: str
    folder: str
    file: str
    captions: list[str]


COCO_FOLDERS = ("train2014", "val2014", "train2017", "val2017", "Flicker8k_Dataset", "flickr30k-images")
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": ""}


def _official(path: Path, images: list[Any], annotations: list[Any]) -> list[Captioned]:
    """Entries of an official annotation file."""
    entries = {}
    for i, image in enumerate(images):
        context = f"{path}: images[{i}]"
        number, file = str(field(image, "id", int | str, context)), field(image, "file_name", str, context)
        if number in entries:
            raise UserError(f"{context}: an image before it has the id {number} too")
        folder = re.match(r"COCO_([a-z]+\d+)_", file)  # COCO_train2014_000000000009.jpg is in train2014/
        entries[number] = Captioned("train", number, folder[1] if folder else "", file, [])
    for i, annotation in enumerate(annotations):
        context = f"{path}: annotations[{i}]"
        number, caption = (
            str(field(annotation, "image_id", int | str, context)),  # text in one half, a number in the other
            field(annotation, "caption", object, context),
        )
        if number not in entries:
            raise UserError(f"{context}: 'images' has no image with the id {number}")
        entries[number].captions.append(as_text(caption).strip())
    return list(entries.values())


def _karpathy(path: Path, images: list[Any]) -> list[Captioned]:
    """Entries of Karpathy's files (dataset_coco.json, dataset_flickr8k.json, …), without the test split."""
    entries = {}
    for i, image in enumerate(images):
        context = f"{path}: images[{i}]"
        sentences, split = field(image, "sentences", list, context), field(image, "split", str, context)
        key = "cocoid" if "cocoid" in image else "imgid"
        number = str(field(image, key, int | str, context))
        if split not in KARPATHY_SPLITS:
            raise UserError(f"{context}: no split '{split}'{nearest(split, list(KARPATHY_SPLITS))}")
        if number in entries:
            raise UserError(f"{context}: an image before it has the {key} {number} too")
        captions = [
            as_text(field(sentence, "raw", object, f"{context}.sentences")).strip() for sentence in sentences
        ]
        entries[number] = Captioned(
            KARPATHY_SPLITS[split],
            number,
            field(image, "filepath", str, context) if "filepath" in image else "",
            field(image, "filename", str, context),
            captions,
        )
    return [entry for entry in entries.values() if entry.split]


def coco(path: Path) -> Splits:
    """Read COCO captions: an official file (captions_train2017.json), or one of Karpathy's (also Flickr's).

    An official file is all training. Karpathy's has splits; its test split is left out. A record is one
    image with a turn for each caption. Images are searched in the file's folder and its parent, in
    `images/` below both, and in sub-folders of these: the one that the entry names, else `COCO_FOLDERS`.
    """
    content = read_json(path)
    images = field(content, "images", list, path)
    if "annotations" in content:
        entries = _official(path, images, field(content, "annotations", list, path))
    else:
        entries = _karpathy(path, images)
    if not any(entry.split == "train" for entry in entries):
        raise UserError(f"{path}: expected captioned images, found none to train on among {len(images)}")
    folder = path.absolute().parent
    roots = list(dict.fromkeys((folder, folder / "images", folder.parent, folder.parent / "images")))
    # An entry's own folder replaces each of these, so that the n-th name means the same for every image.
    names = [(e.file, *(f"{e.folder or default}/{e.file}" for default in COCO_FOLDERS)) for e in entries]
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
    """Read OCR-VQA-200K (https://ocr-vqa.github.io), without its test split.

    `path` is `dataset.json` or its folder; the images are in `images/` next to the file.
    """
    path = path / "dataset.json" if path.is_dir() else path
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f'{path}: expected an object {{image id: {{"imageURL", "questions", "answers", "split"}}}}'
        )
    records: dict[int, list[Record]] = {1: [], 2: [], 3: []}
    for number, entry in content.items():
        context = f"{path}: '{number}'"
        split = field(entry, "split", object, context)
        if not isinstance(split, int) or split not in records:
            raise UserError(f"{context}: 'split' must be 1, 2 or 3, not {json.dumps(split)[:80]}")
        name = number + PurePosixPath(field(entry, "imageURL", str, context)).suffix
        questions, answers = field(entry, "questions", list, context), field(entry, "answers", list, context)
        pairs = zip_longest(questions, answers)  # a missing half becomes empty, so it is counted
        records[split].append(
            {
                "images": [name],
                "texts": [{"user": as_text(q), "assistant": as_text(a)} for q, a in pairs],
                "id": f"ocr_vqa/{number}",
            }
        )
    if not records[1]:
        raise UserError(f"{path}: expected images with split 1, found none to train on among {len(content)}")
    _resolve_images(path, records[1] + records[2], [path.absolute().parent / "images"])
    return records[1], records[2] or None


def _resolve_images(path: Path, records: list[Record], roots: list[Path]) -> None:
    """Replace the image names of records with paths, in place; addresses (`data:`, `https:`) stay."""
    names = [(name,) for record in records for name in record["images"] if not _is_address(name)]
    paths = iter(find_images(path, roots, names))
    for record in records:
        record["images"] = [
            locate(name, roots[0]) if _is_address(name) else next(paths) for name in record["images"]
        ]


def _is_address(name: str) -> bool:
    return bool(ADDRESS.match(name)) or name[:5].lower() == "file:"


def _messages(turns: list[Any], context: str) -> tuple[list[dict[str, str]], str]:
    """Convert LLaVA's turns to messages; also return the reason to drop them, or "".

    A system turn may come first; then human and gpt alternate, and gpt has the last word.
    """
    messages = []
    for turn in turns:
        role, content = (
            ("role", "content") if isinstance(turn, dict) and "role" in turn else ("from", "value")
        )
        name = field(turn, role, str, context)
        text = as_text(field(turn, content, object, context))
        messages.append({"role": LLAVA_ROLES.get(name, name), "content": text})
    roles = [message["role"] for message in messages]
    spoken = roles[roles[:1] == ["system"] :]
    alternating = bool(spoken) and spoken == ["user", "assistant"] * (len(spoken) // 2)
    return messages, "" if alternating else "turn_order"


def llava(path: Path) -> Splits:
    """Read LLaVA's conversations (arXiv 2304.08485).

    The file is a list of `{"id", "image", "conversations": [{"from", "value"}]}`, or one of them a line;
    without "image" the record is text only. Images are relative to the file's folder or to `images/` in it.
    A repeated id gets its list index appended (llava_v1_5_mix665k.json has some).
    """
    records: dict[str, Record] = {}
    for index, (context, entry) in enumerate(_entries(path)):
        turns = field(entry, "conversations", list, context)
        image = entry.get("image") or entry.get("images") or None
        images = image if isinstance(image, list) else [] if image is None else [image]
        if not _texts(images):
            raise UserError(
                f"{context}: 'image' must be a path or a list of paths, not {json.dumps(image)[:80]}"
            )
        number = entry.get("id")
        name = f"llava/{index if number is None else number}"
        name = f"{name}@{index}" if name in records else name
        messages, problem = _messages(turns, f"{context}.conversations")
        records[name] = {"images": images, "messages": messages, "id": name} | (
            {"problem": problem} if problem else {}
        )
    training = list(records.values())
    if not training:
        raise UserError(f'{path}: expected a list of {{"id", "image", "conversations"}}, empty found')
    folder = path.absolute().parent
    _resolve_images(path, training, [folder, folder / "images"])
    return training, None


def mmc4(path: Path) -> Splits:
    """Read mmc4 (arXiv 2304.06939): interleaved pages, each image before the sentence that it matches.

    `path` is a file of JSON lines or a folder of them; images lie beside it, or in `images/`. Images that are
    not there are left out of their page: of web pages, many cannot be fetched any more.
    """
    files = [path]
    if path.is_dir():
        files = [Path(file) for file in files_below(str(path)) if file.endswith((".jsonl", ".jsonl.gz"))]
    folder = path if path.is_dir() else path.absolute().parent
    folder = folder / "images" if (folder / "images").is_dir() else folder
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    records, listed = [], 0
    for file in files:
        for number, (context, entry) in enumerate(_entries(file)):
            sentences = field(entry, "text_list", list, context)
            images: dict[int, list[str]] = {}
            problem = {}
            for image in field(entry, "image_info", list, context):
                name = field(image, "image_name", str, context)
                listed += 1
                if name in there:
                    index = field(image, "matched_text_index", int, context)
                    if not 0 <= index < len(sentences):
                        problem = {"problem": "malformed"}
                    images.setdefault(index, []).append(str(folder / name))
            parts: list[Part] = []
            for index, sentence in enumerate(sentences):
                parts += [IMAGE_PART] * len(images.get(index, []))
                parts.append(text_part(as_text(sentence) + " "))
            paths = [name for index in range(len(sentences)) for name in images.get(index, [])]
            page = {"images": paths, "interleaved": parts, "id": f"mmc4/{file.stem}/{number}"}
            records.append(page | problem)
    if not records:
        raise UserError(f'{path}: expected lines of {{"text_list", "image_info"}}, found none')
    if listed and not any(record["images"] or "problem" in record for record in records):
        raise UserError(f"{path}: its images are not there: none of {listed:,} is in {folder}")
    return records, None


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _turns(value: Any) -> bool:
    """Return whether `value` is a list of turns. Null halves are allowed: the pipeline counts them."""
    return (
        isinstance(value, list)
        and value != []
        and all(
            isinstance(t, dict)
            and t.keys() <= TURN_KEYS
            and all(len(t.keys() & set(half)) == 1 for half in (QUESTIONS, ANSWERS))
            and all(isinstance(t.get(half) or "", str | int | float) for half in (*QUESTIONS, *ANSWERS))
            and _texts(t.get("references", []))
            for t in value
        )
    )


TURN_KEYS = {
    *QUESTIONS,
    *ANSWERS,
    "references",
    "source",
    "ratings",
}  # the last: The Cauldron's, FineVision's
# key → its form in words, and a check of it
JSONL_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "images": ("a list of paths", lambda v: isinstance(v, list) and _texts([path or "" for path in v])),
    "image": ("a path", lambda v: v is None or isinstance(v, str)),
    "texts": ('a list of {"user": text, "assistant": text}, one at least', _turns),
    "messages": ('a list of {"role", "content"}', lambda v: isinstance(v, list)),
    "conversations": ("a list of lists of messages", lambda v: isinstance(v, list)),
    "interleaved": ("a list of parts", lambda v: isinstance(v, list)),
    "id": ("a text", lambda v: isinstance(v, str)),
    "references": ("a list of texts", lambda v: isinstance(v, list) and _texts([text or "" for text in v])),
    "turns": ('"branch"', lambda v: v == "branch"),
    "clip_score": (
        "a number",
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9,  # not NaN
    ),
}


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a file of JSON lines, or of one JSON list, and what to call each in errors.

    The first that is damaged raises `UserError`, because users can repair their own file.
    """
    lines = (line for line in enumerate(lines_of(path), 1) if line[1].strip())
    try:
        first = next(lines, (1, b""))
        if first[1].lstrip().startswith(b"["):
            text = b"".join(line for _, line in chain([first], lines))
            yield from ((f"{path}: [{i}]", entry) for i, entry in enumerate(_parsed(text, str(path))))
        else:
            for number, line in chain([first] * bool(first[1]), lines):
                yield f"{path}:{number}", _parsed(line, f"{path}:{number}")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _parsed(text: bytes, context: str) -> Any:
    """Parse JSON. Errors: `UserError`."""
    try:
        return json.loads(text.decode("utf-8"))
    except json.JSONDecodeError as problem:  # its own message would say "line 1"
        raise UserError(f"{context}: not valid JSON: {problem.msg} at character {problem.pos + 1}") from None
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{context}: not valid JSON: {problem}") from None


def _jsonl_record(entry: Any, folder: Path, context: str, default_id: str) -> Record:
    """Check one entry; relative image paths start at `folder`."""
    if half := HALF_CHARACTER.search(json.dumps(entry, ensure_ascii=False)):
        raise UserError(f"{context}: not valid Unicode: half a character, \\u{ord(half[0]):x}")
    text_keys = [key for key in TEXTS if isinstance(entry, dict) and key in entry]
    if len(text_keys) != 1:
        raise UserError(f"{context}: expected an object with one of {', '.join(map(repr, TEXTS))}")
    for key, value in entry.items():
        if key not in JSONL_KEYS:
            raise UserError(
                f"{context}: no key '{key}'{nearest(key, list(JSONL_KEYS))}; hf=PATH reads other columns"
            )
        form, fits = JSONL_KEYS[key]
        if not fits(value):
            raise UserError(f"{context}: '{key}' must be {form}, not {json.dumps(value)[:80]}")
    if "image" in entry and "images" in entry:
        raise UserError(f"{context}: 'image' and 'images' are both there; keep one")
    images = [entry["image"]] if "image" in entry else entry.get("images", [])
    images = [] if images == [""] else images
    try:
        if text_keys == ["interleaved"]:
            checked_parts(entry["interleaved"], "the page")
        elif text_keys != ["texts"]:
            conversations_of(entry, "branch")
        entry = collect_images({**entry, "images": images})
        if not _texts([image or "" for image in entry["images"]]):
            raise ConversationError("an image in a part is neither a path nor a URL")
    except UsageError as error:
        raise UserError(f"{context}: {error}") from None
    further = {key: entry[key] for key in (*text_keys, "references", "turns", "clip_score") if key in entry}
    return {
        "images": [locate(image, folder) for image in entry["images"]],
        "id": entry.get("id", default_id),
    } | further


def jsonl(path: Path) -> Splits:
    """Read JSON Lines, one record a line: `{"image": "cat.png", "messages": [{"role", "content"}, …]}`.

    Or a JSON list of records. `data/conversations.py` has their forms. Images are relative to the file's
    folder; `"image": path` is short for `"images": [path]`.
    """
    records: list[Record] = []
    numbers: dict[str, str] = {}
    folder = path.absolute().parent
    for context, entry in _entries(path):
        number = context.removeprefix(f"{path}:").strip(" []")
        record = _jsonl_record(entry, folder, context, f"jsonl/{path.stem}/{number}")
        if (other := numbers.setdefault(record["id"], number)) != number:
            raise UserError(f"{context}: the id '{record['id']}' is that of line {other} too")
        records.append(record)
    if not records:
        raise UserError(f'{path}: expected lines of {{"images", "messages"}}, found none')
    return records, None
