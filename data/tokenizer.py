"""The tokenizer and its special tokens. Ids: text and chat tokens, then the image token, then the markers."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from configs.model import MAX_GRID, Vocabulary
from utils.errors import UserError
from utils.files import in_cache, write_text

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE, GLOBAL_IMAGE = "<|image|>", "<|global_image|>"
CHAT_TOKENS = (TURN_START, TURN_END)  # embedded by the right tower
TILE_MARKERS = tuple(f"<row_{r}_col_{c}>" for r in range(1, MAX_GRID + 1) for c in range(1, MAX_GRID + 1))
# The placeholder, then the markers in nanoVLM's order; embedded by the left tower only.
IMAGE_TOKENS = (IMAGE, GLOBAL_IMAGE, *TILE_MARKERS)

# The renderer's format (ChatML) for other libraries: one placeholder per image, before the text of its turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] != 'text' %}{{ '<|image|>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Tokenizer:
    """Text → ids and back. Special-token strings in text stay text: only the renderer adds special tokens."""

    def __init__(self, backend: HFTokenizer) -> None:
        self.backend = backend
        backend.encode_special_tokens = True
        special = [backend.token_to_id(token) for token in (*CHAT_TOKENS, *IMAGE_TOKENS)]
        ids = [i for i in special if i is not None]
        size = backend.get_vocab_size()
        if len(ids) < len(special) or ids[2:] != list(range(size - len(IMAGE_TOKENS), size)):
            raise UserError(
                f"the tokenizer lacks {' '.join(CHAT_TOKENS)}, or "
                f"{IMAGE} {GLOBAL_IMAGE} {TILE_MARKERS[0]} … {TILE_MARKERS[-1]} at its end"
            )
        self.turn_start, self.turn_end, self.image, self.global_image = ids[:4]
        self.tile_markers = ids[4:]

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(text_size=self.image, markers=len(IMAGE_TOKENS) - 1)

    def fingerprint(self) -> str:
        """Return a hash, 32 hex digits, of the whole tokenizer."""
        return hashlib.blake2b(self.backend.to_str().encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise UserError(f"text that is not Unicode cannot be turned into tokens: {text[:40]!r}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Convert ids to text, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def show(self, token: int) -> str:
        """Format one token for people: spaces as ·, line ends as \\n, special tokens by their names."""
        text = self.backend.decode([token], skip_special_tokens=False)
        return text.replace(" ", "·").replace("\n", "\\n") or "∅"

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE of at most `vocab_size` text tokens; it can encode any string."""
        backend = HFTokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens([*CHAT_TOKENS, *IMAGE_TOKENS])
        return cls(backend)

    @classmethod
    def of_language_model(cls, folder: Path, rows: int, impose_chatml: bool) -> "Tokenizer":
        """Load a pretrained model's tokenizer and append this project's tokens.

        `rows` is the length of the model's embedding table. Padding tokens fill unused rows, so that every
        old token keeps its row. Conversations are rendered in ChatML: a model with another chat template,
        or none, raises `UserError` unless `impose_chatml`.
        """
        template = _chat_template(folder)
        if not impose_chatml and TURN_START not in (template or ""):
            what = (
                "has no chat template"
                if template is None
                else f"has a chat template that is not ChatML (no {TURN_START})"
            )
            raise UserError(
                f"the tokenizer of {folder} {what}: take an instruction-tuned model that speaks ChatML, "
                "or teach it that with --data.chat_template chatml"
            )
        backend = _read(folder)
        top = max(backend.get_vocab(with_added_tokens=True).values())
        if top >= rows:
            raise UserError(
                f"the tokenizer of {folder} has ids up to {top}, its embedding table {rows} rows: "
                "they do not belong together"
            )
        backend.add_special_tokens(list(CHAT_TOKENS))
        backend.add_special_tokens([f"<|padding_{i}|>" for i in range(rows - backend.get_vocab_size())])
        backend.add_special_tokens(list(IMAGE_TOKENS))
        return cls(backend)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, also for `transformers.AutoTokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": TURN_END,
            "pad_token": TURN_END,
            "padding_side": "left",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
        }
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        return cls(_read(folder))


def _read(folder: Path) -> HFTokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no tokenizer.json: not a complete model folder")
    try:
        backend = HFTokenizer.from_file(str(path))
        backend.no_truncation()  # the file may hold settings of another use
        backend.no_padding()
        return backend
    except Exception as error:  # the library raises bare Exception for any damage
        raise UserError(f"{path} cannot be read as a tokenizer: {error}{in_cache(path)}") from None


def _chat_template(folder: Path) -> str | None:
    """Read a model's chat template, from `chat_template.jinja` or `tokenizer_config.json`; None if absent."""
    try:
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        path = folder / "tokenizer_config.json"
        template = (
            json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None
        )
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'tokenizer_config.json'} cannot be read: {error}") from None
    return template if isinstance(template, str | None) else json.dumps(template)  # several named templates
