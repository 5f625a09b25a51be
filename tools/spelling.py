"""Token ids → readable text, for the pages of `tools.preview`."""

from functools import cache

from data.tokenizer import Tokenizer


@cache
def _bytes_of_letters() -> dict[str, int]:
    """Map each letter of byte-level BPE to its byte (GPT-2's table).

    Printable bytes are written as themselves, the others as letters from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


def visible(text: str) -> str:
    """Show white space as signs; escape unprintable letters and those that change the writing direction."""
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    return "".join(signs.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


def _hex(piece: bytes) -> str:
    return piece.hex(" ").upper()


class Spelling:
    """Token ids → readable text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend, self.image = tokenizer.backend, tokenizer.image
        added = self.backend.get_added_tokens_decoder()
        self.special = {number: token.content for number, token in added.items()}
        self.byte_level = "ByteLevel" in repr(self.backend.decoder)

    def of(self, ids: list[int]) -> list[tuple[str, str]]:
        """Return (text, note) of each token.

        A letter that is split over several tokens shows as their bytes, and the note names the letter:
        "é" in two tokens → [("C3", "bytes of é"), ("A9", "bytes of é")]
        """
        out: list[tuple[str, str]] = []
        waiting: list[bytes] = []  # tokens that do not end a letter yet
        for token in ids:
            raw = None if token in self.special else self._raw(token)
            if raw is None:
                out += [(_hex(piece), "bytes") for piece in waiting]
                out.append((visible(self.special[token]), ""))
                waiting = []
                continue
            waiting.append(raw)
            try:
                text = visible(b"".join(waiting).decode())
            except UnicodeDecodeError:
                continue
            if len(waiting) == 1:
                out.append((text, ""))
            else:
                out += [(_hex(piece), f"bytes of {text}") for piece in waiting]
            waiting = []
        return out + [(_hex(piece), "bytes") for piece in waiting]

    def _raw(self, token: int) -> bytes:
        letters = self.backend.id_to_token(token)
        if self.byte_level:
            return bytes(_bytes_of_letters()[c] for c in letters)
        return letters.replace("▁", " ").encode()
