"""WebDataset tars as img2dataset writes them: what a sample holds, orders, the Hub, and damage."""

import io
import json
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from configs.train import DataConfig
from data import webdataset
from data.datasets import SampleDataset, SampleStream
from data.images import open_image
from data.loader import Loader
from data.mixture import Mixture
from data.packing import Budget, RowStream
from data.parquet import UnreadableBlock
from data.sources import open_sources
from data.webdataset import TarRecords, index_of, shards_of
from tests.conftest import TINY_MODEL
from tests.hub_server import hub
from utils.errors import UserError

SHARDS, ROWS = 12, 5


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20 + number, 10), (number, 0, 99)).save(file, "PNG")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shard(path: Path, numbers, notes: bool = True, format: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for n in numbers:
            add(tar, f"{n:09}.png", png(n))
            add(tar, f"{n:09}.txt", f"it is {n}".encode())
            add(tar, f"{n:09}.json", json.dumps({"key": f"{n:09}", "caption": f"it is {n}"}).encode())
    if notes:
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"successes": len(numbers)}))


@pytest.fixture
def laion(tmp_path) -> Path:
    """Shards with img2dataset's notes."""
    for shard in range(SHARDS):
        write_shard(tmp_path / "laion" / f"{shard:05}.tar", range(shard * ROWS, (shard + 1) * ROWS))
    return tmp_path / "laion"


def opened(folder: Path | str, **options):
    config = DataConfig(sources=f"hf={folder}", **{"validation_images": 5} | options)
    (training,), (validation,) = open_sources(config)
    return training, validation


def number_of(record: dict) -> int:
    return open_image(record["images"][0]).width - 20


def test_every_sample_is_what_its_files_say(laion):
    training, validation = opened(laion)
    records = [training.records[i] for i in range(SHARDS * ROWS)]
    assert [number_of(record) for record in records] == list(range(SHARDS * ROWS))
    assert all(r["references"] == [f"it is {n}"] for n, r in enumerate(records))
    assert (training.start, training.stop, validation.stop) == (5, SHARDS * ROWS, 5)


def test_a_row_of_any_columns(tmp_path):
    """PixMo's questions, which img2dataset keeps in the JSON; several images; other members."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("part")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add(tar, "part/b.1.PNG", png(2))
        add(tar, "part/b.0.png", png(1))
        add(
            tar,
            "part/b.json",
            json.dumps({"question": "which?", "answer": "both", "url": "https://x"}).encode(),
        )
        add(tar, "part/.hidden", b"")
    training, _ = TarRecords("a", str(tmp_path), ["a.tar"], {}), None
    [record] = [training[i] for i in range(len(training))]
    assert [open_image(i).width for i in record["images"]] == [21, 22]
    assert record["texts"] == [{"user": "which?", "assistant": "both"}]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_is_that_of_tarfile(tmp_path, format):
    """Also of names that need headers of their own."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for name in ("short.txt", "folder/" * 12 + "n" * 90 + ".txt", "ünïcode.txt"):
            add(tar, name, name.encode() * 100)
    with tarfile.open(path) as tar:
        expected = [{"txt": (m.offset_data, m.size)} for m in tar]
    assert index_of(path) == expected


def test_orders_cover_share_and_go_shard_by_shard(laion):
    training, _ = opened(laion)
    for parts in (1, 2):
        orders = [
            training.records.order(5, SHARDS * ROWS, np.random.default_rng(3), part, parts)
            for part in range(parts)
        ]
        assert sorted(np.concatenate(orders)) == list(range(5, SHARDS * ROWS))
    shards = training.records.order(0, SHARDS * ROWS, np.random.default_rng(3), 0, 1) // ROWS
    pools = [set(shards[start : start + 4 * ROWS]) for start in range(0, SHARDS * ROWS, 4 * ROWS)]
    assert [len(pool) for pool in pools] == [4, 4, 4]


def stream_of(training, renderer) -> SampleStream:
    config = DataConfig(left_length=64, right_length=128)
    dataset = SampleDataset([training], renderer, TINY_MODEL.vision, config, 256, keep=False)
    return SampleStream(dataset, Mixture([training], 0))


def test_from_the_hub_shard_by_shard_and_resumed(laion, renderer, go_to, monkeypatch):
    """A shard is fetched when it is due, once; a stream that is resumed goes on with the same samples."""
    fetched: Counter = Counter()
    fetch = webdataset.fetch
    counted = lambda path, patterns, *more, **given: (  # noqa: E731
        fetched.update(patterns) or fetch(path, patterns, *more, **given)
    )
    monkeypatch.setattr(webdataset, "fetch", counted)
    with hub({"datasets/org/laion": laion}) as address:
        go_to(str(address))
        training, _ = opened("org/laion")
        tars = lambda: [path for path in address.served if path.endswith(".tar")]  # noqa: E731
        assert len(training.records) == SHARDS * ROWS and len(tars()) == 1  # the first tells the columns
        stream = stream_of(training, renderer)
        stream.dataset.sources[0].records.prefetch = lambda index: None
        keys = [sample.key for sample in islice(stream, 8)]
        assert len(tars()) < 6 and set(fetched.values()) == {1}
        again = stream_of(opened("org/laion")[0], renderer)
        again.load_state(json.loads(json.dumps(stream.state())))
        rest, same = ([sample.key for sample in islice(s, 40)] for s in (stream, again))
    assert rest == same and not set(keys) & set(rest) and not stream.dataset.dropped


def test_shards_without_notes_are_counted(tmp_path, go_to, capsys):
    for shard in range(3):
        numbers = range(shard * ROWS, (shard + 1) * ROWS)
        write_shard(tmp_path / "set" / f"{shard}.tar", numbers, notes=False)
    assert len(opened(tmp_path / "set")[0].records) == 3 * ROWS and not capsys.readouterr().out
    with hub({"datasets/org/set": tmp_path / "set"}) as address:
        go_to(str(address))
        assert len(opened("org/set")[0].records) == 3 * ROWS
    assert "org/set: 3 shards without *_stats.json are fetched to be counted" in capsys.readouterr().out


def test_splits_and_hidden_files(tmp_path):
    for name in ("train/0.tar", "val/0.tar", "test/0.tar", ".cache/0.tar"):
        write_shard(tmp_path / name, range(8))
    assert shards_of(str(tmp_path), "") == {
        "test": ["test/0.tar"],
        "train": ["train/0.tar"],
        "validation": ["val/0.tar"],
    }
    training, validation = opened(tmp_path)
    assert len(training) == 8 and len(validation) == 5 and "not read: test" in training.note


@pytest.mark.parametrize("damage", ["half", "empty", "noise", "pointer"])
def test_damage_is_named(laion, damage):
    path = laion / "00000.tar"
    whole = path.read_bytes()
    content = {
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "noise": np.random.default_rng(0).bytes(2000),
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n" + b" " * 512,
    }
    path.write_bytes(content[damage])
    if damage == "half":  # what is whole is used; the note says that more was there
        training, _ = opened(laion)
        assert number_of(training.records[0]) == 0
        with pytest.raises(UnreadableBlock, match=r"00000.tar has \d samples, not 5"):
            training.records[4]
        return
    with pytest.raises(UserError, match=r"00000.tar (cannot be read as a tar file|is a git-lfs pointer)"):
        opened(laion)


def test_a_damaged_sample_costs_itself_alone(laion, renderer):
    path = laion / "00003.tar"
    path.write_bytes(path.read_bytes().replace(b'{"key": "000000017"', b'("key": "000000017"'))
    stream = stream_of(opened(laion)[0], renderer)
    seen: Counter = Counter()
    for sample in stream:
        if stream.epoch:
            break
        seen[sample.key[1]] += 1
    assert seen == Counter(set(range(5, SHARDS * ROWS)) - {17})
    assert dict(stream.dataset.dropped) == {("laion", "unreadable"): 1}
    assert "sample 2 of 00003.tar" in stream.dataset.examples["laion", "unreadable"]


@pytest.mark.parametrize("form", ["tars", "arrow"])
def test_workers_change_nothing(laion, tmp_path, renderer, monkeypatch, form):
    if form == "arrow":
        rows = {"image": [Image.open(io.BytesIO(png(n))) for n in range(40)], "caption": ["it is"] * 40}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "train.parquet")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "converted")
    batches = []
    for workers in (0, 1):
        stream = stream_of(opened(laion if form == "tars" else tmp_path / "set")[0], renderer)
        loader = Loader(RowStream(stream, Budget(10, 128, 5), 8), 2, renderer.tokenizer.global_image, workers)
        batches.append([next(loader) for _ in range(6)])
        loader.close()
    for one, other in zip(*batches, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_what_does_not_fit_together_is_named(tmp_path):
    for shard in range(2):
        write_shard(
            tmp_path / "set" / f"{'de' if shard else 'en'}" / "0.tar", range(shard * 4, shard * 4 + 4)
        )
    for shard, name in enumerate(("en", "de")):
        (training,), _ = open_sources(DataConfig(sources=f"hf/{name}={tmp_path}/set", validation_images=1))
        assert [number_of(training.records[i]) for i in range(4)] == list(range(shard * 4, shard * 4 + 4))
    (tmp_path / "set" / "en" / "0_stats.json").write_text('{"successes": 3}')
    records = opened(tmp_path / "set")[0].records
    with pytest.raises(UserError, match="en/0.tar has 4 samples, its _stats.json says 3: delete that file"):
        records[6]  # it is read when it is due
    for notes in ("[]", "{}"):  # of another program
        (tmp_path / "set" / "en" / "0_stats.json").write_text(notes)
        assert len(opened(tmp_path / "set")[0].records) == 8
    (tmp_path / "set" / "0.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="holds tars .de/0.tar. and tables .0.parquet.: give one of them"):
        opened(tmp_path / "set")
    write_shard(tmp_path / "cut" / "0.tar", range(8), notes=False)
    whole = (tmp_path / "cut" / "0.tar").read_bytes()
    end = whole.index(b"it is 7") + 4
    (tmp_path / "cut" / "0.tar").write_bytes(whole[:end])
    with pytest.raises(UserError, match="0.tar is truncated in 000000007.txt: fetch it again"):
        opened(tmp_path / "cut")
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "0.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="0.tar.gz is compressed"):
        opened(tmp_path / "gz")


def test_columns_come_from_more_than_the_first_sample(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for n, caption in enumerate(("{", '{"caption": "it is 1"}', '{"caption": null}', "{}")):
            add(tar, f"{n}.jfif", png(n))
            add(tar, f"{n}.txt", f"it is {n}".encode())
            add(tar, f"{n}.json", caption.encode())
    training, _ = opened(tmp_path, validation_images=1)
    for n in (1, 2, 3):
        record = training.records[n]
        assert record["references"] == [f"it is {n}"] and number_of(record) == n
    with pytest.raises(UnreadableBlock, match="sample 0 of 0.tar"):
        training.records[0]
