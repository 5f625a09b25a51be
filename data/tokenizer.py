"""The tokenizer, its special tokens and its chat template.

Order of ids: text and chat tokens, the image token, the markers. A chat template writes messages as text, as
transformers' `apply_chat_template` does. A saved template is self-contained: it holds what transformers would
fill in (special tokens, today's date, a default system message). So every program renders the same text, and
a resumed run too.
"""

import datetime
import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from configs.model import MAX_GRID, Vocabulary
from utils.errors import UsageError, UserError
from utils.files import in_cache, refuse_pointer, write_text

IMAGE = "<|image|>"  # the placeholder of an image in text
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")  # ChatML's; embedded by the right tower
GLOBAL_IMAGE = "<|global_image|>"
TILE_MARKERS = tuple(f"<row_{r}_col_{c}>" for r in range(1, MAX_GRID + 1) for c in range(1, MAX_GRID + 1))
# The placeholder, then the markers in nanoVLM's order; embedded by the left tower only.
IMAGE_TOKENS = (IMAGE, GLOBAL_IMAGE, *TILE_MARKERS)
# Unicode's noncharacters, which no text contains: within a special token's name that is only text, and around
# the names by which `literal` knows special tokens.
TEXT_MARK, NAME_MARK = "\ufdd0", "\ufdd1"

Message = dict[str, Any]  # "role", and "content": a text

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# Contents that are lists of parts become text, so that templates for text alone take messages with images.
LISTS = f"""\
{{%- set joined = namespace(messages=[], content="") -%}}
{{%- for message in messages -%}}
{{%- if message.content is string or message.content is not iterable -%}}
{{%- set joined.messages = joined.messages + [message] -%}}
{{%- else -%}}
{{%- set joined.content = "" -%}}
{{%- for part in message.content -%}}
{{%- set joined.content = joined.content + (part.text if part.type == "text" else "{IMAGE}") -%}}
{{%- endfor -%}}
{{%- set joined.messages = joined.messages + [dict(message, content=joined.content)] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- set messages = joined.messages -%}}
"""

# The reverse, for templates that take nothing but lists.
AS_LISTS = """\
{%- set listed = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set part = {"type": "text", "text": message.content} -%}
{%- set listed.messages = listed.messages + [dict(message, content=[part])] -%}
{%- endfor -%}
{%- set messages = listed.messages -%}
"""

NO_THINKING = "{%- set enable_thinking = false -%}\n"
# A saved template stands between START and END: they mark the assistant's turns for transformers and TRL
# (`return_assistant_tokens_mask`, `assistant_only_loss`). AS_HISTORY gives the last message the form of
# earlier ones: another message follows it, and is cut off.
START, END = "{%- set rendered %}", "{% endset %}\n"
MARKED = (
    START
    + "TEMPLATE"
    + END
    + """\
{%- for turn in rendered.split(HEADER) -%}
{%- if loop.first -%}{{- turn -}}
{%- elif TURN_END in turn -%}
{%- set answer = turn.split(TURN_END)[0] + TURN_END -%}
{{- HEADER -}}{%- generation -%}{{- answer -}}{%- endgeneration -%}{{- turn[answer | length:] -}}
{%- else -%}{{- HEADER + turn -}}
{%- endif -%}
{%- endfor -%}
"""
)
AS_HISTORY = (
    """\
{%- set answered = messages and messages[-1].role == "assistant" -%}
{%- set more = [{"role": "user", "content": NEXT}] if answered else [] -%}
{%- set messages = messages + more -%}
"""
    + START
    + "TEMPLATE"
    + END
    + """\
{%- if answered -%}
{%- set rendered = rendered.split(NEXT)[0].rsplit(TURN_END, 1)[0] + TURN_END -%}
{%- endif -%}
{{- rendered -}}
"""
)
GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)((?:end)?generation)(\s*[-+]?%\})")
SYSTEM = """\
{%- if not messages or messages[0].role != "system" -%}
{%- set messages = [{"role": "system", "content": SYSTEM_TEXT}] + messages -%}
{%- endif -%}
"""


class TextEncoder:
    """Text → ids. What is said never becomes a special token: only a chat template writes those."""

    def __init__(self, backend: HFTokenizer, template: str) -> None:
        """`template`: the chat template. Errors: `UserError` for a tokenizer without our tokens."""
        self.backend = backend
        size = backend.get_vocab_size()
        image_ids = list(range(size - len(IMAGE_TOKENS), size))
        if [backend.token_to_id(token) for token in IMAGE_TOKENS] != image_ids:
            raise UserError(
                f"the tokenizer lacks {IMAGE} {GLOBAL_IMAGE} "
                f"{TILE_MARKERS[0]} … {TILE_MARKERS[-1]} at its end"
            )
        self.image, self.global_image, *self.tile_markers = image_ids
        added = backend.get_added_tokens_decoder()
        self.special = {
            token.content: number
            for number, token in added.items()
            if token.special or token.content in template  # a control token, though not flagged as one
        }
        longest_first = sorted(self.special, key=len, reverse=True)
        self.special_pattern = re.compile("|".join(map(re.escape, longest_first)))
        self.special_ids = frozenset(self.special.values())
        self._encode_head = lru_cache(1024)(self.encode_rendered)

    def encode(self, text: str) -> list[int]:
        """Convert text to ids; names of special tokens in it are text, too."""
        return self.encode_rendered(self.as_text(text))

    def as_text(self, text: str) -> str:
        """Mark the special tokens in `text` as text, for `encode_rendered`."""
        text = text.replace(TEXT_MARK, "").replace(NAME_MARK, "")
        return self.special_pattern.sub(lambda name: name[0][0] + TEXT_MARK + name[0][1:], text)

    def encode_rendered(self, text: str) -> list[int]:
        """Convert text that a chat template wrote to ids. `as_text` was applied to what it was given."""
        try:
            if TEXT_MARK not in text:
                return self.backend.encode(text, add_special_tokens=False).ids
            text = self.special_pattern.sub(lambda name: self._literal_name(self.special[name[0]]), text)
            return self.literal.encode(text.replace(TEXT_MARK, ""), add_special_tokens=False).ids
        except TypeError:
            raise UserError(f"text that is not Unicode cannot be turned into tokens: {text[:40]!r}") from None

    @cached_property
    def literal(self) -> HFTokenizer:
        """The same tokenizer, in which special tokens have names that no text contains."""
        whole: dict[str, Any] = json.loads(self.backend.to_str())
        names = {token: self._literal_name(number) for token, number in self.special.items()}
        for token in whole["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = whole["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
        else:  # a unigram model's pairs of token and score
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        return HFTokenizer.from_str(json.dumps(whole))

    @staticmethod
    def _literal_name(number: int) -> str:
        return f"{NAME_MARK}{number}{NAME_MARK}"

    def turn_tokens(self, text: str, ids: list[int], starts: Sequence[int]) -> list[tuple[int, int]]:
        """Start and end, in `ids`, of the turns that begin at `starts` in `text`.

        The token that ends a turn is part of it. `ids` are those of `text`, which a chat template wrote.
        Special tokens tell where in `ids`: contents hold none, so the n-th of `text` is the n-th of `ids`.
        """
        special = [i for i, token in enumerate(ids) if token in self.special_ids]
        in_text = [match.start() for match in self.special_pattern.finditer(text)]
        turns = []
        for first in starts:
            count = bisect_left(in_text, first)
            head = self._encode_head(text[in_text[count - 1] if count else 0 : first])
            start = special[count - 1] if count else 0
            shared = zip(head, ids[start:], strict=False)
            start += next((n for n, (a, b) in enumerate(shared) if a != b), len(head))
            turns.append((start, special[count] + 1))
        return turns

    def image_block(self, grid: tuple[int, int], tokens_per_tile: int) -> list[int]:
        """Return the token ids of one image, split into `grid` = (rows, columns) tiles."""
        markers = [self.global_image]
        if grid != (1, 1):
            rows, columns = grid
            markers += [self.tile_markers[r * MAX_GRID + c] for r in range(rows) for c in range(columns)]
        return [token for marker in markers for token in (marker, *[self.image] * tokens_per_tile)]


class Tokenizer(TextEncoder):
    """A `TextEncoder` with its checked chat template; it decodes, too."""

    def __init__(self, backend: HFTokenizer, template: str) -> None:
        """Errors: as in `TextEncoder`, and `UsageError` for an unfit template."""
        super().__init__(backend, template)
        self.template = ChatTemplate(template, self.special_pattern)
        self.turn_end = self.special[self.template.turn_end]

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(text_size=self.image, markers=len(IMAGE_TOKENS) - 1)

    def fingerprint(self) -> str:
        """Return a hash, 32 hex digits, of the whole tokenizer, its chat template included."""
        whole = self.backend.to_str() + self.template.source
        return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()

    def decode(self, ids: Iterable[int]) -> str:
        """Convert ids to text, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def show(self, token: int) -> str:
        """Format one token for people: spaces as ·, line ends as \\n, special tokens by their names."""
        text = self.backend.decode([token], skip_special_tokens=False)
        return text.replace(" ", "·").replace("\n", "\\n") or "∅"

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, template: str = "auto", system: str = ""
    ) -> "Tokenizer":
        """Train a byte-level BPE of at most `vocab_size` text tokens; it can encode any string.

        `template`: "auto" and "chatml" are ChatML; else a Jinja file. `system`: the default system message.
        """
        backend = HFTokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens([*CHAT_TOKENS, *IMAGE_TOKENS])
        source = CHATML if template in ("auto", "chatml") else _read_template(template)
        return cls(backend, self_contained(source, {}, system, datetime.datetime.now()))._checked(system)

    @classmethod
    def of_language_model(
        cls, folder: Path, rows: int, template: str = "auto", system: str = ""
    ) -> "Tokenizer":
        """Load a pretrained model's tokenizer and append this project's tokens.

        `rows` is the length of the model's embedding table. Padding tokens fill unused rows, so that every
        old token keeps its row. `template`: "auto", the model's own; "chatml"; or a Jinja file. `system`: the
        default system message. Errors: `UserError` for a model without a template, `UsageError` for an unfit
        one.
        """
        backend, settings = _read(folder), _settings(folder)
        source = settings["chat_template"] if template == "auto" else None
        if template == "auto" and source is None:
            raise UserError(
                f"the tokenizer of {folder} has no chat template: take an instruction-tuned model, "
                "or teach it one with --data.chat_template chatml or FILE.jinja"
            )
        if source is None:
            source = CHATML if template == "chatml" else _read_template(template)
        top = max(backend.get_vocab(with_added_tokens=True).values())
        if top >= rows:
            raise UserError(
                f"the tokenizer of {folder} has ids up to {top}, its embedding table {rows} rows: "
                "they do not belong together"
            )
        backend.add_special_tokens(
            [token for token in CHAT_TOKENS if template == "chatml" or token in source]
        )
        backend.add_special_tokens([f"<|padding_{i}|>" for i in range(rows - backend.get_vocab_size())])
        backend.add_special_tokens(list(IMAGE_TOKENS))
        special = {name: settings[name] for name in ("bos_token", "eos_token") if settings.get(name)}
        try:
            tokenizer = cls(backend, self_contained(source, special, system, datetime.datetime.now()))
        except UsageError as error:
            raise UsageError(f"{folder}: {error}; or take ChatML: --data.chat_template chatml") from None
        return tokenizer._checked(system)

    def _checked(self, system: str) -> "Tokenizer":
        if name := self.special_pattern.search(system):
            raise UsageError(f"--data.system holds the special token {name[0]}: leave it out")
        if system and not self.template.has_system:
            raise UsageError("--data.system: the model's chat template has no system role: leave it out")
        return self

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, also for `transformers.AutoTokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.template.turn_end,
            "pad_token": self.template.turn_end,
            "padding_side": "left",
            "chat_template": self.template.source,
            "clean_up_tokenization_spaces": False,
        }
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        return cls(_read(folder), _settings(folder)["chat_template"] or CHATML)


def _read(folder: Path) -> HFTokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no tokenizer.json: not a complete model folder")
    refuse_pointer(path)
    try:
        backend = HFTokenizer.from_file(str(path))
        backend.no_truncation()  # the file may hold settings of another use
        backend.no_padding()
        return backend
    except Exception as error:  # the library raises bare Exception for any damage
        raise UserError(f"{path} cannot be read as a tokenizer: {error}{in_cache(path)}") from None


def _settings(folder: Path) -> dict[str, Any]:
    """Read `tokenizer_config.json` and `chat_template.jinja`: the chat template, or None, and special tokens.

    Of several named templates the one called "default" counts.
    """
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        template = settings.get("chat_template")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        special = {name: settings.get(name) for name in ("bos_token", "eos_token")}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    content = {
        name: token["content"] if isinstance(token, dict) else token for name, token in special.items()
    }
    return content | {"chat_template": template}


def _read_template(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--data.chat_template is auto, chatml or a Jinja file; {file} cannot be read: {error}"
        ) from None


def self_contained(template: str, special: dict[str, str], system: str, date: datetime.datetime) -> str:
    """Fill in a template what transformers would: `special` (`bos_token`, …) and the date of `strftime_now`.

    `system`: the system message of conversations without one; "": what the template itself does.
    """
    head = "" if LISTS in template else LISTS
    for name, token in special.items():
        if name in template:
            head += f"{{%- set {name} = {_quoted(token)} -%}}\n"
    if system:
        head += SYSTEM.replace("SYSTEM_TEXT", _quoted(system))
    template = re.sub(
        r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: _quoted(date.strftime(call[2])), template
    )
    if re.search(r"strftime_now\s*\(", template):
        raise UsageError("the chat template cannot be used: it computes the format of a date")
    return head + template


def _quoted(text: str) -> str:
    """A Jinja string."""
    return json.dumps(text, ensure_ascii=False)


class ChatTemplate:
    """A chat template, checked: what has been said never changes when a message is added.

    `special` matches the tokenizer's special tokens. `turn_end` is the one that ends an assistant's message,
    `header` what stands between a user's text and the answer.
    A template that thinks is rendered without thinking. Where it gives the last message a form of its own
    (Qwen3's empty thoughts, Phi 3's end of text), all messages have the form of earlier ones.
    Errors: `UsageError` for a template that cannot be used, with the reason.
    """

    def __init__(self, source: str, special: re.Pattern[str]) -> None:
        self.special = special
        source = _unmarked(source)
        for_texts = source.replace(LISTS, "")  # faster, for contents that are texts
        problems = []
        for lists, variables, self.as_history in product(
            ("", AS_LISTS), ({"enable_thinking": False}, {}), (False, True)
        ):
            self.for_texts = lists + for_texts
            self.variables: dict[str, Any] = dict(variables)
            if not (problem := self._check()):
                break
            problems.append(problem)
        else:
            raise UsageError(f"the chat template cannot be used: {problems[0]}")
        whole = source if not lists else LISTS + self.for_texts
        if self.variables and "enable_thinking" in source and NO_THINKING not in source:
            whole = NO_THINKING + whole
        self.source = self._marked(whole)
        self.has_system = not self._check(system="omega")

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Render `messages`, whose contents are texts. Errors: `UsageError` if the template refuses them."""
        if not self.has_system and any(message["role"] == "system" for message in messages):
            raise UsageError("the model's chat template has no system role")
        return self._text(messages, add_generation_prompt)

    def _text(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        if self.as_history and messages[-1]["role"] == "assistant":
            text = self._render([*messages, _message("user", "gamma")], False)
            end = self.special.search(text, len(self._text(messages[:-1], True)))
            return text[: end.end()] if end else text
        return self._render(messages, add_generation_prompt)

    def _marked(self, source: str) -> str:
        """The template that is saved: `source` with marks around the assistant's turns."""
        own = {"generation": "if true", "endgeneration": "endif"}  # its own marks
        source = GENERATION_TAG.sub(lambda tag: tag[1] + own[tag[2]] + tag[3], source)
        names = {"HEADER": self.header, "TURN_END": self.turn_end, "NEXT": NAME_MARK}
        for frame in (AS_HISTORY,) * self.as_history + (MARKED,):
            for name, text in names.items():
                frame = frame.replace(name, _quoted(text))
            source = frame.replace("TEMPLATE", source.removesuffix("\n"))
        return source

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template  # 0.5 s

        try:
            rendered = render_jinja_template(
                [messages],
                chat_template=self.for_texts,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )[0][0]
        except Exception as error:  # a template is a program, which may raise anything
            raise UsageError(f"the model's chat template refuses the conversation: {error}") from error
        return str(rendered)

    def _check(self, system: str = "") -> str:
        """Return why the template cannot be used in this form, or not with a system message; "": it can."""
        roles, words = ("user", "assistant") * 2, ("alpha", "beta", "gamma", "delta")
        chat = [_message(role, word) for role, word in zip(roles, words, strict=True)]
        first = [_message("system", system)] if system else []
        try:
            texts = [self._text(first + chat[:n], n % 2 == 1) for n in (1, 2, 3, 4)]
        except UsageError as error:
            return str(error)
        if system not in texts[0]:
            return "it leaves out the system message"
        if any(not longer.startswith(shorter) for shorter, longer in pairwise(texts)):
            return "an earlier message changes when one is added"
        match = re.fullmatch(r".*alpha(.*)beta(.*)gamma.*delta(.*)", texts[-1], re.DOTALL)
        if match is None:
            return "it leaves out what user or assistant said"
        to_assistant, to_user, end = match.groups()
        if to_assistant == to_user:
            return "it has no roles: what user and assistant say looks alike"
        ending = self.special.search(end)
        if ending is None:
            return "no special token of the tokenizer ends what the assistant says"
        self.turn_end = ending[0]
        self.header = texts[0].partition("alpha")[2]
        if not texts[1][len(texts[0]) :].lstrip().startswith("beta"):
            return "an answer does not follow what asks for it"
        return ""


def _unmarked(source: str) -> str:
    """What `ChatTemplate._marked` was given, of a saved template; another one as it is."""
    while START in source:
        source = source[source.index(START) + len(START) : source.rindex(END)]
    return source


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": text}
