"""Data sets as files → records: every layout, where images lie, and the error of a broken set."""

import base64
import gzip
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from configs.train import DataConfig
from data.conversations import ConversationError, conversations_of, parts_of, with_images
from data.formats import coco, jsonl, llava, mmc4, ocr_vqa
from data.images import open_image
from data.sources import open_sources
from data.tokenizer import Tokenizer
from models.weights.tensors import read_safetensors
from tests.conftest import dataset_of
from utils.errors import ImageError, UserError

ASK = "Describe the image."


def lay(root: Path, *names: str) -> None:
    """Files where images are looked for; their content is not read."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def official(*files: str) -> dict:
    """Image 1 has two captions, any other none."""
    captions = [{"image_id": 1, "caption": "A cat. "}, {"image_id": 1, "caption": "A grey cat."}]
    return {
        "info": {},
        "images": [{"id": i, "file_name": file} for i, file in enumerate(files, 1)],
        "annotations": captions,
    }


def karpathy(number: int, split: str, folder: str, *captions: str) -> dict:
    sentences = [{"raw": caption, "tokens": []} for caption in captions]
    return {
        "filepath": folder,
        "filename": f"COCO_{folder}_{number}.jpg",
        "cocoid": number,
        "split": split,
        "sentences": sentences,
    }


def test_coco_official(tmp_path):
    lay(tmp_path, "train2017/1.jpg", "train2017/2.jpg")
    path = write(tmp_path / "annotations" / "captions.json", official("1.jpg", "2.jpg", "gone.jpg"))
    texts = [{"user": ASK, "assistant": "A cat."}, {"user": ASK, "assistant": "A grey cat."}]
    folder = tmp_path / "train2017"
    assert coco(path) == (
        [
            {
                "images": [str(folder / "1.jpg")],
                "texts": texts,
                "id": "coco/1",
                "turns": "branch",
                "references": ["A cat.", "A grey cat."],
            },
            {
                "images": [str(folder / "2.jpg")],
                "texts": [],
                "id": "coco/2",
                "turns": "branch",
                "references": [],
            },
            {
                "images": [str(folder / "gone.jpg")],
                "texts": [],
                "id": "coco/3",
                "turns": "branch",
                "references": [],
            },
        ],
        None,
    )


def test_coco_caption_that_is_no_text_is_left_to_be_counted(tmp_path):
    lay(tmp_path, "1.jpg")
    content = official("1.jpg") | {
        "annotations": [
            {"image_id": 1, "caption": None},
            {"image_id": 1, "caption": "half \ud83d"},
            {"image_id": 1, "caption": "A cat."},
        ]
    }
    [record] = coco(write(tmp_path / "c.json", content))[0]
    assert [turn["assistant"] for turn in record["texts"]] == ["", "", "A cat."] and record["references"] == [
        "A cat."
    ]


def test_coco_karpathy(tmp_path):
    lay(tmp_path, "images/train2014/COCO_train2014_1.jpg", "images/val2014/COCO_val2014_2.jpg")
    entries = [
        karpathy(9, "test", "val2014", "Left out."),
        karpathy(1, "train", "train2014", "A cat."),
        karpathy(2, "restval", "val2014", "A dog.", "Dogs."),
        karpathy(3, "val", "val2014", "A cow."),
    ]
    training, validation = coco(write(tmp_path / "dataset_coco.json", {"images": entries, "dataset": "coco"}))
    assert [r["images"] for r in training] == [
        [str(tmp_path / "images/train2014/COCO_train2014_1.jpg")],
        [str(tmp_path / "images/val2014/COCO_val2014_2.jpg")],
    ]
    assert [(r["id"], r["references"]) for r in training] == [
        ("coco/1", ["A cat."]),
        ("coco/2", ["A dog.", "Dogs."]),
    ]
    image = str(tmp_path / "images/val2014/COCO_val2014_3.jpg")
    texts = [{"user": ASK, "assistant": "A cow."}]
    assert validation == [
        {"images": [image], "texts": texts, "id": "coco/3", "turns": "branch", "references": ["A cow."]}
    ]
    assert coco(write(tmp_path / "train.json", {"images": entries[:3]}))[1] is None


@pytest.mark.parametrize("folder", ["set", "set/images", ".", "images"])
@pytest.mark.parametrize(
    "name, inner",
    [
        ("COCO_train2014_01.jpg", "train2014"),
        ("01.jpg", "val2014"),
        ("01.jpg", "val2017"),
        ("01.jpg", "."),
        ("val2014/01.jpg", "."),
    ],
)
def test_coco_finds_the_folder_of_the_images(tmp_path, folder, name, inner):
    location = Path(folder) / inner / name
    lay(tmp_path, str(location))
    training, _ = coco(write(tmp_path / "set" / "captions.json", official(name)))
    assert training[0]["images"] == [str(tmp_path / location)]


def test_coco_folder_given_by_the_name_is_the_only_one(tmp_path):
    lay(tmp_path, "val2014/COCO_train2014_01.jpg", "train2017/COCO_train2014_01.jpg")
    with pytest.raises(UserError, match="their sub-folders train2014, COCO_train2014_01.jpg is in none"):
        coco(write(tmp_path / "captions.json", official("COCO_train2014_01.jpg")))


def test_paths_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    lay(tmp_path, "images/1.jpg")
    monkeypatch.chdir(tmp_path / "images")
    write(tmp_path / "images" / "c.json", official("1.jpg"))
    write(tmp_path / "images" / "l.json", [{"image": "1.jpg", "conversations": []}])
    (tmp_path / "images" / "r.jsonl").write_text(
        '{"image": "1.jpg", "texts": [{"user": "a", "assistant": "b"}]}'
    )
    for read, name in ((coco, "c.json"), (llava, "l.json"), (jsonl, "r.jsonl")):
        assert read(Path(name))[0][0]["images"] == [str(tmp_path / "images/1.jpg")], name


def test_images_that_are_missing_at_the_front_do_not_hide_the_rest(tmp_path):
    lay(tmp_path, "val2017/150.jpg", "val2017/151.jpg")
    training, _ = coco(write(tmp_path / "c.json", official(*(f"{i}.jpg" for i in range(200)))))
    assert [r["images"] for r in training] == [[str(tmp_path / f"val2017/{i}.jpg")] for i in range(200)]


def book(split: int, questions: list, answers: list, url: str = "http://x.org/I/51a.jpg") -> dict:
    return {
        "imageURL": url,
        "questions": questions,
        "answers": answers,
        "split": split,
        "title": "T",
        "genre": "G",
    }


def test_ocr_vqa(tmp_path):
    lay(tmp_path, "images/0761183272.jpg")
    books = {
        "0761183272": book(1, ["Who wrote this?", "Which genre?"], ["Ann", "Poetry"]),
        "t": book(3, ["Left out?"], ["Yes"]),
        "v": book(2, ["Is it a comic?"], ["No"], "http://x.org/I/9.gif"),
        "more": book(1, ["One?", "Two?"], ["1"]),
        "none": book(1, [None], ["1", "2"]),
    }
    path = write(tmp_path / "dataset.json", books)
    images = tmp_path / "images"
    expected = (
        [
            {
                "images": [str(images / "0761183272.jpg")],
                "texts": [
                    {"user": "Who wrote this?", "assistant": "Ann"},
                    {"user": "Which genre?", "assistant": "Poetry"},
                ],
                "id": "ocr_vqa/0761183272",
            },
            {
                "images": [str(images / "more.jpg")],
                "texts": [{"user": "One?", "assistant": "1"}, {"user": "Two?", "assistant": ""}],
                "id": "ocr_vqa/more",
            },
            {
                "images": [str(images / "none.jpg")],
                "texts": [{"user": "", "assistant": "1"}, {"user": "", "assistant": "2"}],
                "id": "ocr_vqa/none",
            },
        ],
        [
            {
                "images": [str(images / "v.gif")],
                "texts": [{"user": "Is it a comic?", "assistant": "No"}],
                "id": "ocr_vqa/v",
            }
        ],
    )
    assert ocr_vqa(path) == expected == ocr_vqa(tmp_path)
    assert ocr_vqa(write(tmp_path / "train.json", {"0761183272": books["0761183272"]})) == (
        expected[0][:1],
        None,
    )


def say(*turns: tuple[str, object]) -> list[dict]:
    return [{"from": who, "value": value} for who, value in turns]


def test_llava(tmp_path):
    lay(tmp_path, "coco/1.jpg", "gqa/2.jpg")
    entries = [
        {
            "id": "a",
            "image": "coco/1.jpg",
            "conversations": say(
                ("human", "<image>\nWhat is it?"),
                ("gpt", "A cat."),
                ("human", "Where?"),
                ("gpt", "On a\nmat."),
            ),
        },
        {
            "id": 7,
            "image": ["coco/1.jpg", "gqa/gone.jpg"],
            "conversations": say(("user", "<image>\n<image>\nSame?"), ("assistant", "No.")),
        },
        {"id": "a", "conversations": say(("human", " Hello. "), ("gpt", "Hi."))},
        {"image": None, "conversations": say(("human", "Half \ud83d"), ("gpt", None))},
    ]
    training, validation = llava(write(tmp_path / "mix.json", entries))
    assert validation is None and [(r["id"], r["images"]) for r in training] == [
        ("llava/a", [str(tmp_path / "coco/1.jpg")]),
        ("llava/7", [str(tmp_path / "coco/1.jpg"), str(tmp_path / "gqa/gone.jpg")]),
        ("llava/a@2", []),
        ("llava/3", []),
    ]
    assert list(map(shown, training)) == [
        "user: [image 0]What is it? | assistant: A cat. | user: Where? | assistant: On a\nmat.",
        "user: [image 0][image 1]Same? | assistant: No.",
        "user:  Hello.  | assistant: Hi.",
        "user:  | assistant: ",
    ]


def shown(record: dict) -> str:
    """A record's one conversation as a line."""
    [messages] = conversations_of(record, "branch")
    return " | ".join(
        f"{m['role']}: "
        + "".join(p["text"] if p["type"] == "text" else f"[image {p['index']}]" for p in parts_of(m))
        for m in with_images(messages, len(record["images"]))
    )


def test_llava_images_next_to_the_file(tmp_path):
    lay(tmp_path, "images/004/1.jpg")
    pair = say(("human", "<image>"), ("gpt", "A cat."))
    entries = [{"id": i, "image": f"004/{i}.jpg", "conversations": pair} for i in (1, 2)]
    training, _ = llava(write(tmp_path / "chat.json", entries))
    assert [r["images"] for r in training] == [
        [str(tmp_path / "images/004/1.jpg")],
        [str(tmp_path / "images/004/2.jpg")],
    ]
    assert shown(training[0]) == "user: [image 0] | assistant: A cat."


ASKED, ANSWERED = ("human", "<image>\nWhat?"), ("gpt", "That.")
CLEAN = "user: [image 0]What? | assistant: That."


@pytest.mark.parametrize(
    "turns, expected",
    [
        ([ASKED, ANSWERED], CLEAN),
        ([("human", "What?"), ANSWERED], CLEAN),  # no place is named: the head of the first message
        ([("system", "Be kind."), ASKED, ANSWERED], f"system: Be kind. | {CLEAN}"),
        ([ASKED, ("gpt", "That.\n<image>")], f"{CLEAN}\n<image>"),  # in answers it is text
        ([ASKED, ("gpt", 3)], CLEAN.replace("That.", "3")),
        ([("human", "Hi."), ANSWERED, ASKED, ANSWERED], f"user: Hi. | assistant: That. | {CLEAN}"),
        ([("human", "A: <image> B?"), ANSWERED], "user: A: [image 0] B? | assistant: That."),
        ([("human", "<image><image>\nWhat?"), ANSWERED], "image_count"),
        ([ANSWERED, ASKED], "turn_order"),
        ([ASKED], "turn_order"),
        ([ASKED, ANSWERED, ANSWERED], "turn_order"),
        ([ASKED, ("tool", "7")], "turn_order"),
        ([("system", "Be kind.")], "turn_order"),
        ([], "turn_order"),
    ],
)
def test_llava_turns(tmp_path, turns, expected):
    lay(tmp_path, "1.jpg")
    entry = {"id": "a", "image": "1.jpg", "conversations": say(*turns)}
    [record] = llava(write(tmp_path / "chat.json", [entry]))[0]
    assert record["images"] == [str(tmp_path / "1.jpg")]
    try:
        assert (record.get("problem") or shown(record)) == expected
    except ConversationError as error:
        assert error.reason == expected


def test_an_empty_image_is_none(tmp_path):
    entry = {"id": "a", "image": "", "conversations": say(("human", "Hi."), ANSWERED)}
    [record] = llava(write(tmp_path / "chat.json", [entry]))[0]
    assert shown(record) == "user: Hi. | assistant: That."


def test_jsonl(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [
        '{"images": ["a.png", "/data/b.png"], "texts": [{"user": "Q1", "assistant": "é"}, '
        '{"user": "Q2", "assistant": ""}], "id": "first"}',
        "",
        '{"image": "in/a.png", "texts": [{"user": "Q", "assistant": "A"}], '
        '"references": ["A", "B"], "turns": "branch", "clip_score": 0.5}\r',
        "  ",
        '{"texts": [{"user": "Q", "assistant": "A \\ud83d\\ude00"}]}',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    folder, pair = tmp_path, [{"user": "Q", "assistant": "A"}]
    assert jsonl(path) == (
        [
            {
                "images": [str(folder / "a.png"), "/data/b.png"],
                "texts": [{"user": "Q1", "assistant": "é"}, {"user": "Q2", "assistant": ""}],
                "id": "first",
            },
            {
                "images": [str(folder / "in/a.png")],
                "texts": pair,
                "id": "jsonl/mine/3",
                "references": ["A", "B"],
                "turns": "branch",
                "clip_score": 0.5,
            },
            {"images": [], "texts": [{"user": "Q", "assistant": "A 😀"}], "id": "jsonl/mine/5"},
        ],
        None,
    )


GOOD = '{"texts": [{"user": "Q", "assistant": "A"}], '
TURNS_FORM = """'texts' must be a list of {"user": text, "assistant": text}, one at least, not """


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{'texts'}", "not valid JSON: Expecting property name enclosed in double quotes at character 2"),
        (
            b'{"texts": "\xe9"}',
            "not valid JSON: 'utf-8' codec can't decode byte 0xe9 in position 11: invalid continuation byte",
        ),
        (b"[" * 100_000, "not valid JSON: maximum recursion depth exceeded"),
        (GOOD + '"id": "a\\ud83d"}', "not valid Unicode: half a character, \\ud83d"),
        ("[1]", "expected an object with one of 'messages', 'conversations', 'texts', 'interleaved'"),
        (
            '{"image": "a.png"}',
            "expected an object with one of 'messages', 'conversations', 'texts', 'interleaved'",
        ),
        (GOOD + '"imagess": []}', "no key 'imagess' (did you mean 'images'?)"),
        (GOOD + '"relevance": 5}', "no key 'relevance' (did you mean 'references'?)"),
        (
            GOOD + '"zzz": 5}',
            "no key 'zzz' (known: clip_score, conversations, id, image, images, interleaved, messages, "
            "references, texts, turns)",
        ),
        (GOOD + '"images": "a.png"}', "'images' must be a list of paths, not \"a.png\""),
        (GOOD + '"images": [3]}', "'images' must be a list of paths, not [3]"),
        (GOOD + '"image": ["a.png"]}', "'image' must be a path, not [\"a.png\"]"),
        (GOOD + '"image": "a", "images": []}', "'image' and 'images' are both there; keep one"),
        (GOOD + '"id": 3}', "'id' must be a text, not 3"),
        (GOOD + '"references": "A"}', "'references' must be a list of texts, not \"A\""),
        (GOOD + '"turns": "chain"}', '\'turns\' must be "branch", not "chain"'),
        (GOOD + '"clip_score": true}', "'clip_score' must be a number, not true"),
        (GOOD + '"clip_score": NaN}', "'clip_score' must be a number, not NaN"),
        ('{"texts": []}', TURNS_FORM + "[]"),
        ('{"texts": {"user": "Q", "assistant": "A"}}', TURNS_FORM + '{"user": "Q", "assistant": "A"}'),
        ('{"texts": [{"user": "Q"}]}', TURNS_FORM + '[{"user": "Q"}]'),
        (
            '{"texts": [{"user": "Q", "assistant": ["A"]}]}',
            TURNS_FORM + '[{"user": "Q", "assistant": ["A"]}]',
        ),
        (
            '{"texts": [{"user": "Q", "assistant": "A", "sauce": "S"}]}',
            TURNS_FORM + '[{"user": "Q", "assistant": "A", "sauce": "S"}]',
        ),
        (GOOD + '"id": "jsonl/bad/1"}', "the id 'jsonl/bad/1' is that of line 1 too"),
    ],
)
def test_jsonl_names_the_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"texts": [{"user": "Q", "assistant": "A"}]}\n\n'
        + (line if isinstance(line, bytes) else line.encode())
        + b"\nnever read"
    )
    with pytest.raises(UserError, match="^" + re.escape(f"{path}:3: {message}")) as caught:
        jsonl(path)
    assert "\n" not in str(caught.value)


IMAGE, SPLIT_ENTRY = {"id": 1, "file_name": "1.jpg"}, karpathy(1, "train", "train2014", "A cat.")
BOOK, PAIR = book(1, ["Q"], ["A"]), say(ASKED, ANSWERED)


@pytest.mark.parametrize(
    "read, content, message",
    [
        (coco, [], "expected an object with a list 'images'"),
        (coco, {"images": {}}, "expected an object with a list 'images'"),
        (coco, {"images": [IMAGE]}, "images[0]: expected an object with a list 'sentences'"),
        (
            coco,
            {"images": [], "annotations": []},
            "expected captioned images, found none to train on among 0",
        ),
        (coco, {"images": [IMAGE], "annotations": {}}, "expected an object with a list 'annotations'"),
        (
            coco,
            {"images": [IMAGE, IMAGE], "annotations": []},
            "images[1]: an image before it has the id 1 too",
        ),
        (
            coco,
            {"images": [{"id": 1}], "annotations": []},
            "images[0]: expected an object with a text 'file_name'",
        ),
        (
            coco,
            {"images": [IMAGE | {"id": [1]}], "annotations": []},
            "images[0]: expected an object with a number or text 'id'",
        ),
        (
            coco,
            {"images": [IMAGE], "annotations": [{"image_id": 1, "bbox": []}]},
            "annotations[0]: expected an object with 'caption'",
        ),
        (
            coco,
            {"images": [IMAGE], "annotations": [{"image_id": 2, "caption": "A cat."}]},
            "annotations[0]: 'images' has no image with the id 2",
        ),
        (
            coco,
            {"images": [SPLIT_ENTRY | {"split": "trian"}]},
            "images[0]: no split 'trian' (did you mean 'train'?)",
        ),
        (
            coco,
            {"images": [SPLIT_ENTRY | {"split": "val"}]},
            "expected captioned images, found none to train on among 1",
        ),
        (coco, {"images": [SPLIT_ENTRY, SPLIT_ENTRY]}, "images[1]: an image before it has the cocoid 1 too"),
        (
            coco,
            {"images": [SPLIT_ENTRY | {"sentences": [{"tokens": []}]}]},
            "images[0].sentences: expected an object with 'raw'",
        ),
        (ocr_vqa, [], 'expected an object {image id: {"imageURL", "questions", "answers", "split"}}'),
        (ocr_vqa, {}, "expected images with split 1, found none to train on among 0"),
        (ocr_vqa, {"b": BOOK | {"split": 2}}, "expected images with split 1, found none to train on among 1"),
        (ocr_vqa, {"b": BOOK | {"split": "train"}}, "'b': 'split' must be 1, 2 or 3, not \"train\""),
        (ocr_vqa, {"b": BOOK | {"split": [1]}}, "'b': 'split' must be 1, 2 or 3, not [1]"),
        (ocr_vqa, {"b": {"split": 1}}, "'b': expected an object with a text 'imageURL'"),
        (ocr_vqa, {"b": BOOK | {"answers": "A"}}, "'b': expected an object with a list 'answers'"),
        (llava, {"a": 1}, "expected an object with a list 'conversations'"),
        (llava, [], 'expected a list of {"id", "image", "conversations"}, empty found'),
        (llava, ["a"], "[0]: expected an object with a list 'conversations'"),
        (
            llava,
            [{"conversations": [{"role": "user"}]}],
            "[0].conversations: expected an object with 'content'",
        ),
        (
            llava,
            [{"conversations": [{"from": "human", "text": ""}]}],
            "[0].conversations: expected an object with 'value'",
        ),
        (
            llava,
            [{"conversations": PAIR, "image": 3}],
            "[0]: 'image' must be a path or a list of paths, not 3",
        ),
    ],
)
def test_sets_not_of_the_form(tmp_path, read, content, message):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(UserError, match=f"^{path}(:1)?: {re.escape(message)}$"):
        read(path)


@pytest.mark.parametrize(
    "read, content, message",
    [
        (
            coco,
            official("1.jpg"),
            "{0}, {0}/images, {1}, {1}/images and their sub-folders "
            "train2014, val2014, train2017, val2017, Flicker8k_Dataset, flickr30k-images, "
            "1.jpg is in none of them",
        ),
        (
            coco,
            {"images": [SPLIT_ENTRY]},
            "{0}, {0}/images, {1}, {1}/images and their sub-folders "
            "train2014, COCO_train2014_1.jpg is in none of them",
        ),
        (ocr_vqa, {"b": BOOK, "c": BOOK}, "{0}/images, b.jpg is in none of them nor are 1 others"),
        (llava, [{"conversations": PAIR, "image": "x/1.jpg"}], "{0}, {0}/images, x/1.jpg is in none of them"),
    ],
)
def test_missing_images(tmp_path, read, content, message):
    path = write(tmp_path / "set" / "bad.json", content)
    with pytest.raises(
        UserError,
        match="^"
        + re.escape(f"{path}: its images are not there: looked in " + message.format(path.parent, tmp_path))
        + "$",
    ):
        read(path)


@pytest.mark.parametrize("read", [coco, ocr_vqa, llava, jsonl])
def test_files_that_cannot_be_read(tmp_path, read):
    with pytest.raises(
        UserError, match=f"^{tmp_path}/gone.json (does not exist|cannot be read: No such file or directory)$"
    ):
        read(tmp_path / "gone.json")
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(
        UserError,
        match=f"^{tmp_path}/latin.json:? .*"
        "'utf-8' codec can't decode byte 0xe9 in position 2: invalid continuation byte$",
    ):
        read(tmp_path / "latin.json")
    (tmp_path / "empty.json").write_bytes(b"\n\n")
    with pytest.raises(
        UserError,
        match=rf"^{tmp_path}/empty.json(: expected (lines|a list) of {{.*}}, (found none|empty found)"
        r"| is not valid JSON: Expecting value.*)$",
    ):
        read(tmp_path / "empty.json")


def test_folders_given_for_files(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/dataset.json does not exist$"):
        ocr_vqa(tmp_path)
    for read in (coco, llava, jsonl):
        with pytest.raises(UserError, match=f"^{tmp_path} cannot be read: Is a directory$"):
            read(tmp_path)


def test_jsonl_leaves_nulls_for_the_pipeline_to_count(tmp_path):
    lines = [
        '{"image": null, "texts": [{"user": "Q", "assistant": null, "source": "S"}]}',
        '{"images": [null, "a.png"], "texts": [{"user": null, "assistant": "A"}]}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    first, second = jsonl(tmp_path / "x.jsonl")[0]
    assert first["images"] == [None] and first["texts"][0]["assistant"] is None
    assert second["images"] == [None, str(tmp_path / "a.png")] and second["texts"][0]["user"] is None


ASKED = [{"role": "user", "content": "Ä <image>?"}, {"role": "assistant", "content": "B"}]
UTF16 = {"utf-16": "utf-16", "utf-16-le without a mark": "utf-16-le", "utf-8 with a mark": "utf-8-sig"}


@pytest.mark.parametrize("encoding", UTF16)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("form", ["lines", "list"])
def test_files_as_other_programs_write_them(tmp_path, encoding, compressed, form):
    """UTF-16, byte-order marks and gzip; a list where lines are expected, and the reverse."""
    records = [{"image": "a.png", "messages": ASKED}, {"images": [], "messages": CHAT_OF_TEXT}]
    turns = [{"id": "1", "image": "a.png", "conversations": ASKED}]
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for read, entries in ((jsonl, records), (llava, turns)):
        text = json.dumps(entries) if form == "list" else "\n".join(map(json.dumps, entries)) + "\n"
        raw = text.encode(UTF16[encoding])
        path = tmp_path / f"{read.__name__}.json"
        path.write_bytes(gzip.compress(raw) if compressed else raw)
        training, _ = read(path)
        assert [r["messages"] for r in training] == [e.get("messages", ASKED) for e in entries]
        assert training[0]["images"] == [str(tmp_path / "a.png")]
    content = {
        "images": [{"id": 7, "file_name": "a.png"}],
        "annotations": [{"image_id": "7", "caption": "A"}],
    }
    raw = json.dumps(content).encode(UTF16[encoding])
    (tmp_path / "coco.json").write_bytes(gzip.compress(raw) if compressed else raw)
    [record] = coco(tmp_path / "coco.json")[0]  # ids are text in one half, numbers in the other
    assert record["references"] == ["A"]


CHAT_OF_TEXT = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]


def test_inner_keys_of_others(tmp_path):
    """Pairs of question and answer; messages of from and value; conversations of role and content."""
    turns = [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B"}]
    lines = [
        {"texts": [{"question": "A?", "answer": 3}]},
        {"messages": turns},
        {"conversations": turns},
        {"conversations": [turns]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for record in jsonl(tmp_path / "a.jsonl")[0]:
        [messages] = conversations_of(record, "branch")
        assert [m["role"] for m in messages] == ["user", "assistant"] and messages[0]["content"] == "A?"


def test_addresses_are_no_paths(tmp_path):
    """`data:` and `file:` are read; the web is not, and the reason says so."""
    Image.new("RGB", (4, 6)).save(tmp_path / "a b.png")
    data = "data:image/png;base64," + base64.b64encode((tmp_path / "a b.png").read_bytes()).decode()
    addresses = [data, (tmp_path / "a b.png").as_uri(), "a b.png", "https://example.org/a.png"]
    lines = [{"image": address, "messages": ASKED} for address in addresses]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    turns = [{"image": address, "conversations": ASKED} for address in addresses]
    (tmp_path / "llava.json").write_text(json.dumps(turns))
    for records in (jsonl(tmp_path / "a.jsonl")[0], llava(tmp_path / "llava.json")[0]):
        images = [record["images"][0] for record in records]
        assert [open_image(image).size for image in images[:3]] == [(4, 6)] * 3
        with pytest.raises(
            ImageError, match="https://example.org/a.png is on the web: .*img2dataset"
        ) as error:
            open_image(images[3])
        assert error.value.reason == "remote"


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22ea\nsize 9\n"
)


def test_a_git_lfs_pointer_is_named(tmp_path):
    """Instead of data, an image, weights or a tokenizer: a clone without git-lfs has such files."""
    for name in ("a.jsonl", "a.json", "train.parquet", "a.png", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(POINTER)
    for read in (
        lambda: jsonl(tmp_path / "a.jsonl"),
        lambda: llava(tmp_path / "a.json"),
        lambda: coco(tmp_path / "a.json"),
        lambda: open_sources(DataConfig(sources=f"tables={tmp_path}")),
        lambda: open_image(tmp_path / "a.png"),
        lambda: Tokenizer.load(tmp_path),
        lambda: read_safetensors(tmp_path / "model.safetensors"),
    ):
        with pytest.raises(UserError, match=f"^{tmp_path}/.* is a git-lfs pointer.*git lfs pull") as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["", "images/", "Flicker8k_Dataset/"])
def test_karpathys_flickr(tmp_path, folder):
    """dataset_flickr8k.json and dataset_flickr30k.json: no cocoid, no folder."""
    images = [
        {
            "sentids": [0, 1],
            "imgid": n,
            "sentences": [{"raw": f" A {n}. ", "tokens": ["a"]}, {"raw": "B"}],
            "split": split,
            "filename": f"{n}.jpg",
        }
        for n, split in enumerate(("train", "val", "test"))
    ]
    lay(tmp_path, *(f"{folder}{n}.jpg" for n in range(3)))
    training, validation = coco(write(tmp_path / "dataset_flickr8k.json", {"images": images}))
    assert [(r["images"], r["references"]) for r in (*training, *validation)] == [
        ([f"{tmp_path}/{folder}{n}.jpg"], [f"A {n}.", "B"]) for n in range(2)
    ]


def test_cambrian(tmp_path):
    """Cambrian-10M: JSON lines of LLaVA's form, with and without images, with keys of its own."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]
    alone = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}]
    lines = [
        {"id": "1", "image": "coco/1.jpg", "conversations": turns, "source": "sa.json"},
        {"conversations": alone, "source": "lima.json", "type": "text"},
    ]
    lay(tmp_path, "coco/1.jpg")
    (tmp_path / "Cambrian10M.jsonl").write_text("\n".join(map(json.dumps, lines)))
    training, _ = llava(tmp_path / "Cambrian10M.jsonl")
    assert [r["images"] for r in training] == [[f"{tmp_path}/coco/1.jpg"], []]
    assert [r["messages"][0]["content"] for r in training] == ["<image>\nWhat?", "What?"]


def mmc4_page(**matched: int) -> dict:
    return {
        "text_list": ["One.", "Two.", "Three."],
        "url": "http://x",
        "image_info": [
            {
                "image_name": f"{name}.jpg",
                "raw_url": "http://x",
                "matched_text_index": index,
                "matched_sim": 0.3,
            }
            for name, index in matched.items()
        ],
        "similarity_matrix": [[0.1, 0.2, 0.3]],
    }


def test_mmc4(tmp_path, renderer):
    """Images stand before the sentences that they match; those that are not there are left out."""
    for name in "abc":
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(tmp_path / "images" / f"{name}.jpg")
    pages = [mmc4_page(a=2, b=0, c=2), mmc4_page(gone=1), mmc4_page(a=1, gone=0)]
    (tmp_path / "docs_shard_0.jsonl").write_text("\n".join(map(json.dumps, pages)))
    with gzip.open(tmp_path / "docs_shard_1.jsonl.gz", "wt") as file:
        file.write(json.dumps(mmc4_page(b=2)))
    training, validation = mmc4(tmp_path)
    shown = [
        "".join("[image]" if part["type"] == "image" else part["text"] for part in r["interleaved"])
        for r in training
    ]
    assert validation is None and shown == [
        "[image]One. Two. [image][image]Three. ",
        "One. Two. Three. ",
        "One. [image]Two. Three. ",
        "One. Two. [image]Three. ",
    ]
    assert [[Path(i).stem for i in r["images"]] for r in training] == [["b", "a", "c"], [], ["a"], ["b"]]
    dataset = dataset_of(training, renderer)
    [sample] = dataset.samples(0, 0, True)
    assert renderer.preview(sample.documents[0]).count("[4 image tokens]") == 3
    assert mmc4(tmp_path / "docs_shard_0.jsonl")[0] == training[:3]
    for name in "abc":
        (tmp_path / "images" / f"{name}.jpg").unlink()
    with pytest.raises(UserError, match=f"its images are not there: none of 7 is in {tmp_path}/images"):
        mmc4(tmp_path)
