"""The page of `tools.evaluation_report`.

The page is parsed by html.parser and compared with orders, counts and marks written by hand.
"""

import base64
import io
import json
import math
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import utils.files
from tools import evaluation_report as report
from tools import pages
from utils.errors import UsageError, UserError
from utils.files import file_name

ROOT = Path(__file__).parent.parent
HOSTILE = '<script>alert(1)</script> "it\'s" &amp; </b></style> <img src=x onerror=alert(2)> ${x} <!-- -->'
VOID = {"meta", "br", "img", "rect", "path"}


class Reader(HTMLParser):
    """Parse a page; fail if its tags are not closed in order.

    Collects sections, their cards (title, fields, images, placeholders), table rows and all tags.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.cards: list[dict] = []
        self.counts: list[list[str]] = []  # texts of each histogram
        self.headings: list[str] = []
        self.text = ""
        self.field = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")
        elif tag == "article":
            self.cards.append({"title": "", "images": [], "missing": [], "fields": {}, "colour": set()})
        elif tag == "svg":
            self.counts.append([])
        elif tag == "dt":
            self.field = ""
        elif tag == "div" and "answer" in attrs.get("class", "").split():
            self.cards[-1]["colour"] = set(attrs["class"].split()) & {"good", "bad"}
        elif tag == "img":
            self.cards[-1]["images"].append(attrs["src"])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and "head" not in self.open:
            self.text += data
        for tag, texts in (("tr", self.rows), ("svg", self.counts)):
            if tag == "tr" and {"td", "th"} & set(self.open):
                texts[-1][-1] += data
            elif tag == "svg" and "svg" in self.open:
                texts[-1].append(data)
        if {"h1", "h2", "h3"} & set(self.open):
            self.headings[-1] += data
        if "article" in self.open:
            card = self.cards[-1]
            if "h4" in self.open:
                card["title"] += data
            elif "span" in self.open:
                card["missing"].append(data)
            elif "dt" in self.open:
                self.field += data
            elif "dd" in self.open:
                name = self.field.split()[0]
                card["fields"][name] = card["fields"].get(name, "") + data

    @property
    def order(self) -> list[str]:
        return [card["title"].split("sample ")[1] for card in self.cards]


def sample(number, scores=None, **parts):
    return {
        "id": number,
        "images": [],
        "prompt": f"question {number}",
        "reference": "yes",
        "answer": f"answer {number}",
        "scores": {} if scores is None else scores,
    } | parts


def task(**parts):
    return {
        "scores": {"accuracy": 0.5},
        "standard_errors": {},
        "random_baseline": None,
        "higher_is_better": {},
        "samples": 2,
        "truncated": 0,
        "first_prompt": "<|im_start|>user\n",
    } | parts


def write(folder: Path, tasks: dict, samples: dict, **parts) -> Path:
    folder.mkdir(exist_ok=True)
    head = {
        "format": 2,
        "model": "runs/x/model",
        "settings": {"batch_size": 32},
        "versions": {"torch": "2.15.0"},
        "tasks": tasks,
    }
    (folder / "results.json").write_text(json.dumps(head | parts))
    for name, lines in samples.items():
        (folder / f"samples_{file_name(name)}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    return folder


def read(folder: Path, *flags: str) -> Reader:
    report.main([str(folder), *flags])
    return Reader((folder / "report.html").read_text(encoding="utf-8"))


def of(folder: Path, lines: list[dict], *flags: str, **parts) -> Reader:
    return read(write(folder, {"quiz": task(**parts)}, {"quiz": lines}), *flags)


def jpeg(colour) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "jpeg")
    return file.getvalue()


def test_head_table_and_warnings(tmp_path):
    scores = {
        "average": 0.31,
        "near": 0.27,
        "worse": 0.1,
        "wer": 0.9,
        "wer2": 0.2,
        "plain": 12.5,
        "odd": math.nan,
    }
    facts = task(
        scores=scores,
        standard_errors={"average": 0.028, "near": 0.0151, "worse": 0.01, "wer": 0.01, "odd": 0.6},
        random_baseline={"average": 0.24, "near": 0.24, "worse": 0.24, "wer": 0.5, "wer2": 0.5, "odd": 0.2},
        higher_is_better={"average": True, "wer": False, "wer2": False},
        warnings=["CIDEr of 12 images: <few>"],
    )
    folder = write(tmp_path, {"quiz": facts}, {"quiz": []}, settings={"dtype": "fp32", "limit": 0})
    os.utime(folder / "results.json", (1_700_000_000, 1_700_000_000))
    page = read(folder)
    rows = [[" ".join(cell.split()) for cell in row] for row in page.rows]
    assert rows == [
        ["metric", "score", "standard error", "random weights"],
        ["quiz 2 samples"],
        ["average", "0.3100", "± 0.0280", "0.2400"],  # 2.5 standard errors above
        ["near within two standard errors of random weights", "0.2700", "± 0.0151", "0.2400"],
        ["worse no better than random weights", "0.1000", "± 0.0100", "0.2400"],  # 14 below
        ["wer lower is better no better than random weights", "0.9000", "± 0.0100", "0.5000"],
        ["wer2 lower is better", "0.2000", "–", "0.5000"],
        ["plain", "12.50", "–", "–"],
        ["odd", "NaN", "± 0.6000", "0.2000"],
    ]
    assert (
        page.headings[:2] == ["runs/x/model", "Warnings"] and "quiz: CIDEr of 12 images: <few>" in page.text
    )
    assert (
        "2023-11-1" in page.text
        and "torch 2.15.0" in page.text
        and "dtype fp32, limit 0" in page.text
        and "<|im_start|>user\n" in page.text
    )


def test_worst_first_and_ties_in_the_order_of_the_file(tmp_path):
    scores = {"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.0, "e": math.nan, "f": 1.0, "g": None, "h": -2, "i": True}
    page = of(tmp_path, [sample(name, {"accuracy": score}) for name, score in scores.items()])
    assert page.order == ["h", "b", "d", "c", "a", "f", "i", "e", "g"]
    assert [card["title"].split()[0] for card in page.cards] == [str(i) for i in range(1, 10)]
    assert "2 without a score" in page.headings[-1] and page.cards[7]["fields"]["scores"] == "accuracy NaN"


def test_the_key_is_the_mean_and_errors_count_downwards(tmp_path):
    """Sort keys by hand.

    a (1 − 0.9)/2 = 0.05, b (0.2 − 0)/2 = 0.1, c (0.5 − 3)/2 = −1.25, d 0 (one score is not a number).
    """
    pairs = {"a": (1, 0.9), "b": (0.2, 0), "c": (0.5, 3), "d": (0, math.nan)}
    page = of(
        tmp_path,
        [sample(name, {"accuracy": up, "wer": down}) for name, (up, down) in pairs.items()],
        higher_is_better={"accuracy": True, "wer": False},
    )
    assert page.order == ["c", "d", "a", "b"]


def test_names_as_evaluation_writes_them(tmp_path):
    """Names of groups, metrics and files follow evaluation.py.

    A group's metrics are `task: metric` in results.json and `metric` in its samples. The name of a task's
    file has only letters, digits, _ and -.
    """
    better = {"a: wer": False, "b: acc": True}
    folder = write(
        tmp_path,
        {"x/y.z": task(higher_is_better=better, scores={"a: wer": 0.5, "b: acc": 1})},
        {"x/y.z": [sample("best", {"wer": 0.1}), sample("worst", {"wer": 0.9})]},
    )
    page = read(folder)
    assert (
        page.order == ["worst", "best"]
        and [row[0].split(" lower")[0] for row in page.rows[2:]] == ["a: wer", "b: acc "]
        and page.text.count("lower is better") == 1
    )


def test_limit_shows_the_worst_then_a_dozen_of_the_best(tmp_path):
    samples = [sample(i, {"accuracy": (i * 37 % 100) / 100}) for i in range(100)] + [sample("none")]
    by_score = sorted(range(100), key=lambda i: i * 37 % 100)
    page = of(tmp_path, samples, "--limit", "20", samples=101)
    assert page.order == [str(i) for i in by_score[:20] + by_score[:-13:-1]]
    assert [card["title"].split()[0] for card in page.cards[20:]] == [str(i) for i in range(100, 88, -1)]
    assert (
        "20 of 101, 69 left out (--limit 0 shows all), 1 without a score (last), the 12 best at the end"
        in " ".join(page.headings)
    )
    few = of(tmp_path, samples, "--limit", "95", samples=101)  # the best of those left out: none twice
    assert few.order == [str(i) for i in by_score[:95] + by_score[:94:-1]]
    assert (
        of(tmp_path, samples, "--limit", "0").order
        == [str(i) for i in by_score] + ["none"]
        == of(tmp_path, samples).order
    )
    tied = of(tmp_path, [sample(i, {"accuracy": 1.0}) for i in range(9)], "--limit", "2")
    assert tied.order == list("018765432")


@pytest.mark.parametrize(
    ("scores", "colour"),
    [
        ({"accuracy": 1.0}, {"good"}),
        ({"accuracy": 0}, {"bad"}),
        ({"accuracy": 0.5}, set()),
        ({"accuracy": 1, "wer": 0.0}, {"good"}),
        ({"accuracy": 0.0, "wer": 1.0}, {"bad"}),
        ({"accuracy": 1.0, "wer": 1.0}, set()),
        ({"percent": 100}, {"good"}),
        ({"percent": 1}, set()),
        ({"percent": 0}, {"bad"}),
        ({"accuracy": 1.0, "percent": math.nan}, set()),
        ({"accuracy": None}, set()),
        ({"accuracy": 1.0, "category": "maths"}, {"good"}),
        ({}, set()),
    ],
)
def test_colours_say_full_marks_and_none(tmp_path, scores, colour):
    others = [sample(1, {"percent": 30.0}), sample(2, {"accuracy": 0.5})]
    page = of(tmp_path, [*others, sample("it", scores)], higher_is_better={"wer": False, "percent": True})
    assert page.cards[page.order.index("it")]["colour"] == colour
    assert page.text.count("(full marks)") == (colour == {"good"}) and page.text.count("(no marks)") == (
        colour == {"bad"}
    )


def test_hostile_text_is_no_markup(tmp_path):
    hostile = sample(
        HOSTILE,
        {HOSTILE: 1.0, "x": HOSTILE},
        prompt=HOSTILE,
        reference=[HOSTILE, "b"],
        answer=HOSTILE,
        images=[HOSTILE],
    )
    facts = task(
        scores={HOSTILE: HOSTILE},
        random_baseline={HOSTILE: HOSTILE},
        first_prompt=HOSTILE,
        task_hash=HOSTILE,
        truncated=HOSTILE,
        samples=HOSTILE,
        seconds=HOSTILE,
        warnings=[HOSTILE],
    )
    page = read(
        write(
            tmp_path,
            {HOSTILE: facts},
            {HOSTILE: [hostile]},
            model=HOSTILE,
            settings={HOSTILE: HOSTILE},
            versions={HOSTILE: [HOSTILE]},
        )
    )
    ours = (
        "html head meta title style body header section h1 h2 h3 h4 p dl dt dd div span small b em a ul li "
        "table thead tr th td article details summary figure figcaption svg rect path text"
    )
    assert {tag for tag, _ in page.tags} <= set(ours.split())
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    assert {attrs["href"].startswith("#") for tag, attrs in page.tags if tag == "a"} == {True}
    (card,) = page.cards
    assert (
        card["fields"]["prompt"] == card["fields"]["answer"] == HOSTILE
        and card["fields"]["reference"] == HOSTILE + "b"
        and page.headings[0] == HOSTILE
    )
    assert card["missing"] == [f"missing image: {HOSTILE}"]
    policy = next(
        attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_unprintable_letters_are_visible_and_lines_remain(tmp_path):
    answers = {
        "a\n\n b\tc\n": "a\n\n b\tc\n",
        "\u202eabc\x00\x1b[1m\r": "\\u202eabc\\u0000\\u001b[1m\\u000d",
        "صورة قطة": "صورة قطة",
        "\ud800 é 漢\u3000字": "\\ud800 é 漢\u3000字",
    }
    answers |= {"": "(empty)", " \n": "(nothing but white space)"}
    page = of(tmp_path, [sample(i, answer=answer) for i, answer in enumerate(answers)])
    assert [card["fields"]["answer"] for card in page.cards] == list(answers.values())
    assert (
        all(
            attrs["dir"] == "auto"
            for tag, attrs in page.tags
            if attrs.get("class", "").strip() == "text answer"
        )
        and "white-space: pre-wrap" in (pages.TEMPLATES / "evaluation_report.css").read_text()
    )


def test_a_long_text_is_truncated_with_a_note(tmp_path):
    page = of(tmp_path, [sample(1, answer="ab" * 50_000, prompt="p" * report.LONGEST)])
    answer = page.cards[0]["fields"]["answer"]
    assert (
        answer.startswith("ab" * (report.LONGEST // 2) + "cut here")
        and "all 100,000 characters" in answer
        and "samples_quiz.jsonl" in answer
    )
    assert page.cards[0]["fields"]["prompt"] == "p" * report.LONGEST


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("x", "x"),
        (["a", "b"], "ab"),
        ([], "(empty)"),
        (None, "(empty)"),
        (3, "3"),
        (0, "0"),
        ({"k": [1]}, '{"k": [1]}'),
    ],
)
def test_references_of_any_kind(tmp_path, reference, expected):
    assert of(tmp_path, [sample(1, reference=reference)]).cards[0]["fields"]["reference"] == expected


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    anything=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(st.characters(exclude_categories=())),
        lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    )
)
def test_whatever_a_sample_holds_makes_a_page(tmp_path, anything):
    scores = anything if isinstance(anything, dict) else {"accuracy": anything}
    page = of(
        tmp_path,
        [sample(anything, scores, prompt=anything, reference=anything, answer=anything, images=[anything])],
        scores=scores,
        truncated=anything,
        first_prompt=anything,
    )
    assert len(page.cards) == 1
    if isinstance(anything, str) and anything.isprintable() and anything.strip():
        assert page.cards[0]["fields"]["answer"] == anything


def test_images_are_the_files_byte_for_byte(tmp_path):
    (tmp_path / "images").mkdir()
    files = {f"images/{i}.jpg": jpeg((40 * i, 9, 200)) for i in range(3)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    page = of(
        tmp_path,
        [
            sample("none"),
            sample("two", images=["images/2.jpg", "images/0.jpg"]),
            sample("gone", images=["images/9.jpg", "images/1.jpg"]),
        ],
    )
    none, two, incomplete = page.cards
    assert (
        not none["images"]
        and none["missing"] == ["no image"]
        and incomplete["missing"] == ["missing image: images/9.jpg"]
    )
    for card, names in ((two, ["images/2.jpg", "images/0.jpg"]), (incomplete, ["images/1.jpg"])):
        assert [source.partition(",")[0] for source in card["images"]] == ["data:image/jpeg;base64"] * len(
            names
        )
        assert [base64.b64decode(source.partition(",")[2], validate=True) for source in card["images"]] == [
            files[name] for name in names
        ]


def test_no_image_path_leads_out_of_the_folder(tmp_path):
    folder, outside = tmp_path / "in", tmp_path / "out"
    for path in (folder / "images", outside):
        path.mkdir(parents=True)
    (outside / "secret.jpg").write_bytes(jpeg((1, 2, 3)))
    (folder / "real.jpg").write_bytes(jpeg((4, 5, 6)))
    (folder / "images/link.jpg").symlink_to(outside / "secret.jpg")
    (folder / "images/folder").symlink_to(outside)
    (folder / "images/circle.jpg").symlink_to(folder / "images/circle.jpg")
    (folder / "images/fine.jpg").symlink_to("../real.jpg")
    (folder / "text.jpg").write_text("<svg onload=alert(1)>")
    os.mkfifo(folder / "pipe.jpg")
    wrong = [
        "../out/secret.jpg",
        str(outside / "secret.jpg"),
        str(folder / "real.jpg"),
        "../in/real.jpg",
        "images/link.jpg",
        "images/folder/secret.jpg",
        "images/circle.jpg",
    ]
    wrong += ["images", "", "x\0y.jpg", "n" * 5000, "pipe.jpg", 3, None, "results.json", "text.jpg"]
    page = of(folder, [sample(1, images=[*wrong, "images/fine.jpg"])])
    assert (
        len(page.cards[0]["missing"]) == len(wrong)
        and sum("not an image" in m for m in page.cards[0]["missing"]) == 2
    )
    assert [base64.b64decode(source.partition(",")[2]) for source in page.cards[0]["images"]] == [
        (folder / "real.jpg").read_bytes()
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0, 1, 0.5, 0.99, math.nan], ["2", "1", "2", "0", "1"]),
        ([0.3, 0.6, 0.7, 0.9], ["1", "1", "1", "1", "0", "1"]),  # each in a bar of its own
        ([5, 5, 5], ["3", "5", "5"]),
        ([-1, 9], ["1", "1", "-1", "9"]),
        ([1e299, -1e299], ["1", "1", "-1e+299", "1e+299"]),
        ([10**400, math.inf], None),
    ],
)
def test_histogram_counts(tmp_path, values, expected):
    page = of(tmp_path, [sample(i, {"accuracy": v}) for i, v in enumerate(values)])
    assert page.counts == ([expected] if expected else [])


def test_bars_are_as_tall_as_their_counts(tmp_path):
    page = of(tmp_path, [sample(i, {"accuracy": v}) for i, v in enumerate([0] * 8 + [0.55] * 4 + [1.0])])
    bars = [
        (float(attrs["x"]), float(attrs["height"]), float(attrs["y"]))
        for tag, attrs in page.tags
        if tag == "rect"
    ]
    assert [(round((x - 1) / 22), height / bars[0][1]) for x, height, _ in bars] == [
        (0, 1.0),
        (5, 0.5),
        (9, 0.125),
    ] and {height + y for _, height, y in bars} == {70}


def test_a_task_without_samples_or_with_too_few(tmp_path):
    tasks = {"gone": task(), "empty": task(samples=0), "few": task(samples=3), "a/b": task()}
    page = read(write(tmp_path, tasks, {"empty": [], "few": [sample(1, {"accuracy": 1})]}))
    assert (
        "There is no samples_gone.jsonl in this folder" in page.text
        and "There is no samples_a_b-" in page.text
    )
    assert (
        "0 of 0" in page.text
        and "results.json counts 3 samples, samples_few.jsonl holds 1" in page.text
        and page.text.count("two runs") == 1
    )
    assert read(write(tmp_path, {}, {})).cards == []
    assert of(tmp_path, [sample(1)] * 2).cards  # what may be missing, is
    (tmp_path / "results.json").write_text('{"format": 2, "tasks": {"quiz": {}}}')
    (tmp_path / "samples_quiz.jsonl").write_text(
        '\n{"id": 1}\n\n{"answer": "b", "images": null, "scores": null}'
    )
    assert [card["fields"]["answer"] for card in read(tmp_path).cards] == ["(empty)", "b"]


def fails(argv: list, kind: type, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        report.main([str(a) for a in argv])
    assert type(error.value) is kind and all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["not valid JSON"]),
        ("[" * 100_000, ["not valid JSON"]),
        ("[]", ["evaluate again"]),
        ('{"tasks": {}}', ["older version", "evaluate again"]),
        ('{"format": 3}', ["made by a newer version", "3"]),
        ('{"format": "x"}', ["x", "evaluate again"]),
        ('{"format": 2, "tasks": []}', []),
        ('{"format": 2, "tasks": [1]}', ["'tasks' is not an object"]),
        ('{"format": 2, "tasks": {"quiz": 3}}', ["quiz", "not an object"]),
        (
            '{"format": 2, "tasks": {"quiz": {"random_baseline": 0.2}}}',
            ["quiz", "'random_baseline' is not an object"],
        ),
        ('{"format": 2, "tasks": {"quiz": {"warnings": "x"}}}', ["quiz", "'warnings' is not a list"]),
    ],
)
def test_damaged_results(tmp_path, text, parts):
    (tmp_path / "results.json").write_text(text)
    if not parts:
        assert read(tmp_path).cards == []
        return
    fails([tmp_path], UserError, "results.json", *parts)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1]",
        b"NULL",
        b'{"answer": "\xff"}',
        b'{"scores": [1]}',
        b'{"images": "a.jpg"}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    write(tmp_path, {"quiz": task()}, {})
    (tmp_path / "samples_quiz.jsonl").write_bytes(
        b'{"id": "line\xe2\x80\xa8separator"}\n\n' + line + b"\n{}\n"
    )
    fails([tmp_path], UserError, "samples_quiz.jsonl, line 3", "delete that line, or evaluate again")


def test_wrong_command_lines(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    good = write(tmp_path / "good", {"quiz": task()}, {"quiz": []})
    fails([tmp_path / "nowhere"], UsageError, "nowhere is no folder")
    fails([empty], UsageError, "holds no results.json", "evaluation.py --output")
    fails([good / "results.json"], UsageError, "is no folder")
    fails([], UsageError, "--help")
    fails([good, "--limt", "3"], UsageError, "--limit")
    fails([good, "--limit", "-1"], UsageError, "--limit")
    fails([good, "--limit", "x"], UsageError, "--limit")
    before = (good / "results.json").read_bytes()
    os.mkfifo(empty / "pipe")
    for output in (
        ".",
        "",
        "nowhere/x.html",
        empty / "pipe",
        good,
        good / "results.json",
        good / "samples_quiz.jsonl",
        good / "results.json" / "x.html",
    ):
        fails([good, "--output", output], UsageError, "--output")
    assert (good / "results.json").read_bytes() == before
    report.main([str(good), "--output", str(empty / "page.html")])
    assert {p.name for p in empty.iterdir()} == {"page.html", "pipe"} and not (good / "report.html").exists()


def test_an_old_report_stays_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    write(tmp_path, {"quiz": task()}, {"quiz": []})
    (tmp_path / "report.html").write_text("old")
    before = sorted(tmp_path.iterdir())

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.files, "sync", full)
    fails([tmp_path], UserError, "report.html could not be written: No space left on device")
    assert (tmp_path / "report.html").read_text() == "old" and sorted(tmp_path.iterdir()) == before


def test_the_program_itself(tmp_path):
    """Exit codes, one line each; and it needs neither torch nor what evaluates."""
    write(tmp_path, {"quiz": task()}, {"quiz": [sample(1, {"accuracy": 1.0}, answer="é")]})

    def run(*argv):
        return subprocess.run(
            [sys.executable, "-m", "tools.evaluation_report", *map(str, argv)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )

    done = run(tmp_path)
    assert (
        done.returncode == 0
        and done.stdout.startswith(f"{tmp_path}/report.html: tasks 1, samples 1")
        and not done.stderr
    )
    (tmp_path / "samples_quiz.jsonl").write_text("{}\nnonsense\n")
    for argv, code, part in (((tmp_path,), 1, "line 2"), ((tmp_path / "nowhere",), 2, "no folder")):
        done = run(*argv)
        assert (
            done.returncode == code
            and done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
            and part in done.stderr
            and not done.stdout
        )
    heavy = (
        "import sys, tools.evaluation_report; "
        "print(sorted({'torch', 'datasets', 'lmms_eval', 'transformers'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", heavy], cwd=ROOT, capture_output=True, text=True, timeout=60
        ).stdout
        == "[]\n"
    )
