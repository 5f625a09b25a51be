"""The conversation format: records → checked lists of messages, with images at their places.

    {"images": […], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "…"}]},
        {"role": "assistant", "content": "…"}]}

Roles: system (optional, only first), user, assistant. A content is a text or a list of parts: texts and, in a
user's message, images. Image parts take the record's images in order, and so does each `<image>` in a user's
text; with neither, all images stand at the head of the first user message. Parts may carry their images
themselves: "image", "path", "url", "base64". "references" of a message are further correct answers.

Instead of "messages" a record may have "conversations", a list of them on the same images; "interleaved", the
parts of a web page; or "texts", pairs of "user" and "assistant", as in The Cauldron.
"""

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from utils.errors import UsageError

Message = dict[str, Any]
Conversation = list[Message]
Part = dict[str, Any]

IMAGE_PART: Part = {"type": "image"}
PLACEHOLDER = "<image>"
PLACEHOLDERS = re.compile(rf"{PLACEHOLDER}\n|\n?{PLACEHOLDER}")  # it takes one newline next to it along
CAPTION_PROMPT = "Describe the image."  # of images with captions alone
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can escape one ("\\ud83d"); no tokenizer accepts it
ADDRESS = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.-]+://")  # of an image that is no path
TEXTS = ("messages", "conversations", "texts", "interleaved")  # a record has one of these
IMAGE_KEYS = ("image", "url", "path", "base64")  # where an image part may carry its image
ROLES = ("system", "user", "assistant")
LLAVA_ROLES = {"human": "user", "gpt": "assistant"}  # in messages with "from" and "value"
QUESTIONS, ANSWERS = ("user", "question"), ("assistant", "answer")  # the halves of a pair
REFUSED = {  # what this model does not do, by name
    "tool": "tool messages",
    "function": "tool messages",
    "audio": "audio",
    "input_audio": "audio",
    "audio_url": "audio",
    "video": "videos",
    "video_url": "videos",
}


class ConversationError(UsageError):
    """A conversation that cannot be used; `reason` is a word for counting."""

    def __init__(self, message: str, reason: str = "malformed") -> None:
        super().__init__(message)
        self.reason = reason


def text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def ask(text: str, images: int = 0, system: str = "") -> Conversation:
    """A conversation that asks about images: at each `<image>`, if there are as many, else first."""
    messages = [{"role": "system", "content": system}] if system else []
    placed = images and text.count(PLACEHOLDER) == images
    content = split_at_images(text) if placed else [IMAGE_PART] * images + [text_part(text)]
    return [*messages, {"role": "user", "content": content}]


def parts_of(message: Message) -> list[Part]:
    """A message's content as parts."""
    content = message["content"]
    return [text_part(content)] if isinstance(content, str) else list(content)


def text_of(message: Message) -> str:
    """A message's text, without its images."""
    return "".join(part["text"] for part in parts_of(message) if part["type"] == "text")


def checked(messages: Any, context: str = "the conversation") -> Conversation:
    """Check a conversation. Errors: `ConversationError`; it names `context`, the message and what is wrong.

    OpenAI's `image_url` parts become image parts; `content` None becomes "" in an assistant's message.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ConversationError(f"{context}: expected a list of messages, found {kind_of(messages)}")
    result = [_checked_message(m, f"{context}: message {n}") for n, m in enumerate(messages, 1)]
    for number, message in enumerate(result):
        if message["role"] == "system" and number:
            raise ConversationError(
                f"{context}: message {number + 1} is a system message: it must be the first"
            )
    if not any(message["role"] == "user" for message in result):
        raise ConversationError(f"{context}: no message is the user's")
    return result


def _checked_message(message: Any, context: str) -> Message:
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        role = message["from"]
        message = {"role": LLAVA_ROLES.get(str(role), role), "content": message["value"]}
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        keys = list(message) if isinstance(message, dict) else kind_of(message)
        raise ConversationError(f"{context} must have 'role' and 'content', found {keys}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        raise ConversationError(f"{context}: the role is {kind_of(role)}, not a text")
    if role in REFUSED or message.get("tool_calls") or message.get("function_call"):
        raise ConversationError(f"{context}: tool calls are not supported")
    if role not in ROLES:
        raise ConversationError(f"{context} is of role {role!r}; supported are {', '.join(ROLES)}")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, int | float):
        content = as_text(content)
    if "references" in message:
        message = {**message, "references": checked_references(message["references"])}
    if not isinstance(content, str):
        content = checked_parts(content, context)
        if role != "user" and any(part["type"] == "image" for part in content):
            raise ConversationError(
                f"{context} is of role {role} and holds an image: only the user shows images"
            )
    return {**message, "content": content}


def checked_parts(content: Any, context: str) -> list[Part]:
    """Check a content's parts, or those of an interleaved page. Errors: `ConversationError`."""
    if not isinstance(content, list | tuple) or not all(isinstance(part, dict) for part in content):
        raise ConversationError(
            f"{context}: the content must be a text or a list of parts "
            f"{{'type': 'text', 'text': …}} and {{'type': 'image', …}}, found {kind_of(content)}"
        )
    return [_checked_part(part, context) for part in content]


def _checked_part(part: Part, context: str) -> Part:
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ConversationError(
                f"{context}: a part of type 'text' has {kind_of(part.get('text'))} as its text"
            )
        return part
    if kind == "image":
        return part
    if kind == "image_url":  # OpenAI's
        url = part.get("image_url")
        return {"type": "image", "url": url.get("url") if isinstance(url, dict) else url}
    what = REFUSED.get(str(kind), f"parts of type {kind!r}")
    raise ConversationError(f"{context}: {what}: not supported; texts and images are")


def image_of(part: Part) -> Any:
    """The image that a part carries, None if it carries none; base64 as a `data:` URL."""
    key = next((key for key in IMAGE_KEYS if part.get(key) is not None), None)
    if key == "base64":
        return "data:;base64," + str(part[key])
    return plain_image(part[key]) if key else None


def plain_image(image: Any) -> Any:
    """Bytes or path of an image as `datasets` stores it, {"bytes", "path"}; other forms as they are."""
    if not isinstance(image, dict):
        return image
    return image.get("bytes") or image.get("path") or image.get("bytes")


def locate(image: Any, folder: Path | None) -> Any:
    """Return the path of an image that a file in `folder` names.

    Bytes, and `data:` and web addresses stay as they are. Without a folder, relative paths stay, too.
    """
    image = plain_image(image)
    if not isinstance(image, str) or not image:
        return image
    if image[:5].lower() == "file:":
        image = url2pathname(urlsplit(image).path)
    return image if folder is None or ADDRESS.match(image) else str(folder / image)


def collect_images(record: dict[str, Any]) -> dict[str, Any]:
    """Move the images that parts carry into "images"; each part gets the "index" of its image.

    An image that several parts carry is listed once. Errors: `ConversationError` if only some parts carry
    one, or "images" are there too.
    """
    images: list[Any] = []
    bare = False

    def walk(value: Any) -> Any:
        nonlocal bare
        if isinstance(value, list | tuple):
            return [walk(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        if value.get("type") in ("image", "image_url"):
            image = image_of(_checked_part(value, "the record"))
            if image is None:
                bare = True
                return IMAGE_PART
            if image not in images:
                images.append(image)
            return {**IMAGE_PART, "index": images.index(image)}
        return {**value, "content": walk(value["content"])} if "content" in value else value

    result = {**record, **{key: walk(record[key]) for key in TEXTS if key in record}}
    if images and (bare or record.get("images")):
        raise ConversationError("images stand either in 'images' or in all the parts of type 'image'")
    return {**result, "images": images} if images else result


def placed_conversations(record: dict[str, Any], turns: str) -> list[Conversation]:
    """`conversations_of` with every image at its place; its part has the "index" of the image."""
    conversations = conversations_of(record, turns)
    if any("index" in part for messages in conversations for part in images_of(messages)):
        return conversations  # from `collect_images`
    return [with_images(messages, len(record["images"] or ())) for messages in conversations]


def placed_page(record: dict[str, Any]) -> list[Part]:
    """The parts of an interleaved page; each image has the "index" of its image."""
    parts = checked_parts(record["interleaved"], "the page")
    if any("index" in part for part in parts):
        return parts  # from `collect_images`
    return _numbered(parts, len(record["images"]), "the page")


def kind_of(value: Any) -> str:
    """Name the type of a value, and those of a list's entries; the content may be long."""
    if not isinstance(value, list | tuple):
        return type(value).__name__
    parts = sorted({type(part).__name__ for part in value})
    return f"{type(value).__name__} of {', '.join(parts) or 'nothing'}"


def with_images(messages: Conversation, count: int, context: str = "the conversation") -> Conversation:
    """Give each of `count` images a place, and each place the "index" of its image.

    Errors: `ConversationError` if there are places for more or fewer images.
    """
    image_parts = len(images_of(messages))
    if not image_parts and any(PLACEHOLDER in text_of(m) for m in messages if m["role"] == "user"):
        messages = [
            {**m, "content": [part for p in parts_of(m) for part in split_at_images(p["text"])]}
            if m["role"] == "user"
            else m
            for m in messages
        ]
        image_parts = len(images_of(messages))
    if not image_parts:
        return show_first(messages, [{**IMAGE_PART, "index": i} for i in range(count)])
    numbered = iter(_numbered([part for m in messages for part in parts_of(m)], count, context))
    return [{**m, "content": list(islice(numbered, len(parts_of(m))))} for m in messages]


def _numbered(parts: list[Part], count: int, context: str) -> list[Part]:
    """Give each image part the "index" of its image. Errors: `ConversationError` unless there are `count`."""
    image_parts = sum(part["type"] == "image" for part in parts)
    if image_parts != count:
        raise ConversationError(
            f"{context} has places for {image_parts} images, and {count} are given", "image_count"
        )
    numbers = iter(range(count))
    return [{**part, "index": next(numbers)} if part["type"] == "image" else part for part in parts]


def split_at_images(text: str, placeholder: re.Pattern[str] = PLACEHOLDERS) -> list[Part]:
    """Split a text at its placeholders into text and image parts.

    >>> split_at_images("<image>\\nWhat?")
    [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]
    """
    parts: list[Part] = []
    start = 0
    for match in placeholder.finditer(text):
        parts += [text_part(text[start : match.start()]), IMAGE_PART]
        start = match.end()
    parts.append(text_part(text[start:]))
    return [part for part in parts if part["type"] == "image" or part["text"]]


def show_first(messages: Conversation, images: list[Part]) -> Conversation:
    """Add images at the head of the first user message; without one, they are left out."""
    first = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None or not images:
        return messages
    changed = {**messages[first], "content": [*images, *parts_of(messages[first])]}
    return [*messages[:first], changed, *messages[first + 1 :]]


def images_of(messages: Conversation) -> list[Part]:
    """The image parts of a conversation, in order."""
    return [part for message in messages for part in parts_of(message) if part["type"] == "image"]


def without(messages: Conversation, start: int, stop: int) -> Conversation:
    """Leave out `messages[start:stop]`; the next user message shows their images."""
    return [*messages[:start], *show_first(messages[stop:], images_of(messages[start:stop]))]


def conversations_of(record: dict[str, Any], turns: str) -> list[Conversation]:
    """A record's conversations. `turns`: "texts" are independent questions ("branch") or one ("chain").

    Errors: `ConversationError` for a conversation that is not of the format.
    """
    if "texts" in record:
        conversations = [_pair(turn) for turn in record["texts"] or ()]
        if (record.get("turns") or turns) == "chain" and conversations:
            conversations = [[message for pair in conversations for message in pair]]
    elif "conversations" in record:
        many = record["conversations"]
        if not isinstance(many, list | tuple):
            raise ConversationError(f"'conversations': expected a list, found {kind_of(many)}")
        if many and isinstance(many[0], dict):  # LLaVA's: the messages of one
            many = [many]
        conversations = [checked(messages, f"conversation {n}") for n, messages in enumerate(many, 1)]
    else:
        conversations = [checked(record.get("messages"))]
    if references := checked_references(record.get("references") or []):
        exchanges = [exchanges_of(messages) for messages in conversations]
        asked = [repr(m[: e[-1][1] - 1]) for m, e in zip(conversations, exchanges, strict=True) if e]
        if any(len(e) > 1 for e in exchanges) or len(set(asked)) > 1:
            raise ConversationError(
                "'references' stands beside several questions: put it into the answers' messages",
                "references",
            )
        for messages, own in zip(conversations, exchanges, strict=True):
            for _, end in own:
                messages[end - 1] = {**messages[end - 1], "references": references}
    return conversations


def checked_references(references: Any) -> list[str]:
    """Further right answers as texts. Errors: `ConversationError`."""
    if not isinstance(references, list | tuple):
        raise ConversationError(f"'references' is {kind_of(references)}, not a list of texts", "references")
    return [text for text in map(as_text, references) if text]


def _pair(turn: Any) -> Conversation:
    """A pair as two messages; keys beside the texts (ratings, references) belong to the answer."""
    turn = turn if isinstance(turn, dict) else {}
    if turn.get("references"):
        turn = {**turn, "references": checked_references(turn["references"])}
    further = {key: value for key, value in turn.items() if key not in (*QUESTIONS, *ANSWERS)}
    question, answer = (
        next((turn[key] for key in keys if key in turn), None) for keys in (QUESTIONS, ANSWERS)
    )
    return [
        {"role": "user", "content": as_text(question)},
        {"role": "assistant", "content": as_text(answer), **further},
    ]


def as_text(value: Any) -> str:
    """A valid text as it is, a number as text; anything else is "", which is dropped and counted later.

    So one bad entry of 100,000 does not stop a run.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:  # NaN
        return ""
    text = str(value)
    return "" if HALF_CHARACTER.search(text) else text


def exchanges_of(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Return start and end of each exchange: the user's messages and the assistant's answer to them.

    A system message belongs to none, and messages after the last answer to none either.
    """
    result, start = [], sum(message["role"] == "system" for message in messages[:1])
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            result.append((start, number + 1))
            start = number + 1
    return result
