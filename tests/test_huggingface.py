"""Any set by its name, from a Hub on loopback and from folders: its files, splits and columns."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from PIL import Image

from configs.train import DataConfig
from data.columns import columns_of, record_of
from data.conversations import CAPTION_PROMPT
from data.images import open_image
from data.sources import open_sources
from data.splits import by_split, choose_splits
from tests.conftest import dataset_of
from tests.hub_server import hub
from tests.programs import at_hub, run_program
from tests.test_webdataset import write_shard
from utils.errors import UserError
from utils.files import read_json

ROOT = Path(__file__).parent.parent
ROWS = 12


def picture(number: int) -> Image.Image:
    """A picture that its width tells from others."""
    return Image.new("RGB", (20 + number, 10), (number * 9, 0, 99))


def instruct_mix(first: int) -> datasets.Dataset:
    """As trl-lib/llava-instruct-mix."""
    text = datasets.Value("string")
    parts = datasets.List({"type": text, "text": text})
    numbers = range(first, first + ROWS)
    return datasets.Dataset.from_dict(
        {
            "messages": [
                [
                    {
                        "role": "user",
                        "content": [{"type": "image", "text": None}, {"type": "text", "text": f"what {i}?"}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": f"it is {i}"}]},
                ]
                for i in numbers
            ],
            "images": [[picture(i)] for i in numbers],
        },
        datasets.Features(
            {
                "messages": datasets.List({"role": text, "content": parts}),
                "images": datasets.List(datasets.Image()),
            }
        ),
    )


def vqa(first: int) -> datasets.Dataset:
    """As VQAv2: ten people's answers, and the one that most gave."""
    numbers = range(first, first + ROWS)
    return datasets.Dataset.from_dict(
        {
            "question_type": ["what is"] * ROWS,
            "multiple_choice_answer": [f"it is {i}" for i in numbers],
            "answers": [
                [{"answer": f"it is {i}" if n < 6 else "no", "answer_id": n} for n in range(10)]
                for i in numbers
            ],
            "image_id": list(numbers),
            "question": [f"what {i}?" for i in numbers],
            "image": list(map(picture, numbers)),
        }
    )


def flickr(first: int) -> datasets.Dataset:
    """As Flickr30k: five captions an image."""
    numbers = range(first, first + ROWS)
    return datasets.Dataset.from_dict(
        {
            "image": list(map(picture, numbers)),
            "caption": [[f"it is {i}", *(f"{i} {n}" for n in range(4))] for i in numbers],
            "filename": [f"{i}.jpg" for i in numbers],
        }
    )


def cauldron(first: int) -> datasets.Dataset:
    numbers = range(first, first + ROWS)
    return datasets.Dataset.from_dict(
        {
            "images": [[picture(i)] for i in numbers],
            "texts": [[{"user": f"what {i}?", "assistant": f"it is {i}", "source": "made"}] for i in numbers],
        },
    )


# Name on the Hub → its rows, the files of its splits, and what chooses the split to train on.
SETS = {
    "trl-lib/llava-instruct-mix": (instruct_mix, {"train": "data/train-0", "test": "data/test-0"}, ""),
    "lmms-lab/VQAv2": (vqa, {"validation": "data/validation-0", "test": "data/test-0"}, ":split=validation"),
    "nlphuji/flickr30k": (flickr, {"train": "train", "validation": "dev", "test": "test"}, ""),
    "HuggingFaceM4/the_cauldron": (cauldron, {"ai2d": "ai2d/train-0", "vqav2": "vqav2/train-0"}, ""),
}


@pytest.fixture(scope="module")
def repos(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("repos")
    for name, (rows, files, _) in SETS.items():
        for number, file in enumerate(files.values()):
            path = root / name / f"{file}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows(number * ROWS).to_parquet(path)
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("ai2d", "vqav2")
    )
    (root / "HuggingFaceM4/the_cauldron/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return {f"datasets/{name}": root / name for name in SETS}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "converted")


def opened(sources: str, **options):
    return open_sources(DataConfig(sources=sources, **{"validation_images": 3} | options))


def records_of(source) -> list[dict]:
    return [source.records[i] for i in range(source.start, source.stop)]


def numbers(records: list[dict]) -> list[int]:
    return sorted(open_image(r["images"][0]).width - 20 for r in records)


def check(name: str, record: dict) -> None:
    """A record is what its row says; its number is in the picture."""
    number = open_image(record["images"][0]).width - 20
    answer, question = f"it is {number}", f"what {number}?"
    if "mix" in name:
        assert [m["content"][-1]["text"] for m in record["messages"]] == [question, answer]
    elif "flickr" in name:
        assert [t["assistant"] for t in record["texts"]] == record["references"]
        assert record["references"][0] == answer and len(record["references"]) == 5
        assert {t["user"] for t in record["texts"]} == {CAPTION_PROMPT}
    else:
        assert [(t["user"], t["assistant"]) for t in record["texts"]] == [(question, answer)]
    if "VQA" in name:
        assert sorted(record["references"]) == sorted([answer] * 6 + ["no"] * 4)


@pytest.mark.parametrize("name", SETS)
def test_a_folder_of_the_hubs_form(repos, name, capsys):
    folder, split = repos[f"datasets/{name}"], SETS[name][2]
    training, validation = opened(f"hf={folder}{split}")
    assert all(len(s) for s in training + validation)
    for source in training + validation:
        for record in records_of(source):
            check(name, record)
    ours = [number for source in training for number in numbers(records_of(source))]
    held_out = [number for source in validation for number in numbers(records_of(source))]
    assert not set(ours) & set(held_out)
    files = SETS[name][1]
    if "test" in files:  # it is never touched
        tests = range(list(files).index("test") * ROWS, len(files) * ROWS)
        assert not set(tests) & {*ours, *held_out} and "not read: test" in training[0].note
    if "flickr" in name:
        assert ours == list(range(ROWS)) and set(held_out) < set(range(ROWS, 2 * ROWS))
    assert "files become Arrow in" in capsys.readouterr().out
    again, _ = opened(f"hf={folder}{split}")
    assert records_of(again[0]) == records_of(training[0]) and capsys.readouterr().out == ""


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_training_by_names_alone(repos, tmp_path):
    """All four, and tars, from a Hub on loopback; resumed, a run goes on as if it had not stopped."""
    sources = ",".join(f"hf={name}{split}" for name, (_, _, split) in SETS.items()) + ",hf=laion/tars"
    write_shard(tmp_path / "tars" / "00000.tar", range(ROWS))
    train = [str(ROOT / "train_dual_tower.py"), "--cache_dir", "cache", "--data.sources", sources]
    train += ["--data.validation_images", "2", "--train.local_batch_size", "2", "--data.window", "8"]
    train += ["--train.global_batch_size", "2", "--train.log_every", "1"]
    # While it warms up, no rate depends on the number of steps.
    train += ["--train.schedule", "cosine"]
    with hub(repos | {"datasets/laion/tars": tmp_path / "tars"}) as address:
        there = partial(at_hub, str(address), str(tmp_path / "hf"))
        done = run_program([*train, "--output_dir", "run", "--max_steps", "2"], tmp_path, there)
        assert done.returncode == 0, done.stderr
        go_on = [train[0], "--output_dir", "run", "--resume", "auto", "--max_steps", "3"]
        resumed = run_program(go_on, tmp_path, there)
        whole = run_program([*train, "--output_dir", "whole", "--max_steps", "3"], tmp_path, there)
    assert resumed.returncode == whole.returncode == 0, resumed.stderr + whole.stderr
    for line in ("llava-instruct-mix: trains on train", "VQAv2: trains on validation", "not read: test"):
        assert line in done.stdout
    assert read_json(tmp_path / "whole" / "config.json")["data"]["sources"] == sources
    assert losses(tmp_path / "run")[-1] == losses(tmp_path / "whole")[-1]
    assert len(losses(tmp_path / "whole")) == 3


@pytest.mark.parametrize("form", ["csv", "json", "jsonl", "imagefolder", "saved", "saved_splits"])
def test_local_forms(tmp_path, form):
    """Relative paths of images start at their file's folder, wherever the program runs."""
    folder = tmp_path / "set"
    data = folder if form in ("csv", "json", "jsonl") else folder / "train"
    if "saved" in form:
        rows = flickr(0)
        splits = datasets.DatasetDict({"train": rows, "test": flickr(ROWS)})
        (splits if form == "saved_splits" else rows).save_to_disk(folder)
    else:
        (data / "pictures").mkdir(parents=True)
        for i in range(ROWS):
            picture(i).save(data / "pictures" / f"{i}.png")
        rows = [{"image": f"pictures/{i}.png", "caption": f"it is {i}"} for i in range(ROWS)]
        if form == "imagefolder":
            rows = [{"file_name": row["image"], "caption": row["caption"]} for row in rows]
        if form in ("csv", "imagefolder"):
            lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
            (data / ("train.csv" if form == "csv" else "metadata.csv")).write_text("\n".join(lines))
        elif form == "json":
            (data / "train.json").write_text(json.dumps(rows))
        else:
            (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (data / ".ipynb_checkpoints").mkdir()
    for name in ("._train.csv", ".hidden.json"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text("nothing")
    (training,), (validation,) = opened(f"hf={folder}")
    records = records_of(training) + records_of(validation)
    assert numbers(records) == list(range(ROWS)) and len(validation) == 3
    for record in records:
        number = open_image(record["images"][0]).width - 20
        assert record["texts"][0] == {"user": CAPTION_PROMPT, "assistant": f"it is {number}"}


def test_messages_whose_contents_are_texts_and_lists(tmp_path):
    """JSON allows what Arrow's tables do not."""
    answer = {"role": "assistant", "content": "yes"}
    contents = ["what?", [{"type": "text", "text": "what?"}]] * 4
    rows = [{"messages": [{"role": "user", "content": content}, answer]} for content in contents]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (training,), (validation,) = opened(f"hf={tmp_path}")
    records = records_of(training) + records_of(validation)
    assert sorted(str(r["messages"][0]["content"]) for r in records) == sorted(map(str, contents))
    (one,), _ = opened(f"hf={tmp_path}/train.jsonl")
    assert len(one) == 5 and one.name == "train.jsonl"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf={0}/nlphuji/flickr30k:split=trian", "has no split 'trian' .did you mean 'train'"),
        ("hf={0}/lmms-lab/VQAv2", "no split to train on .it has: test, validation.: choose one, :split=NAME"),
        ("hf={0}/nlphuji/flickr30k:caption=texts", "has no column 'texts' .known: caption, filename, image"),
        ("hf={0}/nowhere/here", "neither a local file or folder nor a Hub id"),
        ("hf/flickr3={0}/nlphuji", "nlphuji has neither a configuration nor a folder 'flickr3'"),
        ("hf/ai3={0}/HuggingFaceM4/the_cauldron", "cannot be opened by `datasets`: .*ai3"),
        ("hf={0}/notes.txt", "notes.txt is no table that is read: .parquet, .arrow, .csv"),
        ("hf={0}/notes.csv:images=text", "notes.csv has the columns text: map them with images, messages, "),
        ("hf={0}/nlphuji/flickr30k:captions=text", ":captions= is no option .did you mean 'caption'"),
        ("hf={0}/nlphuji/flickr30k:caption=a:caption=b", ":caption= is given twice"),
        ("hf={0}/nlphuji/flickr30k:validation=train", "train would both train and validate"),
        ("hf={0}/nlphuji/flickr30k,hf={0}/nlphuji/flickr30k/", "hf is listed twice"),
        (
            "tables={0}/nlphuji/flickr30k:split=train[:5]",
            "a part of a split can be read of converted sets alone",
        ),
        ("hf", "'hf' needs a path: hf=PATH"),
    ],
)
def test_what_cannot_be_opened_is_one_line(repos, spec, message):
    root = next(iter(repos.values())).parent.parent
    (root / "notes.txt").write_text("nothing\n")
    (root / "notes.csv").write_text("text\na\n")
    with pytest.raises(UserError, match=message) as error:
        opened(spec.format(root))
    assert "\n" not in str(error.value)


def test_a_full_disk_is_noticed_before_the_conversion(repos, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(
        UserError, match=r"files become Arrow in .* of 0.0 MB free: set HF_HOME to a larger disk"
    ):
        opened(f"hf={repos['datasets/nlphuji/flickr30k']}")
    assert not any((tmp_path / "converted").rglob("*.arrow"))


def test_columns_by_their_names():
    def record(row: dict, **given: str) -> dict:
        return record_of(row, columns_of(row, given, "it"), Path("/set"))

    image = {"bytes": b"png", "path": None}
    assert record(
        {"picture": image, "ask": "a?", "reply": 3}, images="picture", question="ask", answer="reply"
    ) == {
        "images": [b"png"],
        "texts": [{"user": "a?", "assistant": "3"}],
        "references": ["3"],
    }
    several = record({"image": "a.png", "en": "a cat", "de": "eine Katze"}, caption="en+de")
    assert several["references"] == ["a cat", "eine Katze"] and several["images"] == ["/set/a.png"]
    two = {
        "left_image": "l.png",
        "right_image": "https://x/r.png",
        "question": "?",
        "answer": ["no", "yes", "yes"],
    }
    assert record(two, images="left_image+right_image") == {
        "images": ["/set/l.png", "https://x/r.png"],
        "texts": [{"user": "?", "assistant": "yes"}],
        "references": ["no", "yes", "yes"],
    }
    asked = record({"image": image, "questions": ["a?", "b?"], "answers": ["1"]})
    assert asked["texts"] == [{"user": "a?", "assistant": "1"}, {"user": "b?", "assistant": None}]
    turns = [{"from": "human", "value": "<image>a?"}, {"from": "gpt", "value": "b"}]
    assert record({"conversations": turns, "image": None})["images"] == []
    assert record({"image": None, "caption": "a"})["images"] is None
    sentences = [{"raw": "a cat", "tokens": ["a", "cat"]}]
    assert record({"image": image, "sentences": sentences})["references"] == ["a cat"]


def test_which_files_are_data_and_of_which_split():
    files = [
        "train-0.parquet",
        "sub/test-00000-of-00001.parquet",
        "val2017/a.parquet",
        "test/train.parquet",
        "contest.parquet",
        ".ipynb_checkpoints/train-0.parquet",
        ".cache/huggingface/download/a.parquet",
        "._x.parquet",
        "train/cache-1f.arrow",
        "__pycache__/a.arrow",
    ]
    root = Path("/data/.hidden/set")
    splits = by_split([str(root / file) for file in files], root)
    assert {split: [str(Path(f).relative_to(root)) for f in found] for split, found in splits.items()} == {
        "train": ["contest.parquet", "train-0.parquet"],
        "test": ["sub/test-00000-of-00001.parquet", "test/train.parquet"],
        "validation": ["val2017/a.parquet"],
    }
    assert choose_splits(["train", "dev", "test"], "", "", "it") == ("train", "dev", ["test"])
    assert choose_splits(["train", "dev"], "train+dev", "", "it") == ("train+dev", "", [])
    assert choose_splits(["train_sft", "test_sft"], "", "", "it") == ("train_sft", "", ["test_sft"])
    assert choose_splits(["all"], "", "", "it") == ("all", "", [])
    assert choose_splits(["a", "b"], "a", "b[:10%]", "it") == ("a", "b[:10%]", [])


@pytest.mark.parametrize("form", ["parquet", "arrow", "hub"])
def test_streamed_tables_keep_to_their_splits(tmp_path, go_to, form):
    splits = {split: flickr(n * ROWS) for n, split in enumerate(("train", "validation", "test"))}
    root = tmp_path / "set"
    if form == "arrow":
        datasets.DatasetDict(splits).save_to_disk(root)
        (root / "train" / "cache-0.arrow").write_bytes(b"")
    else:
        for split, rows in splits.items():
            for name in (f"data/{split}-0", f".ipynb_checkpoints/{split}-0", f"data/._{split}-0"):
                (root / name).parent.mkdir(exist_ok=True, parents=True)
                rows.to_parquet(root / f"{name}.parquet")
    with hub({"datasets/org/set": root}) as address:
        go_to(str(address))
        (training,), (validation,) = opened(f"tables={'org/set' if form == 'hub' else root}")
        assert numbers(records_of(training)) == list(range(ROWS))
        assert numbers(records_of(validation)) == list(range(ROWS, ROWS + 3))
        assert "not read: test" in training.note and training.name == "tables"


@pytest.mark.parametrize("spec", ["tables={0}", "hf={0}"])
def test_paths_in_tables_start_at_their_file(tmp_path, spec):
    """Wherever the program runs; also where `datasets` stored only a path."""
    rows = {"images": [[f"pictures/{i}.png"] for i in range(ROWS)], "caption": ["a"] * ROWS}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "train.parquet")
    (tmp_path / "set" / "pictures").mkdir()
    for i in range(ROWS):
        picture(i).save(tmp_path / "set" / "pictures" / f"{i}.png")
    (training,), _ = opened(spec.format(tmp_path / "set"))
    assert numbers([training.records[i] for i in range(ROWS)]) == list(range(ROWS))


def save(path: Path, first: int, rows: int = 3) -> None:
    """Questions about pictures, in the form that the ending asks for; the pictures lie beside the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + rows)
    if path.suffix == ".parquet":
        vqa(first).select(range(rows)).to_parquet(path)
        return
    (path.parent / "images").mkdir(exist_ok=True)
    lines = []
    for n in numbers:
        picture(n).save(path.parent / "images" / f"{n - first}.png")
        lines.append({"image": f"images/{n - first}.png", "question": f"what {n}?", "answer": f"it is {n}"})
    if path.suffix == ".csv":
        rows_of = [",".join(lines[0]), *(",".join(line.values()) for line in lines)]
        path.write_text("\n".join(rows_of))
    else:
        path.write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize("reader", ["hf", "tables"])
@pytest.mark.parametrize(
    ("files", "trained"),
    [
        ({"train2014/0": 0, "val2014/0": 3, "test2015/0": 6}, [0, 1, 2]),
        ({"data/train-0": 0, "data/testA-0": 3, "data/testmini-0": 6}, [0, 1, 2]),
        ({"train": 0, "extra/0": 3}, [0, 1, 2, 3, 4, 5]),  # no file is lost
        ({"data/train-0": 0, "ai2d/train-0": 3}, [0, 1, 2, 3, 4, 5]),
        ({"train-0": 0, "more": 3}, [0, 1, 2, 3, 4, 5]),
        ({"test/train-0": 3, "train/train-0": 0, "heldout": 6}, [0, 1, 2]),
    ],
)
def test_folders_as_users_have_them(tmp_path, reader, files, trained):
    for name, first in files.items():
        save(tmp_path / "set" / f"{name}.parquet", first)
    (training,), (validation,) = opened(f"{reader}={tmp_path}/set", validation_images=1)
    own = numbers([training.records[i] for i in range(len(training.records))])
    assert own == trained and set(numbers(records_of(validation))) <= set(range(6))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_each_file_has_its_own_folder(tmp_path, ending):
    """A table beside its pictures is a table; tables in two folders have each their own pictures."""
    save(tmp_path / "set" / f"data.{ending}", 0)
    (training,), _ = opened(f"hf={tmp_path}/set", validation_images=1)
    for record in (training.records[i] for i in range(3)):
        check("", record)
    for n, name in enumerate("ab"):
        save(tmp_path / "two" / name / f"train.{ending}", n * 3)
    (training,), _ = opened(f"hf={tmp_path}/two", validation_images=1)
    records = [training.records[i] for i in range(6)]
    assert numbers(records) == list(range(6))
    for record in records:
        check("", record)
    configs = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a/*." + ending
    (tmp_path / "two" / "README.md").write_text(
        f"---\n{configs}\n  - split: train_b\n    path: b/*.{ending}\n---\n"
    )
    (training,), _ = opened(f"hf={tmp_path}/two:split=train_b", validation_images=1)
    assert numbers([training.records[i] for i in range(3)]) == [3, 4, 5]


def test_values_of_csv_are_as_they_are_written(tmp_path):
    answers = ["007", "1", "", "True", "None", "2.50", "2020-01-01"]
    lines = ["image,question,answer", *(f"{n}.png,what?,{answer}" for n, answer in enumerate(answers))]
    for encoding in ("utf-8", "utf-16", "utf-8-sig"):
        (tmp_path / "x.csv").write_text("\n".join(lines), encoding=encoding)
        (training,), _ = opened(f"hf={tmp_path}/x.csv", validation_images=1)
        records = [training.records[i] for i in range(len(answers))]
        assert {Path(r["images"][0]).stem: r["texts"][0]["assistant"] for r in records} == {
            str(n): answer for n, answer in enumerate(answers)
        }


def test_names_of_classes_and_choices(tmp_path):
    rows = {
        "image": [picture(n) for n in range(4)],
        "label": [0, 1, 1, 0],
        "question": ["which?"] * 4,
        "choices": [["red", "blue"]] * 4,
        "answer": [1, 0, 1, 0],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    table.save_to_disk(tmp_path / "set")
    (training,), _ = opened(f"hf={tmp_path}/set:caption=label", validation_images=1)
    texts = {number_of(r): r["texts"][0]["assistant"] for r in (training.records[i] for i in range(4))}
    assert texts == {0: "cat", 1: "dog", 2: "dog", 3: "cat"}
    (training,), _ = opened(f"hf={tmp_path}/set", validation_images=1)
    pairs = {number_of(r): r["texts"][0] for r in (training.records[i] for i in range(4))}
    assert pairs[0] == {"user": "which?\nChoices: red; blue", "assistant": "blue"}
    assert pairs[1]["assistant"] == "red"
    (half,), _ = opened(f"hf={tmp_path}/set:split=train[:50%]", validation_images=1)
    assert len(half.records) == 2  # also of a saved set


def number_of(record: dict) -> int:
    return numbers([record])[0]


def test_a_caption_without_a_picture_is_dropped(tmp_path, renderer):
    rows = {"images": [[picture(0)], [], [picture(2)]], "caption": ["a", "b", "c"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    (training,), _ = opened(f"hf={tmp_path}/set", validation_images=1)
    data = dataset_of([training.records[i] for i in range(3)], renderer)
    assert sum(len(data.samples(0, n, True)) for n in range(3)) == 2
    assert dict(data.dropped) == {("test", "image_missing"): 1}


@pytest.mark.parametrize("ending", ["parquet", "arrow", "csv", "json", "jsonl"])
def test_pointers_and_several_kinds_are_named(tmp_path, ending):
    (tmp_path / f"train.{ending}").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    )
    with pytest.raises(UserError, match=f"train.{ending} is a git-lfs pointer"):
        opened(f"hf={tmp_path}")
    (tmp_path / ("more.csv" if "json" in ending else "more.json")).write_text("a")
    with pytest.raises(UserError, match="holds files of several kinds .*: give one file or folder"):
        opened(f"hf={tmp_path}")


def test_no_row_is_held_out_and_trained(repos):
    folder = repos["datasets/nlphuji/flickr30k"]
    for sources in (f"hf={folder},hf={folder}:split=train", f"hf={folder},hf={folder}/"):
        with pytest.raises(UserError, match="is listed twice"):
            opened(sources)
    (training,), (validation,) = opened(
        f"hf={folder}:split=train[4:]:validation=train[:4]", validation_images=9
    )
    assert sorted(numbers(records_of(training)) + numbers(records_of(validation))) == list(range(ROWS))
