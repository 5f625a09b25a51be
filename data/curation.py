"""Marks of training records, made by `tools.score` and `tools.duplicates`: one Parquet file each.

A row names a source and a record of it, by number. It has the record's "clip_score", or the record that it is
a "duplicate_of".
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data.mixture import Source
from utils.errors import UserError
from utils.files import replacing


class Marks:
    """The marks of `sources` in `files`. A record has none where no file has a row for it."""

    def __init__(self, files: str, sources: list[Source]) -> None:
        """`files`: paths with commas between. Errors: `UserError` for marks of other data."""
        counts = {source.name: len(source.records) for source in sources}
        self.scores = {name: np.full(n, np.nan, np.float32) for name, n in counts.items() if files}
        self.duplicates = {name: np.zeros(n, bool) for name, n in counts.items() if files}
        for file in filter(None, map(str.strip, files.split(","))):
            table, marked = _read(file)
            if not marked.keys() & counts.keys():
                raise UserError(
                    f"data.curation: {file} has marks of {', '.join(marked)}, not of {', '.join(counts)}"
                )
            for name in marked.keys() & counts.keys():
                if marked[name] != counts[name]:
                    raise UserError(
                        f"data.curation: {file} was made for {marked[name]:,} records of {name}, and there "
                        f"are {counts[name]:,}: make it again"
                    )
                rows = table[table["source"] == name]
                if "clip_score" in rows:
                    self.scores[name][rows["record"]] = rows["clip_score"]
                if "duplicate_of" in rows:
                    self.duplicates[name][rows["record"]] = True

    def score(self, source: str, record: int) -> float | None:
        """Return a record's CLIP score, or None."""
        value = self.scores[source][record] if self.scores else np.nan
        return None if np.isnan(value) else float(value)

    def is_duplicate(self, source: str, record: int) -> bool:
        return bool(self.duplicates) and bool(self.duplicates[source][record])


def _read(file: str) -> tuple[Any, dict[str, int]]:
    """Return a file's rows and the number of records of each source that it was made for."""
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
    counts = {source.name: len(source.records) for source in sources}
    schema = pyarrow.schema(
        {"source": pyarrow.string(), "record": pyarrow.int64(), column: kind}, {"records": json.dumps(counts)}
    )
    with replacing(path) as temp_path:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), temp_path)
