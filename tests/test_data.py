"""Records → samples → packed rows → batches: nothing lost, budgets kept, state exact, bad records counted."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TURNS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs.errors import UsageError, UserError
from data.collators import collate
from data.datasets import Sample, SampleDataset, SampleStream
from data.images import open_image
from data.packing import RowStream, pack
from data.render import IGNORE, Document
from data.sources import base_emoji, easy_vqa, openmoji, source_names, training_records

BUDGET = {"left_length": 15, "right_length": 60}  # three images of 5 tokens


def fake_sample(number: int, images: int, lengths: list[int], block: int = 5) -> Sample:
    left = [7] * block * images
    documents = [Document(left, left, left, [1] * n, list(range(n)), [IGNORE] * n) for n in lengths]
    return Sample((number, 0), torch.zeros(images, 3, 2, 2, dtype=torch.uint8), documents)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(1, 20), min_size=1, max_size=3)), min_size=1, max_size=40))
def test_packing_keeps_every_sample_once_and_both_budgets(shapes):
    samples = [fake_sample(i, images, lengths) for i, (images, lengths) in enumerate(shapes)]
    rows = pack(samples, **BUDGET)
    assert sorted(s.key for row in rows for s in row) == [s.key for s in samples]
    for row in rows:
        assert sum(s.left_length for s in row) <= 15 and sum(s.right_length for s in row) <= 60


@pytest.fixture
def records(tmp_path):
    out = []
    for i in range(12):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (20 + i, 30), (i * 20, 0, 255 - i * 20)).save(path)
        out.append({"images": [str(path)], "texts": TURNS[: 1 + i % 4], "id": f"r{i}"})
    return out


def dataset(records, renderer, turns="branch", right_length=60, **changes) -> SampleDataset:
    options = {"left_length": 15, "right_length": right_length, "max_positions": 256} | changes
    return SampleDataset(records, renderer, 64, turns, **options)


def rows_of(records, renderer, seed=3, window=5) -> RowStream:
    return RowStream(SampleStream(dataset(records, renderer), seed), 15, 60, window)


def test_an_epoch_sees_every_document_once(records, renderer):
    data = dataset(records, renderer, right_length=40)  # so short that records split into parts
    expected = Counter(s.key for i in range(len(records)) for s in data[i])
    assert any(part for _, part in expected)
    for epoch in islice(_epochs(SampleStream(data, 0), sum(expected.values())), 3):
        assert Counter(epoch) == expected
    documents = sum(len(s.documents) for i in range(len(records)) for s in data[i])
    assert documents == sum(len(r["texts"]) for r in records)


def _epochs(stream, size):
    keys = (sample.key for sample in stream)
    while True:
        yield list(islice(keys, size))


@pytest.mark.parametrize("stop", [1, 2, 3, 7, 20])
def test_row_stream_resumes_exactly(records, renderer, stop):
    whole = [[s.key for s in row] for row in islice(rows_of(records, renderer), 40)]
    first = rows_of(records, renderer)
    for _ in islice(first, stop):
        pass
    again = rows_of(records, renderer)
    again.load_state(first.state())
    assert [[s.key for s in row] for row in islice(again, 40 - stop)] == whole[stop:]


def test_order_depends_on_seed_and_epoch(records, renderer):
    def order(seed):
        return [s.key for s in islice(SampleStream(dataset(records, renderer, right_length=200), seed), 24)]

    assert order(0) == order(0) != order(1)
    assert order(0)[:12] != order(0)[12:] and sorted(order(0)[:12]) == sorted(order(0)[12:])


def test_branch_shares_the_image_and_chain_is_one_conversation(records, renderer, tokenizer):
    record = [records[3]]  # four turns
    (branch,) = dataset(record, renderer, right_length=200)[0]
    (chain,) = dataset(record, renderer, turns="chain", right_length=200)[0]
    assert len(branch.documents) == 4 and len(chain.documents) == 1
    assert branch.left_length == chain.left_length == 5
    batch = collate([[branch]], tokenizer.global_image)
    assert batch["left_ids"].shape == (1, 5) and batch["right_documents"].unique().tolist() == [0, 1, 2, 3]
    assert batch["right_groups"].unique().tolist() == [0]


def test_bad_records_are_counted_by_reason(records, renderer, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    bad = [
        {"images": [str(tmp_path / "nowhere.png")], "texts": TURNS[:1], "id": "a"},
        {"images": [str(tmp_path / "empty.png")], "texts": TURNS[:1], "id": "b"},
        {"images": [str(tmp_path / "text.png")], "texts": TURNS[:1], "id": "c"},
        {"images": [str(tmp_path / "cut.png")], "texts": TURNS[:1], "id": "d"},
        {"images": records[0]["images"] * 4, "texts": TURNS[:1], "id": "e"},
        {"images": records[0]["images"], "texts": [{"user": "x" * 500, "assistant": "y"}, TURNS[0]], "id": "f"},
        {"images": records[0]["images"], "texts": [{"user": "q", "assistant": " "}, TURNS[0]], "id": "g"},
        {"images": [None], "texts": TURNS[:1], "id": "h"},
    ]
    data = dataset(bad + records, renderer)
    stream = SampleStream(data, 0)
    usable = [s.key for s in islice(stream, 2 + sum(len(data[i]) for i in range(len(bad), len(data))))]
    assert len(usable) == len(set(usable))
    expected = {"image_missing": 2, "image_empty": 1, "image_not_an_image": 1, "image_damaged": 1, "too_many_images": 1, "too_long": 1, "empty_text": 1}
    assert data.counts() == expected


def test_nothing_usable_is_an_error_not_a_loop(renderer):
    data = dataset([{"images": ["nowhere.png"], "texts": TURNS, "id": "x"}], renderer)
    with pytest.raises(UserError, match="none of the 1 training records can be used.*image_missing"):
        next(iter(SampleStream(data, 0)))


def test_training_and_test_images_of_easy_vqa_are_apart():
    training, validation = training_records("easy_vqa", 0, 200)
    images = [{r["images"][0] for r in part} for part in (training, validation, easy_vqa("test"))]
    assert [len(i) for i in images] == [3800, 200, 1000]
    assert not images[0] & images[1] and not (images[0] | images[1]) & images[2]
    assert sum(len(r["texts"]) for r in [*training, *validation]) == 38575
    assert sum(len(r["texts"]) for r in easy_vqa("test")) == 9673
    assert list(training_records("easy_vqa", 10, 200)[1]) == list(validation)


@pytest.fixture(scope="module")
def cauldron(tmp_path_factory) -> Path:
    """Two sub-sets in the Cauldron's schema, as parquet files in local folders; one row's image is damaged."""
    import io

    import datasets

    root = tmp_path_factory.mktemp("cauldron")
    for name, rows in (("ai2d", 12), ("vqav2", 7)):
        table = {"images": [], "texts": []}
        for i in range(rows):
            file = io.BytesIO()
            Image.new("RGB", (40 + i, 30), (i * 9, 0, 99)).save(file, "PNG")
            table["images"].append([{"bytes": b"damaged" if i == 3 else file.getvalue(), "path": None}])
            table["texts"].append([{"user": f"{name} {i}?", "assistant": f"{i}", "source": name}, {"user": "wide?", "assistant": str(40 + i), "source": name}])
        features = datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List({k: datasets.Value("string") for k in ("user", "assistant", "source")})})
        (root / name).mkdir()
        datasets.Dataset.from_dict(table, features=features).to_parquet(root / name / "train-00000-of-00001.parquet")
    return root


def test_the_cauldron_from_a_local_folder(cauldron, renderer):
    training, validation = training_records("the_cauldron/ai2d,the_cauldron/vqav2", 0, 4, str(cauldron))
    assert (len(training), len(validation)) == (12 + 7 - 4, 4)
    ids = [r["id"] for part in (training, validation) for r in part]
    assert sorted(ids) == sorted([f"ai2d/{i}" for i in range(12)] + [f"vqav2/{i}" for i in range(7)])
    for record in training:
        name, row = record["id"].split("/")
        assert record["texts"][0]["user"] == f"{name} {row}?"
        if row != "3":
            assert open_image(record["images"][0]).size == (40 + int(row), 30)
    dataset = SampleDataset(training, renderer, 64, "chain", 64, 128, 256)
    usable = [i for i in range(len(dataset)) if dataset[i]]
    bad = [r["id"] for r in training if r["id"].endswith("/3")]
    assert len(usable) == len(training) - len(bad) and set(dataset.dropped) == set(bad)


def test_sources_by_name(cauldron):
    assert len(source_names("the_cauldron")) == 50
    for names, message in (
        ("the_cauldron/vqav3", "no source 'the_cauldron/vqav3' .did you mean 'the_cauldron/vqav2'"),
        ("easy_vqa,opnmoji", "no source 'opnmoji' .did you mean 'openmoji'"),
    ):
        with pytest.raises(UsageError, match=message):
            source_names(names)
    with pytest.raises(UserError, match="aokvqa holds no parquet files"):
        training_records("the_cauldron/aokvqa", 0, 4, str(cauldron))
    (cauldron / "clevr").mkdir()
    (cauldron / "clevr" / "train-00000.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match="clevr of .* cannot be read"):
        training_records("the_cauldron/clevr", 0, 4, str(cauldron))


def test_variants_of_an_emoji_stay_in_one_split():
    splits = {split: openmoji(split) for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) > 3900
    names = {r["references"][0]: split for split, records in splits.items() for r in records}
    for group in (
        ("waving hand", "waving hand light skin tone", "waving hand dark skin tone"),
        ("woman firefighter", "man firefighter", "firefighter", "firefighter medium skin tone"),
        ("man", "woman", "person", "man red hair", "woman white hair"),
        ("women holding hands", "men holding hands", "woman and man holding hands"),
        ("man dancing", "woman dancing"),
    ):
        assert len({names[name] for name in group}) == 1, group
    bases = {split: {base_emoji([int(c, 16) for c in Path(r["images"][0]).stem.split("-")]) for r in records} for split, records in splits.items()}
    assert not bases["train"] & bases["test"] and not bases["train"] & bases["validation"] and not bases["validation"] & bases["test"]
    image = np.asarray(open_image(splits["test"][0]["images"][0]))
    assert image.shape == (256, 256, 3) and (image[0, 0] == 255).all() and image.std() > 10
