"""Parquet and Arrow tables, local and over real HTTP on loopback.

Every row is read as it was written, in every order and despite failures.
"""

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.train import DataConfig
from data.datasets import SampleDataset, SampleStream
from data.mixture import Mixture, Source
from data.parquet import TableRecords, UnreadableBlock, table_files
from tests.conftest import TINY_MODEL
from tests.hub_server import Hub, hub
from utils.errors import UserError
from utils.hub import pause

ROOT = Path(__file__).parent.parent
SCHEMA = pa.schema(
    {
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "texts": pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string(), "source": pa.string()})),
    }
)


def rows_of(count: int, first: int = 0, image: int = 200) -> list[dict]:
    """Rows of The Cauldron's form, no two alike: none to two images, one to three turns."""
    rng = np.random.default_rng(first)
    return [
        {
            "images": [{"bytes": rng.bytes(image), "path": None} for _ in range(i % 3)],
            "texts": [
                {"user": f"question {i}.{k}", "assistant": f"ânswer {i}.{k}", "source": "test"}
                for k in range(1 + i % 2)
            ],
        }
        for i in range(first, first + count)
    ]


def write(path: Path, rows: list[dict], group: int, **options) -> None:
    """In the form that the name asks for: .parquet, .file.arrow or .stream.arrow; `group` rows in a block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, SCHEMA)
    if path.suffix == ".parquet":
        return pq.write_table(table, path, row_group_size=group, **options)
    with (pa.ipc.new_file if ".file." in path.name else pa.ipc.new_stream)(path, SCHEMA, **options) as writer:
        writer.write_table(table, max_chunksize=group)
    return None


def folder_of(
    root: Path, form: str = "parquet", files: int = 3, rows: int = 40, group: int = 6
) -> list[dict]:
    """Sub-set `some` of `root`, with one folder more on the way; → its rows."""
    everything = rows_of(files * rows)
    for i in range(files):
        write(root / "some" / "deep" / f"{i:04}.{form}", everything[i * rows : (i + 1) * rows], group)
    return everything


def process_group(
    root: str | Path, memory: int = 1 << 30, folder: str = "some", download: bool = False
) -> TableRecords:
    system, files = table_files(str(root), folder, download)
    return TableRecords("some", files["train"], system, {}, memory)


def without_ids(records: TableRecords, numbers) -> list[dict]:
    """Records as rows again."""
    plain = [records[int(i)] for i in numbers]
    return [
        {"images": [{"bytes": image, "path": None} for image in r["images"]], "texts": r["texts"]}
        for r in plain
    ]


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """→ how often each block was read."""
    reads: Counter = Counter()
    plain = TableRecords._read
    monkeypatch.setattr(
        TableRecords,
        "_read",
        lambda self, block: reads.update([(block.file, block.number)]) or plain(self, block),
    )
    return reads


@pytest.fixture
def served(tmp_path, go_to) -> Iterator[tuple[Hub, list[dict]]]:
    """`org/set`, of 3 files of 7 blocks each, and its rows."""
    rows = folder_of(tmp_path / "set")
    (tmp_path / "set" / "other").mkdir()
    with hub({"datasets/org/set": tmp_path / "set"}) as address:
        go_to(address)
        yield address, rows


# --- rows and orders


@pytest.mark.parametrize("form", ["parquet", "file.arrow", "stream.arrow"])
def test_every_row_is_read_as_it_was_written(tmp_path, form, reads):
    rows = folder_of(tmp_path, form)
    records = process_group(tmp_path)
    assert len(records) == len(rows) == 120 and len(records.blocks) == 21
    numbers = np.random.default_rng(0).permutation(len(rows))
    assert without_ids(records, numbers) == [rows[i] for i in numbers]
    assert records[7]["id"] == "some/7" and set(reads.values()) == {1}
    for beyond in (120, -1):
        with pytest.raises(IndexError):
            records[beyond]


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("form", ["file.arrow", "stream.arrow"])
def test_compressed_arrow(tmp_path, form, compression):
    rows = rows_of(50)
    write(tmp_path / f"x.{form}", rows, 8, options=pa.ipc.IpcWriteOptions(compression=compression))
    assert without_ids(process_group(tmp_path, folder=""), range(50)) == rows


@pytest.mark.parametrize("form", ["parquet", "stream.arrow"])
@pytest.mark.parametrize("group", [1, 6, 1000])  # 90 blocks, 15, 3
@pytest.mark.parametrize("memory", [1, 1 << 14, 1 << 30])
def test_orders_cover_and_share(tmp_path, form, group, memory):
    folder_of(tmp_path, form, rows=30, group=group)
    records = process_group(tmp_path, memory)
    for start, stop in ((0, 90), (17, 64), (5, 5)):
        for parts in (1, 2, 3):
            shares = [
                records.order(start, stop, np.random.default_rng(3), part, parts) for part in range(parts)
            ]
            assert sorted(np.concatenate(shares)) == list(range(start, stop))
            if len(records.blocks) < 8 * parts:
                assert max(map(len, shares)) <= 1 + min(map(len, shares))
            elif stop - start >= 40:
                assert max(map(len, shares)) <= 2 * min(map(len, shares)), "shares of about one size"
            if len(records.blocks) >= 8 * parts:
                blocks = [{int(np.searchsorted(records.ends, i, "right")) for i in share} for share in shares]
                assert sum(map(len, blocks)) == len(set().union(*blocks)), "whole blocks"


@pytest.mark.parametrize("group", [6, 1000])  # 20 blocks, and one
def test_an_order_is_its_generators(tmp_path, group):
    folder_of(tmp_path, files=1, rows=120, group=group)
    records = process_group(tmp_path)
    orders = [records.order(0, 120, np.random.default_rng(seed), 0, 1).tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2] and orders[0] != sorted(orders[0])


def changes(records: TableRecords) -> int:
    """How often an order goes from one block to another."""
    blocks = np.searchsorted(
        records.ends, records.order(0, len(records), np.random.default_rng(0), 0, 1), "right"
    )
    return int((np.diff(blocks) != 0).sum())


def test_blocks_are_mixed_as_far_as_memory_goes(tmp_path):
    folder_of(tmp_path)
    largest = max(block.bytes for block in process_group(tmp_path).blocks)
    one, three, all_of_them = (process_group(tmp_path, 2 * n * largest) for n in (1, 3, 1000))
    assert (one.pool_blocks, three.pool_blocks) == (1, 3)
    assert changes(one) == 20 < changes(three) < changes(all_of_them)


@pytest.mark.parametrize("form", ["parquet", "file.arrow"])
@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.parametrize("ahead", [1, 10, 64])  # rows: 64 are 11 blocks, many times what is cached
def test_each_block_is_read_once_and_few_are_cached(tmp_path, form, pool, ahead, reads):
    rows = folder_of(tmp_path, form)
    largest = max(block.bytes for block in process_group(tmp_path).blocks)
    records = process_group(tmp_path, 2 * pool * largest)
    order = records.order(0, 120, np.random.default_rng(0), 0, 1)
    for i, number in enumerate(order):
        for announced in order[i + ahead : i + ahead + 1] if i else order[: ahead + 1]:
            records.prefetch(int(announced))
        assert without_ids(records, [number]) == [rows[number]]
        assert (
            len(records.used) <= pool
            and sum(future is not None for future in records.ahead.values()) <= pool + 1
        )
    assert len(reads) == 21 and set(reads.values()) == {1}


def test_announced_rows_that_are_passed_over_do_not_stop_the_reading_ahead(tmp_path, reads):
    """A sample that is cached decoded is announced, then not read."""
    folder_of(tmp_path)
    records = process_group(tmp_path, 1)
    for block in range(12):
        records.prefetch(6 * block)
    records[6 * 5]
    assert len(records.used) == 1 and [f is not None for f in records.ahead.values()] == [
        True,
        True,
        *[False] * 4,
    ]
    for block in range(6, 12):
        records[6 * block]
    assert not records.ahead and set(reads.values()) == {1}


# --- the Hub


def test_the_hubs_rows_are_those_of_the_files(served):
    _, rows = served
    for name in ("org/set", "org/set@main", "org/set@refs/convert/parquet", "org/set@a/branch"):
        records = process_group(name)
        assert records.system is not None and without_ids(records, range(0, 120, 7)) == rows[::7]


def test_one_row_does_not_fetch_its_file(tmp_path, go_to):
    rows = rows_of(400, image=5000)
    write(tmp_path / "set" / "x.parquet", rows, 10)
    with hub({"datasets/org/set": tmp_path / "set"}) as address:
        go_to(address)
        records = process_group("org/set", folder="")
        address.served.clear()
        assert without_ids(records, [234]) == [rows[234]]
        records.prefetch(235)
        records[239]
        fetched = sum(address.served.values())
    assert (
        fetched < (tmp_path / "set" / "x.parquet").stat().st_size / 8
    )  # the footer again, and one block of 40


def test_many_files_are_opened_from_the_hub(tmp_path, go_to, waits):
    rows = folder_of(tmp_path / "set", files=40, rows=3, group=2)
    with hub({"datasets/org/set": tmp_path / "set"}) as address:
        go_to(address)
        assert without_ids(process_group("org/set"), range(120)) == rows
    assert not waits


def test_downloaded_first(served):
    address, rows = served
    records = process_group("org/set@main", download=True)
    assert records.system is None and without_ids(records, range(120)) == rows
    address.failures[""] = repeat("drop")
    assert without_ids(records, [3]) == [rows[3]]


@pytest.mark.parametrize(
    ("root", "folder", "message"),
    [
        ("org/set", "sone", "org/set holds no Parquet files in a folder sone (did you mean 'some'?)"),
        ("org/set", "other", "org/set holds no Parquet files in a folder other"),
        (
            "org/nothing",
            "",
            "org/nothing is no local folder, and its files could not be listed on the Hub "
            "(FileNotFoundError: datasets/org/nothing (repository not found)",
        ),
        ("org/set@v9", "", "(revision not found)"),
        ("./nowhere", "", "./nowhere is neither a local folder nor a Hub id"),
        ("LOCAL", "sone", "holds no Parquet files in a folder sone (did you mean 'some'?)"),
    ],
)
def test_a_set_that_is_not_there(served, tmp_path, root, folder, message):
    with pytest.raises(UserError) as error:
        table_files(str(tmp_path / "set") if root == "LOCAL" else root, folder, False)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_gated_set(tmp_path, go_to, waits, naps):
    folder_of(tmp_path / "set")
    with hub({"datasets/org/set": tmp_path / "set"}, gated=("datasets/org/set",)) as address:
        go_to(address)
        with pytest.raises(
            UserError,
            match=r"0000.parquet cannot be read: GatedRepoError.*Access to datasets/org/set is restricted",
        ):
            process_group("org/set")
    assert not waits and not naps


# --- what fails


def test_a_hub_out_of_reach(go_to, waits, naps):
    go_to("http://127.0.0.1:9")
    with pytest.raises(
        UserError, match="org/set is no local folder, and its files could not be listed on the Hub"
    ):
        process_group("org/set")
    assert not waits and not naps


@pytest.mark.parametrize(
    ("failure", "times", "expected"),
    [("drop", 1, []), ("cut", 1, []), ("drop", 7, [1]), ("503", 20, [1, 2, 4])],
)
def test_a_connection_that_fails_and_comes_back(served, waits, naps, failure, times, expected):
    """The first six tries of a request are huggingface_hub's."""
    address, rows = served
    records = process_group("org/set")
    address.failures["0001.parquet"] = iter([failure] * times)
    assert without_ids(records, [50, 3]) == [rows[50], rows[3]]
    assert waits == expected and len(naps) >= 1


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize(
    "request_path", ["/api/datasets/org/set", "/api/datasets/org/set/tree", "0001.parquet"]
)
@pytest.mark.parametrize("failure", ["drop", "503"])
def test_first_requests_and_downloads_that_fail_once(
    served, waits, naps, capfd, request_path, failure, download
):
    """Whoever repeats it, huggingface_hub or this project: only the latter says so."""
    address, rows = served
    address.failures[request_path] = iter([failure])
    assert without_ids(process_group("org/set", download=download), [50]) == [rows[50]]
    lines = [line for line in capfd.readouterr().err.splitlines() if "try" in line.lower() or "HTTP" in line]
    assert len(lines) == len(waits) and all(
        line.startswith("warning: org/set: ") and line.endswith("; trying again") for line in lines
    )


def test_a_connection_that_always_drops_is_one_line(served, waits, naps):
    address, _ = served
    address.failures["/api/datasets/org/set"] = repeat("drop")
    with pytest.raises(
        UserError,
        match="^org/set is no local folder, and its files could not be listed on the Hub "
        ".RemoteProtocolError",
    ) as listed:
        process_group("org/set")
    address.failures = {"0001.parquet": repeat("drop")}
    with pytest.raises(
        UserError, match="^org/set is no local folder, and its files could not be fetched from the Hub"
    ) as fetched:
        process_group("org/set", download=True)
    assert waits == [1, 2, 4] * 2 and "\n" not in f"{listed.value}{fetched.value}"


def test_a_pause_in_the_main_thread_is_one():
    before = time.monotonic()
    pause(0.05)
    assert time.monotonic() - before >= 0.05


def test_a_file_that_fails_for_ever(served, waits, naps):
    address, rows = served
    records = process_group("org/set")
    address.failures["0001.parquet"] = repeat("503")
    for _ in range(2):  # the block is not asked for again for its next row
        with pytest.raises(UnreadableBlock, match="rows of .*0001.parquet .* cannot be read: .*503"):
            records[50]
    assert waits == [1, 2, 4] and without_ids(records, [3]) == [rows[3]]
    with pytest.raises(UserError, match="0001.parquet cannot be read"):
        process_group("org/set")


def test_a_missing_file_is_not_waited_for(served, tmp_path, waits, naps):
    records, local = process_group("org/set"), process_group(tmp_path / "set")
    next((tmp_path / "set").rglob("0001.parquet")).unlink()
    for incomplete in (records, local):
        with pytest.raises(UnreadableBlock, match="0001.parquet"):
            incomplete[50]
    assert not waits and not naps


@pytest.mark.parametrize("silent", ["/api/datasets/org/set", "/tree/", "0001.parquet"])
def test_a_server_that_never_answers_is_given_up(served, monkeypatch, waits, naps, silent):
    from huggingface_hub import constants

    address, _ = served
    records = process_group("org/set")
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    monkeypatch.setattr("utils.hub.TRIES", 1)
    address.failures[silent] = repeat("silence")
    if silent == "0001.parquet":
        with pytest.raises(UnreadableBlock, match="time"):
            records[50]
    else:
        records.system.invalidate_cache()
        with pytest.raises(UserError, match="could not be listed on the Hub .*[Tt]ime"):
            process_group("org/set")


def test_a_disk_that_fails_is_tried_again(tmp_path, waits, monkeypatch):
    rows = folder_of(tmp_path)
    records = process_group(tmp_path)
    plain, faults = TableRecords._open, iter([OSError(5, "Input/output error")] * 2)

    def failing(self, file):
        if fault := next(faults, None):
            raise fault
        return plain(self, file)

    monkeypatch.setattr(TableRecords, "_open", failing)
    assert without_ids(records, [50]) == [rows[50]] and waits == [1, 2]


def test_a_bug_is_not_taken_for_damage(tmp_path, monkeypatch):
    folder_of(tmp_path)
    records = process_group(tmp_path)
    monkeypatch.setattr(TableRecords, "_open", lambda self: None)
    with pytest.raises(TypeError):
        records[0]


@pytest.mark.parametrize("form", ["parquet", "file.arrow", "stream.arrow"])
@pytest.mark.parametrize("damage", ["half", "empty", "noise"])
def test_a_damaged_file_is_named_when_it_is_opened(tmp_path, form, damage, waits):
    folder_of(tmp_path, form)
    path = next(tmp_path.rglob(f"0001.{form}"))
    whole = path.read_bytes()
    path.write_bytes(
        {"half": whole[: len(whole) // 2 + 3], "empty": b"", "noise": np.random.default_rng(0).bytes(5000)}[
            damage
        ]
    )
    with pytest.raises(UserError) as error:
        process_group(tmp_path)
    assert (
        str(error.value).startswith(f"{path} cannot be read: ") and "\n" not in str(error.value) and not waits
    )


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1], "b": [2]}, "has the columns a, b: map them with images, "),
        ({"pixels": [b"x"], "texts": [[{"user": "a"}]]}, "for example :images=COLUMN"),
    ],
)
def test_another_form_is_recognised_by_its_columns(tmp_path, form, columns, message):
    path = tmp_path / f"x.{form}"
    table = pa.table(columns)
    if form == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError) as error:
        process_group(tmp_path, folder="")
    assert str(path) in str(error.value) and message in str(error.value)


def test_a_set_without_any_image(tmp_path):
    pq.write_table(
        pa.table({"images": pa.array([None, None]), "texts": [[{"user": "a"}], [{"user": "b"}]]}),
        tmp_path / "x.parquet",
    )
    assert process_group(tmp_path, folder="")[1] == {"id": "some/1", "images": None, "texts": [{"user": "b"}]}


@pytest.mark.parametrize("served_from", ["disk", "hub"])
def test_a_damaged_block_is_dropped_and_counted(tmp_path, go_to, renderer, waits, served_from):
    """A valid footer, noise in the images of row group 2: training goes on without its 6 rows."""
    rows, path = rows_of(40), tmp_path / "set" / "x.parquet"
    write(path, rows, 6)
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    whole = bytearray(path.read_bytes())
    whole[start : start + column.total_compressed_size] = np.random.default_rng(0).bytes(
        column.total_compressed_size
    )
    path.write_bytes(whole)
    with hub({"datasets/org/set": tmp_path / "set"}) as address:
        go_to(address)
        system, files = table_files("org/set" if served_from == "hub" else str(tmp_path / "set"), "", False)
        records = TableRecords("some", files["train"], system, {}, 1 << 30)
        sources = [Source("some", records, 0, 40)]
        dataset = SampleDataset(
            sources,
            renderer,
            TINY_MODEL.vision,
            DataConfig(left_length=64, right_length=128),
            256,
            keep=False,
        )
        stream, seen = SampleStream(dataset, Mixture(sources, 0)), set()
        for sample in stream:
            if stream.epoch:
                break
            seen.add(sample.key[1])
    assert (
        seen == set(range(40)) - set(range(12, 18))
        and dict(dataset.dropped) == {("some", "unreadable"): 6}
        and not waits
    )


@pytest.mark.parametrize("form", ["file.arrow", "stream.arrow"])
def test_damaged_offsets_do_not_end_the_process(tmp_path, form):
    rows, path = rows_of(40), tmp_path / f"x.{form}"
    write(path, rows, 10)
    whole = bytearray(path.read_bytes())
    texts = whole.index(b"question 10.0")  # of the second block; its offsets lie before
    whole[texts - 48 : texts - 8] = b"\xf0" * 40
    path.write_bytes(whole)
    records = process_group(tmp_path, folder="")
    with pytest.raises(UnreadableBlock, match=r"block 1\)"):
        records[13]
    assert without_ids(records, [3, 33]) == [rows[3], rows[33]]


def test_text_that_is_not_utf8_costs_its_row_alone(tmp_path):
    rows, path = rows_of(40), tmp_path / "x.parquet"
    write(path, rows, 10, compression="none", use_dictionary=False, write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"question 10.0", b"\xff" * 13))
    records = process_group(tmp_path, folder="")
    with pytest.raises(UnreadableBlock, match="row 10 of some"):
        records[10]
    assert without_ids(records, [11]) == [rows[11]]


def test_the_programs_end_waits_for_no_reading(tmp_path):
    """The program's end does not wait for blocks that are being retried.

    The number of tries is counted by the last line, printed at exit.
    """
    folder_of(tmp_path)
    program = """
import atexit, sys
from data.parquet import TableRecords, table_files
system, files = table_files(sys.argv[1], "some", False)
records, tries = TableRecords("some", files["train"], system, {}, 1 << 30), []
def failing(file):
    tries.append(file)
    raise OSError(5, "Input/output error")
records._open = failing
for row in range(0, 120, 6):
    records.prefetch(row)
atexit.register(lambda: print(len(tries)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and int(done.stdout) <= 4, done.stderr


def test_no_thread_is_left_by_opening(tmp_path):
    folder_of(tmp_path)
    before = threading.active_count()
    process_group(tmp_path)
    assert threading.active_count() == before
