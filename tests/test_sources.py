"""Sources by name: what a spec means, which records it gives, training and validation apart."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from configs.train import DataConfig
from data.easy_vqa import easy_vqa
from data.images import open_image
from data.openmoji import base_emoji, openmoji
from data.sources import CAULDRON_SUBSETS, open_sources, parse_sources
from tests.conftest import dataset_of
from utils.errors import UsageError, UserError


def records_of(source) -> list[dict]:
    return [source.records[i] for i in range(source.start, source.stop)]


def process_group(sources: str, validation_images: int = 4, **options):
    return open_sources(DataConfig(sources=sources, validation_images=validation_images, **options))


def test_training_and_test_images_of_easy_vqa_are_apart():
    (training,), (validation,) = process_group("easy_vqa", 200)
    images = [
        {r["images"][0] for r in part}
        for part in (records_of(training), records_of(validation), easy_vqa("test"))
    ]
    assert [len(i) for i in images] == [3800, 200, 1000]
    assert not images[0] & images[1] and not (images[0] | images[1]) & images[2]
    assert sum(len(r["texts"]) for part in (training, validation) for r in records_of(part)) == 38575
    assert sum(len(r["texts"]) for r in easy_vqa("test")) == 9673
    (few,), (same,) = process_group("easy_vqa", 200, limit=10)
    assert records_of(same) == records_of(validation) and records_of(few) == records_of(training)[:10]


def png(width: int, height: int, color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def cauldron(tmp_path_factory) -> Path:
    """Two subsets in The Cauldron's schema, written by the Hub's own library; one row's image is damaged."""
    root = tmp_path_factory.mktemp("cauldron")
    for name, rows in (("ai2d", 12), ("vqav2", 7)):
        table = {"images": [], "texts": []}
        for i in range(rows):
            table["images"].append(
                [{"bytes": b"damaged" if i == 9 else png(40 + i, 30, (i * 9, 0, 99)), "path": None}]
            )
            table["texts"].append(
                [
                    {"user": f"{name} {i}?", "assistant": f"{i}", "source": name},
                    {"user": "wide?", "assistant": str(40 + i), "source": name},
                ]
            )
        features = datasets.Features(
            {
                "images": datasets.List(datasets.Image()),
                "texts": datasets.List(
                    {k: datasets.Value("string") for k in ("user", "assistant", "source")}
                ),
            }
        )
        (root / name).mkdir()
        datasets.Dataset.from_dict(table, features=features).to_parquet(
            root / name / "train-00000-of-00001.parquet", batch_size=4
        )
    return root


@pytest.mark.parametrize(
    "spec",
    [
        "the_cauldron/ai2d={0},the_cauldron/vqav2={0}",
        "the_cauldron={0}",
        "the_cauldron/all={0}",
        "tables={0}",
    ],
)
def test_the_cauldron_from_a_local_folder(cauldron, renderer, spec):
    training, validation = process_group(spec.format(cauldron))
    held = 4 if "," in spec else 2  # sub-sets of one set share the validation images
    assert [(s.name, len(s)) for s in training] == [("ai2d", 12 - held), ("vqav2", 7 - held)]
    assert [(s.name, len(s)) for s in validation] == [("ai2d", held), ("vqav2", held)]
    records = [r for part in (training, validation) for s in part for r in records_of(s)]
    assert sorted(r["id"] for r in records) == sorted(
        [f"ai2d/{i}" for i in range(12)] + [f"vqav2/{i}" for i in range(7)]
    )
    for record in records:
        name, row = record["id"].split("/")
        assert record["texts"][0]["user"] == f"{name} {row}?"
        if row != "9":
            assert open_image(record["images"][0]).size == (40 + int(row), 30)
    dataset = dataset_of(records, renderer)
    usable = [s for i in range(len(records)) for s in dataset.samples(0, i, True)]
    assert len({s.key[1] for s in usable}) == 19


def test_finevision_and_its_ratings(tmp_path):
    rows = {
        "images": [[{"bytes": png(30, 30, (1, 2, 3)), "path": None}], []],
        "texts": [
            [{"user": "a?", "assistant": "b"}, {"user": "c?", "assistant": "d"}],
            [{"user": "e?", "assistant": "f"}],
        ],
        "source": ["set", "set"],
        "relevance_ratings": [[5, 2], [4]],
        "relevance_min": [2, 4],
        "visual_dependency_ratings": [[1, None], [3]],
        "image_correspondence_ratings": [[4, 4], [1]],
        "formatting_ratings": [[3, 3], None],
    }
    (tmp_path / "chart2text").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "chart2text" / "train-00000-of-00001.parquet")
    (training,), (validation,) = process_group(f"finevision/chart2text={tmp_path}", 1)
    (first,), (second,) = records_of(validation), records_of(training)
    assert [t["ratings"] for t in first["texts"]] == [
        {"relevance": 5, "visual_dependency": 1, "image_correspondence": 4, "formatting": 3},
        {"relevance": 2, "visual_dependency": None, "image_correspondence": 4, "formatting": 3},
    ]
    assert (
        second["texts"]
        == [
            {
                "user": "e?",
                "assistant": "f",
                "ratings": {"relevance": 4, "visual_dependency": 3, "image_correspondence": 1},
            }
        ]
        and second["images"] == []
    )


def test_specs():
    specs = parse_sources(
        "easy_vqa*0.5, the_cauldron/vqav2*2:5000=/my/cauldron,jsonl:10=a*b:c.jsonl, "
        "the_cauldron,tables/x=org/name@v1"
    )
    assert [(s.name, s.subset, s.weight, s.cap, s.path) for s in specs] == [
        ("easy_vqa", "", 0.5, 0, ""),
        ("the_cauldron", "vqav2", 2.0, 5000, "/my/cauldron"),
        ("jsonl", "", 1.0, 10, "a*b:c.jsonl"),
        ("the_cauldron", "", 1.0, 0, "HuggingFaceM4/the_cauldron"),
        ("tables", "x", 1.0, 0, "org/name@v1"),
    ]
    assert len(CAULDRON_SUBSETS) == len(set(CAULDRON_SUBSETS)) == 50


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("the_cauldron/vqav3", "no sub-set 'vqav3' in the_cauldron .did you mean 'vqav2'"),
        ("easy_vqa,opnmoji", "no source 'opnmoji' .did you mean 'openmoji'"),
        ("easy_vqa/train", "no source 'easy_vqa/train'"),
        ("easy_vqa,", "'' is not of the form NAME"),
        ("easy_vqa*two", "not of the form NAME"),
        ("easy_vqa*1.2.3", "the weight 1.2.3 is not a number"),
        ("easy_vqa*0", "the weight must be above 0"),
        ("easy_vqa=here", "easy_vqa takes no path"),
        ("llava", "'llava' needs a path: llava=PATH"),
        ("easy_vqa,easy_vqa*2", "easy_vqa is listed twice"),
        ("the_cauldron/robut_sq", "did you mean 'robut_sqa', 'robut_wtq' or 'robut_wikisql'.."),
        (
            "jsonl=/my,own/a.jsonl",
            "no source 'own/a.jsonl' .*; commas separate sources: a path cannot hold one",
        ),
        ("jsonl=/my,*", "not of the form .*; commas separate sources"),
    ],
)
def test_bad_specs(sources, message):
    with pytest.raises(UsageError, match=message):
        parse_sources(sources)


def test_bad_folders(cauldron, tmp_path):
    for sources, message in (
        (f"the_cauldron/aokvqa={cauldron}", "holds no Parquet files in a folder aokvqa"),
        (f"tables/ai2={cauldron}", "in a folder ai2 .did you mean 'ai2d'"),
        (f"tables={tmp_path}/nowhere", "neither a local folder nor a Hub id"),
        (
            f"the_cauldron/ai2d={cauldron}",
            "data.validation_images = 50 leaves none of the 12 records of ai2d for training",
        ),
    ):
        with pytest.raises(UserError, match=message):
            process_group(sources, 50)


def test_a_mixture_has_every_sources_name_weight_and_cap(cauldron):
    training, _ = process_group(f"the_cauldron*0.5={cauldron},easy_vqa:100")
    assert [(s.name, s.weight, s.cap) for s in training] == [
        ("ai2d", 0.5, 0),
        ("vqav2", 0.5, 0),
        ("easy_vqa", 1.0, 100),
    ]


def test_variants_of_an_emoji_stay_in_one_split():
    splits = {split: openmoji(split) for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) > 3900
    names = {r["references"][0]: split for split, records in splits.items() for r in records}
    base_of = {
        r["references"][0]: base_emoji([int(c, 16) for c in Path(r["images"][0]).stem.split("-")])
        for records in splits.values()
        for r in records
    }
    for group in (
        ("waving hand", "waving hand light skin tone", "waving hand dark skin tone"),
        ("woman firefighter", "man firefighter", "firefighter", "firefighter medium skin tone"),
        ("man", "woman", "person", "man red hair", "woman white hair"),
        ("women holding hands", "men holding hands", "woman and man holding hands"),
        ("man dancing", "woman dancing"),
        (
            "kiss",
            "kiss man man",
            "kiss woman man light skin tone",
            "kiss person person dark skin tone medium skin tone",
        ),
        ("couple with heart", "couple with heart woman woman", "couple with heart man man dark skin tone"),
        ("Santa Claus", "Mrs. Claus", "Mx Claus medium skin tone"),
        ("handshake", "handshake light skin tone", "handshake dark skin tone light skin tone"),
        (
            "people holding hands",
            "woman and man holding hands",
            "people holding hands dark skin tone light skin tone",
        ),
        ("family", "family man woman boy", "family woman woman girl girl", "family man boy"),
        ("prince", "princess", "person with crown", "person with crown dark skin tone"),
        ("pregnant woman", "pregnant man", "pregnant person medium skin tone"),
        (
            "people with bunny ears",
            "women with bunny ears",
            "men with bunny ears light skin tone dark skin tone",
        ),
        ("people wrestling", "men wrestling", "women wrestling dark skin tone light skin tone"),
    ):
        assert len({names[name] for name in group}) == 1 == len({base_of[name] for name in group}), group
    bases = {
        split: {base_emoji([int(c, 16) for c in Path(r["images"][0]).stem.split("-")]) for r in records}
        for split, records in splits.items()
    }
    assert (
        not bases["train"] & bases["test"]
        and not bases["train"] & bases["validation"]
        and not bases["validation"] & bases["test"]
    )
    image = np.asarray(open_image(splits["test"][0]["images"][0]))
    assert image.shape == (256, 256, 3) and (image[0, 0] == 255).all() and image.std() > 10


def test_an_emoji_has_several_references_and_its_group():
    records = [r for split in ("train", "validation", "test") for r in openmoji(split)]
    of = {r["texts"][0]["assistant"]: r["references"] for r in records}
    assert of["dog face"] == ["dog face", "dog", "dog face, animals and nature"]
    assert of["waving hand dark skin tone"][-1] == "waving hand dark skin tone, people and body"
    assert of["men holding hands light skin tone dark skin tone"][-1].endswith(
        ", people and body"
    )  # its own entry has none
    assert (
        sum(r[-1].startswith(f"{r[0]}, ") for r in of.values()) >= len(of) - 27
    )  # newer than the list of groups


def test_two_sets_of_one_name_are_distinguished(cauldron, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(('{"texts": [{"user": "q", "assistant": "a"}]}\n') * 6)
    training, _ = process_group(
        f"jsonl={tmp_path}/a.jsonl,jsonl={tmp_path}/b.jsonl,"
        f"the_cauldron/ai2d={cauldron},tables/ai2d={cauldron},easy_vqa"
    )
    assert [s.name for s in training] == [
        f"jsonl={tmp_path}/a.jsonl",
        f"jsonl={tmp_path}/b.jsonl",
        f"the_cauldron/ai2d={cauldron}",
        f"tables/ai2d={cauldron}",
        "easy_vqa",
    ]
    for twice in (
        f"the_cauldron={cauldron},the_cauldron/ai2d={cauldron}",
        f"the_cauldron/all={cauldron},the_cauldron={cauldron}",
    ):
        with pytest.raises(UsageError, match="the_cauldron/ai2d is listed twice"):
            process_group(twice)


def test_a_sub_set_may_have_brackets_in_its_name(cauldron, tmp_path):
    (tmp_path / "geo170k(align)").symlink_to(cauldron / "ai2d")
    assert parse_sources("finevision/geo170k(align)*2:7=/x")[0].subset == "geo170k(align)"
    with pytest.raises(UserError, match="no Parquet files in a folder nothing"):
        process_group(f"tables/nothing={tmp_path}")
