"""Mark near duplicates among training records: near-equal images with the same questions.

  python -m tools.duplicates --data.sources openmoji --output duplicates.parquet
  bash train.sh --data.sources openmoji --data.curation duplicates.parquet

Two records are duplicates if their questions are equal and the perceptual hashes of their images (64 bits,
`imagehash.phash`) differ by at most `--bits` bits. Answers and captions are not compared. The first record
of a group is kept. Validation records are compared first, so a training record that resembles one is
marked. Use the same --data.sources as for training.

Flags, besides those of a configuration:"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.conversations import ConversationError, conversations_of, text_of
from data.curation import write_marks
from data.images import open_image
from data.mixture import Source
from data.parquet import UnreadableBlock
from data.sources import open_sources
from tools.inspection import arguments, track_progress
from utils.errors import ImageError, UserError, run_script

OWN: dict[str, tuple[Any, str]] = {
    "output": ("duplicates.parquet", "file to write"),
    "bits": (4, "bits by which the hashes of near images may differ"),
}
HASH_BITS = 64


class NearHashes:
    """Keys with 64-bit hashes; finds one whose hashes all differ by `bits` at most.

    A hash is cut into `bits` + 1 bands. Two hashes that differ in `bits` bits agree in one band at least, so
    only keys that share a band are compared.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        cuts = [HASH_BITS * i // (bits + 1) for i in range(bits + 2)]
        self.bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(cuts)]
        self.tables: list[dict[Any, list[tuple[tuple[int, ...], str]]]] = [
            defaultdict(list) for _ in self.bands
        ]

    def find(self, hashes: tuple[int, ...], context: str) -> str | None:
        """Return the first key with near hashes, as many, in the same `context`; None if there is none."""
        for (shift, mask), table in zip(self.bands, self.tables, strict=True):
            for other, key in table[context, (hashes[0] >> shift) & mask]:
                if len(other) == len(hashes) and all(
                    (a ^ b).bit_count() <= self.bits for a, b in zip(hashes, other, strict=True)
                ):
                    return key
        return None

    def add(self, hashes: tuple[int, ...], context: str, key: str) -> None:
        for (shift, mask), table in zip(self.bands, self.tables, strict=True):
            table[context, (hashes[0] >> shift) & mask].append((hashes, key))


def hashes_of(record: dict[str, Any]) -> tuple[int, ...]:
    """Return the perceptual hash of each image. Errors: `ImageError`."""
    import imagehash

    return tuple(int(str(imagehash.phash(open_image(image))), 16) for image in record["images"] or ())


def questions_of(record: dict[str, Any]) -> str:
    """Return all that the user says."""
    if "interleaved" in record:  # of a page, all texts
        return repr([part.get("text") for part in record["interleaved"]])
    try:
        conversations = conversations_of(record, "branch")
    except ConversationError:
        return ""
    asked = {text_of(m) for messages in conversations for m in messages if m["role"] == "user"}
    return "\n".join(sorted(asked))


def numbered(sources: list[Source], is_training: bool) -> Iterator[tuple[bool, Source, int]]:
    for source in sources:
        for number in range(source.start, source.stop):
            yield is_training, source, number


def main(argv: list[str]) -> None:
    args, config, _ = arguments(argv, str(__doc__), OWN)
    if args.bits >= HASH_BITS:
        raise UserError(f"--bits = {args.bits}: a hash has {HASH_BITS}")
    try:
        import imagehash  # noqa: F401
    except ImportError:
        raise UserError("imagehash is not installed: pip install 'dualtowervlm[curation]'") from None
    training, validation = open_sources(config.data)
    records = [*numbered(validation, False), *numbered(training, True)]
    near, rows = NearHashes(args.bits), []
    for is_training, source, number in track_progress(records, len(records), "records compared"):
        try:
            record = source.records[number]
            hashes, asked = hashes_of(record), questions_of(record)
        except (ImageError, UnreadableBlock):
            continue
        if not hashes:
            continue
        first = near.find(hashes, asked)
        if first is None:
            near.add(hashes, asked, f"{source.name} {number}" + ("" if is_training else " of validation"))
        elif is_training:
            rows.append({"source": source.name, "record": number, "duplicate_of": first})
    write_marks(Path(args.output), rows, "duplicate_of", training)
    print(f"{args.output}: {len(rows):,} of {sum(map(len, training)):,} training records are duplicates")


if __name__ == "__main__":
    run_script(main)
