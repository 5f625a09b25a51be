"""CLIP scores and duplicate marks of training records, from `tools.score` and `tools.duplicates`.

A file is Parquet with one row per marked record: its "source", its number there ("record"), and its
"clip_score" or the record that it is a "duplicate_of".
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from data.conversations import TEXTS
from data.mixture import Source
from utils.errors import UserError
from utils.files import replacing

FIRST = 8  # records that tell whether a set is still the same


class Marks:
    """The marks of `sources` in `files`. A record has none where no file has a row for it."""

    def __init__(self, files: str, sources: list[Source]) -> None:
        """`files`: paths with commas between. Errors: `UserError` for marks of other data."""
        identities = {source.name: identity(source) for source in sources}
        self.scores = {s.name: np.full(len(s.records), np.nan, np.float32) for s in sources}
        self.duplicates = {s.name: np.zeros(len(s.records), bool) for s in sources}
        for file in filter(None, map(str.strip, files.split(","))):
            table, marked = _read(file)
            if not marked.keys() & identities.keys():
                raise UserError(
                    f"data.curation: {file} has marks of {', '.join(marked)}, not of {', '.join(identities)}"
                )
            for name in marked.keys() & identities.keys():
                if marked[name] != identities[name]:
                    raise UserError(
                        f"data.curation: {file} was made for other records of {name} than there are now: "
                        "make it again"
                    )
                rows = table[table["source"] == name]
                if "clip_score" in rows:
                    self.scores[name][rows["record"]] = rows["clip_score"]
                if "duplicate_of" in rows:
                    self.duplicates[name][rows["record"]] = True

    def score(self, source: str, record: int) -> float | None:
        """Return a record's CLIP score, or None."""
        value = self.scores[source][record]
        return None if np.isnan(value) else float(value)

    def is_duplicate(self, source: str, record: int) -> bool:
        return bool(self.duplicates[source][record])


def identity(source: Source) -> list[Any]:
    """Return the number of a source's records and a hash of what its first ones say."""
    records = [source.records[number] for number in range(min(FIRST, len(source.records)))]
    texts = [[record.get(key) for key in TEXTS] for record in records]
    return [len(source.records), hashlib.blake2b(repr(texts).encode(), digest_size=8).hexdigest()]


def _read(file: str) -> tuple[Any, dict[str, list[Any]]]:
    """Return a file's rows and the `identity` of each source that it was made for."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
        return table.to_pandas(), json.loads(table.schema.metadata[b"records"])
    except (OSError, ValueError, LookupError, TypeError) as error:  # of another program, perhaps
        raise UserError(f"data.curation: {file} cannot be read as marks of records: {error!r}") from None


def write_marks(path: Path, rows: list[dict[str, Any]], column: str, sources: list[Source]) -> None:
    """Write rows of "source", "record" and `column`, "clip_score" or "duplicate_of"."""
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.float32() if column == "clip_score" else pyarrow.string()
    marked = json.dumps({source.name: identity(source) for source in sources})
    schema = pyarrow.schema(
        {"source": pyarrow.string(), "record": pyarrow.int64(), column: kind}, {"records": marked}
    )
    with replacing(path) as temp_path:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), temp_path)
