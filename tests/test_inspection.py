"""The page of `tools.preview` and the figures of `tools.stats`, against a parser and a recount by hand."""

import json
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image
from rich.console import Console

from configs.train import Config, DataConfig
from data.datasets import Sample
from data.parquet import UnreadableBlock
from data.render import IGNORE, Document, Renderer
from data.tokenizer import CHAT_TOKENS
from tests.conftest import TINY_MODEL, chat
from tools import preview, stats
from tools.inspection import arguments
from training.setup import Data, build_data
from utils.errors import UsageError, UserError

TURN_START, TURN_END = CHAT_TOKENS

ROOT = Path(__file__).parent.parent
HOSTILE = '<script>alert(1)</script> "it\'s" &amp; </b><|im_end|>\u202e <img src=x onerror=alert(2)>'


class Reader(HTMLParser):
    """Tokens of a page: (classes, text, title), in their order; every tag; widths of the bars' segments."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tokens: list[tuple[set, str, str]] = []
        self.tags: list[tuple[str, dict]] = []
        self.inside = self.legend = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "p":
            self.legend = attrs.get("class") == "legend"
        if tag == "b" and not self.legend:
            self.inside = True
            self.tokens.append((set(attrs["class"].split()), "", attrs["title"]))

    def handle_endtag(self, tag):
        if tag == "b":
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            classes, text, title = self.tokens[-1]
            self.tokens[-1] = classes, text + data, title


def width(attrs: dict) -> float:
    return float(attrs["style"].split("width:")[1].split("%")[0])


def process_group(
    folder: Path, records: list[dict], vision=TINY_MODEL.vision, left_context: str = "image", **options
) -> tuple[Config, Data]:
    """Records as a JSONL source. Two records more are held out for validation."""
    held_out = [
        {"images": [], "texts": [{"user": "q", "assistant": "a"}], "id": f"held out {i}"} for i in range(2)
    ]
    name = f"{len(list(folder.glob('*.jsonl')))}.jsonl"
    (folder / name).write_text(
        "".join(json.dumps({"id": f"r{i}"} | r) + "\n" for i, r in enumerate(held_out + records))
    )
    options = {
        "left_length": 60,
        "right_length": 400,
        "window": 8,
        "vocab_size": 300,
        "validation_images": 2,
    } | options
    decoder = replace(TINY_MODEL.right, max_positions=4096)
    config = Config(
        model=replace(TINY_MODEL, vision=vision, left_context=left_context, left=decoder, right=decoder),
        data=DataConfig(sources=f"jsonl={folder / name}", **options),
    )
    data = build_data(config, folder / f"tokenizer {name}")
    data.training.sources[0].records.records[:] = held_out + [
        {**r, "id": r.get("id", f"r{i}"), "images": r["images"]}
        for i, r in enumerate(_absolute(folder, records))
    ]
    return config, data  # in the order of the file: the shuffle put others in front


def _absolute(folder: Path, records: list[dict]) -> list[dict]:
    return [r | {"images": [str(folder / image) for image in r["images"]]} for r in records]


def picture(folder: Path, name: str, size: tuple[int, int]) -> str:
    Image.new("RGB", size, (200, 40, 40)).save(folder / name)
    return name


def page_of(config: Config, data: Data, samples: int = 1, rows: int = 1) -> tuple[str, list, list]:
    chosen, packed, drawn = preview.draw(data, samples, rows)
    return preview.page(config, data, chosen, packed, drawn), chosen, packed


def readable(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "↵")


@pytest.mark.parametrize("left_context", ["image", "none"])
def test_page_holds_every_token_once_in_order(tmp_path, left_context):
    """The text of the boxes, joined, is the conversation.

    Only the answers and their end-of-turn tokens are green.
    """
    record = {
        "images": [picture(tmp_path, "a.png", (60, 60))],
        "texts": [
            {"user": "what  is it?\nsay", "assistant": "a Zoë 漢"},
            {"user": "sure?", "assistant": "yes"},
        ],
    }
    config, data = process_group(tmp_path, [record], left_context=left_context, turns="chain", left_length=60)
    text, (sample,), _ = page_of(config, data)
    tokens = Reader(text).tokens
    assert len(tokens) == sample.left_length + sample.right_length + 1  # the last is a target only
    text_tokens = [
        (classes, spelt, title)
        for classes, spelt, title in tokens
        if "image" not in classes and spelt != "<|global_image|>"
    ]
    joined = unbyte([(spelt, title) for _, spelt, title in text_tokens])
    turn = readable(
        f"{TURN_START}user\nwhat  is it?\nsay{TURN_END}\n{TURN_START}assistant\na Zoë 漢{TURN_END}\n"
        f"{TURN_START}user\nsure?{TURN_END}\n{TURN_START}assistant\nyes{TURN_END}"
    )
    assert joined == turn
    supervised = [(spelt, title) for classes, spelt, title in tokens if "supervised" in classes]
    assert unbyte(supervised) == readable(f"a Zoë 漢{TURN_END}yes{TURN_END}")
    assert sum("image" in classes for classes, _, _ in tokens) == 4
    positions = [int(title.split()[1]) for _, _, title in tokens]
    assert sorted(positions) == list(range(len(tokens)))
    assert ("left stream" in text_tokens[0][2], "are in the left stream</i>" in text) == (
        (False, True) if left_context == "image" else (False, False)
    )


def unbyte(tokens: list[tuple[str, str]]) -> str:
    """Texts put together; tokens that are bytes of a letter are decoded."""
    out = b""
    for spelt, title in tokens:
        out += bytes.fromhex(spelt) if "bytes of" in title else spelt.encode()
    return out.decode()


def test_supervised_tokens_are_the_targets(tmp_path, tokenizer):
    document = Renderer(tokenizer, 4).conversation(
        chat([{"user": "what is it?", "assistant": "blue"}], 1), [(1, 1)]
    )
    tokens = preview.right_tokens(document, preview.Spelling(tokenizer))
    assert (
        [t.id for t in tokens if t.kind == "supervised"]
        == [label for label in document.labels if label != IGNORE]
        == [*tokenizer.encode("blue"), tokenizer.turn_end]
    )
    assert tokens[-1].position == document.length and tokens[-1].note.endswith("never read")


def test_hostile_text_is_no_markup(tmp_path):
    records = [
        {"images": [], "texts": [{"user": HOSTILE, "assistant": HOSTILE}], "id": HOSTILE, "references": []}
    ]
    config, data = process_group(tmp_path, records)
    text, _, _ = page_of(replace(config, config=HOSTILE), data)
    reader = Reader(text)
    ours = (
        "html head meta title style body header h1 h2 h3 h4 p dl dt dd span b i br "
        "article section details summary small div ol li"
    )
    assert {tag for tag, _ in reader.tags} <= {*ours.split()}
    assert not any(
        name.startswith("on") or name in ("src", "href") for _, attrs in reader.tags for name in attrs
    )
    assert [spelt for classes, spelt, _ in reader.tokens if "special" in classes] == [
        TURN_START,
        TURN_END,
        TURN_START,
        TURN_END,
    ]  # those in the text are text
    assert (
        "\u202e" not in text and text.count(str(escape(HOSTILE.replace("\u202e", "\\u202e")))) == 3
    )  # in title, headline and id
    assert "http" not in text.replace("http-equiv", "")


def test_a_token_that_is_markup_is_escaped():
    """Pretrained vocabularies have whole tags as tokens."""
    tokens = [
        preview.Token(7, text, i, "right", False, note='"><img src=x>')
        for i, text in enumerate(("<script>", "</b>", '"&'))
    ]
    written = preview.boxes(tokens, 0)
    assert [text for _, text, _ in Reader(written).tokens] == ["<script>", "</b>", '"&'] and {
        tag for tag, _ in Reader(written).tags
    } == {"b"}


def test_long_documents_are_folded_and_whole(tmp_path):
    config, data = process_group(
        tmp_path,
        [
            {
                "images": [picture(tmp_path, "a.png", (60, 60))],
                "texts": [{"user": "why? " * 150, "assistant": "so"}]
                + [{"user": f"n{i}", "assistant": "x"} for i in range(9)],
            }
        ],
        right_length=3000,
    )
    text, (sample,), _ = page_of(config, data)
    assert (
        len(Reader(text).tokens) == sample.left_length + sample.right_length + len(sample.documents)
        and "more tokens, 3 of them supervised" in text
        and "6 more documents" in text
    )


def test_tiles_stand_in_their_grid(tmp_path):
    vision = replace(TINY_MODEL.vision, max_side=256)
    config, data = process_group(
        tmp_path,
        [{"images": [picture(tmp_path, "wide.png", (192, 100))], "texts": [{"user": "q", "assistant": "a"}]}],
        vision=vision,
    )
    text, _, _ = page_of(config, data)
    captions = [part.split("<")[0] for part in text.split("<figcaption>")[1:]]
    assert captions == ["&lt;|global_image|&gt;"] + [
        f"&lt;row_{r}_col_{c}&gt;" for r in (1, 2) for c in (1, 2, 3)
    ]
    assert "repeat(3," in text and text.count("data:image/") == 7


def test_bars_are_to_scale_and_fills_are_right(tmp_path):
    images = [picture(tmp_path, "a.png", (60, 60))]
    records = [
        {"images": images * (1 + i % 2), "texts": [{"user": "word " * (1 + i), "assistant": "yes"}]}
        for i in range(6)
    ]
    config, data = process_group(tmp_path, records, left_length=20, right_length=120)
    text, _, rows = page_of(config, data, rows=3)
    bars = [
        (tag, attrs)
        for tag, attrs in Reader(text).tags
        if (tag == "div" and attrs.get("class") == "bar")
        or (tag == "span" and "width:" in attrs.get("style", ""))
    ]
    expected = []
    for row in rows:
        for track, size, lengths in (
            (20 / 120, 20, [s.left_length for s in row]),
            (1, 120, [s.right_length for s in row]),
        ):
            expected += [100 * track, *[100 * n / size for n in lengths]]
        left, right = (
            sum(len(x) for x in streams)
            for streams in (
                [s.documents[0].left_ids for s in row],
                [d.right_ids for s in row for d in s.documents],
            )
        )
        assert (
            f"left {left} of 20 ({left / 0.2:.1f} %), right {right} of 120 ({right / 1.2:.1f} %), "
            f"both {(left + right) / 1.4:.1f} %" in text
        )
    assert [width(attrs) for _, attrs in bars] == pytest.approx(expected, abs=1e-3)
    assert any(len(row) > 1 for row in rows)


def test_damaged_images_are_left_out_and_counted(tmp_path):
    whole = picture(tmp_path, "whole.png", (60, 60))
    (tmp_path / "cut.png").write_bytes((tmp_path / whole).read_bytes()[:60])
    texts = [{"user": "q", "assistant": "a"}]
    config, data = process_group(
        tmp_path, [{"images": [name], "texts": texts} for name in (whole, "cut.png", whole)]
    )
    text, chosen, rows = page_of(config, data, samples=9)
    assert (
        [s.key[1] for s in sorted(chosen, key=lambda s: s.key)] == [2, 4]
        and not any(s.key[1] == 3 for row in rows for s in row)
        and "image_damaged 1" in text
    )
    config, data = process_group(tmp_path, [{"images": ["cut.png"], "texts": texts}])
    with pytest.raises(UserError, match="none of the images can be decoded"):
        preview.draw(data, 1, 1)


def test_a_page_of_rows_that_cannot_be_read_any_more(tmp_path, monkeypatch):
    config, data = process_group(
        tmp_path,
        [{"images": [picture(tmp_path, "a.png", (60, 60))], "texts": [{"user": "q", "assistant": "a"}]}],
    )
    chosen, packed, drawn = preview.draw(data, 1, 1)

    def failing(*_):
        raise UnreadableBlock("gone for now")

    monkeypatch.setattr(type(data.training.sources[0].records), "__getitem__", failing)
    assert "record 2 ·" in preview.page(config, data, chosen, packed, drawn)


def test_stats_equal_a_recount(tmp_path, monkeypatch):
    """Known sizes, one record damaged, one empty; an epoch drawn whole."""
    sizes = [(60, 40), (100, 50), (30, 90)]
    texts = [[{"user": "what is it?", "assistant": "a cat"}] * n for n in (1, 2, 3)]
    records = [
        {"images": [picture(tmp_path, f"{i}.png", size)], "texts": t}
        for i, (size, t) in enumerate(zip(sizes, texts, strict=True))
    ]
    whole = (tmp_path / picture(tmp_path, "whole.jpg", sizes[0])).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:-40])  # its header is whole: only decoding tells
    records += [
        {"images": ["cut.jpg"], "texts": texts[0]},
        {"images": [], "texts": [{"user": "q", "assistant": " "}]},
    ]
    vision = replace(TINY_MODEL.vision, max_side=128)
    config, data = process_group(tmp_path, records, vision=vision, left_length=75, right_length=100)
    result = stats.gather(
        config, data, 4
    )  # an epoch: five records, of which one makes no sample and one cannot be decoded
    (tally,) = result.sources
    one = len(Renderer(data.tokenizer, 4).conversation(chat(texts[0], 1), [(1, 1)]).right_ids)
    assert tally.records == 5 and result.drawn == 4 and result.used == 3
    assert sorted(tally.right) == [one, 2 * one, 3 * one] and sorted(tally.documents) == sorted(
        tally.turns
    ) == [1, 2, 3]
    assert (
        sorted(tally.sizes) == sorted(sizes)
        and sorted(tally.tiles) == [1, 3, 3]
        and sorted(tally.left) == [5, 15, 15]
    )
    assert {reason for _, reason in result.dropped} <= {"image_damaged", "empty_text"}
    assert result.examples.keys() == result.dropped.keys()
    result = stats.gather(
        *process_group(tmp_path, records, vision=vision, left_length=75, right_length=100), 40
    )  # ten epochs
    assert (
        result.dropped == {("jsonl", "image_damaged"): 1, ("jsonl", "empty_text"): 1}
        and len(result.sources[0].sizes) == 30
    )
    assert Counter(result.sources[0].right) == {n * one: 10 for n in (1, 2, 3)}

    chained = stats.gather(
        *process_group(tmp_path, records, turns="chain", left_length=75, right_length=100), 4
    ).sources[0]
    assert sorted(chained.turns) == [1, 2, 3] and chained.documents == [1, 1, 1]

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    stats.show(result, config, console)
    printed = console.export_text()
    for value in (
        f"{statistics.mean([one, 2 * one, 3 * one]):.1f}",
        "60 × 50",
        "2.33",
        "image_damaged",
        f"{3 * one} │",
    ):
        assert value in printed, printed
    pytest.importorskip("matplotlib", reason="the group report is not installed")
    figure = stats.plot(result, config)
    left, right, sides, fills = (
        [
            (bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height())
            for bar in axes.patches
            if bar.get_height()
        ]
        for axes in figure.axes
    )
    for bars, values in (
        (left, [5, 15, 15] * 10),
        (right, result.sources[0].right),
        (sides, [60, 100, 90] * 10),
    ):
        assert sum(n for _, _, n in bars) == 30 and all(
            n == sum(low <= value < high for value in values) for low, high, n in bars
        )
    assert sum(n for _, _, n in fills) == 2 * len(result.fill.right) and [
        text.get_text() for text in figure.legends[0].get_texts()
    ] == [" jsonl"]
    assert stats.draw(result, config, tmp_path / "plot.png") == f"written: {tmp_path / 'plot.png'}"
    with Image.open(tmp_path / "plot.png") as image:
        assert (
            image.width > 1000 and len(set(image.convert("RGB").resize((200, 150)).get_flattened_data())) > 5
        )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    assert (
        "not installed, which the group report brings" in stats.draw(result, config, tmp_path / "none.png")
        and not (tmp_path / "none.png").exists()
    )


def test_fill_is_what_the_rows_hold(tmp_path):
    images = [picture(tmp_path, "a.png", (60, 60))]
    records = [
        {"images": images, "texts": [{"user": "word " * (1 + i), "assistant": "yes"}]} for i in range(6)
    ]
    options = {"left_length": 40, "right_length": 60}
    config, data = process_group(tmp_path, records, **options)
    _, again = process_group(tmp_path, records, **options)
    fill = stats.gather(config, data, 12).fill
    rows = [row for row, _ in zip(again.batches.rows, fill.left, strict=False)]  # what training would pack
    assert fill.samples == sum(map(len, rows)) >= 12
    left, right = (
        [sum(getattr(s, f"{name}_length") for s in row) for row in rows] for name in ("left", "right")
    )
    assert fill.left == [n / 40 for n in left] and fill.right == [n / 60 for n in right]
    assert fill.both == pytest.approx(sum(left + right) / (100 * len(rows)))


def test_splits():
    samples = [fake_sample(17, 79)] * 3
    assert [(b.left, b.right) for b in stats.splits(samples, stats.Budget(34, 128, 17))] == [(17, 145)]
    assert [(b.left, b.right) for b in stats.splits(samples, stats.Budget(68, 94, 17))] == [
        (17, 145),
        (34, 128),
    ]
    assert [
        (b.left, b.right) for b in stats.splits([*samples, fake_sample(51, 10)], stats.Budget(68, 94, 17))
    ] == [(51, 111)]


def fake_sample(left: int, right: int) -> Sample:
    return Sample((0, 0, 0), None, [Document([1] * left, [], [], [1] * right, [], [])])


def test_suggested_split_follows_the_means(tmp_path):
    """Samples of 5 left tokens and n right ones.

    The suggested left length is the left share of 160, in steps of 5; rows become fuller.
    """
    records = [
        {
            "images": [picture(tmp_path, "a.png", (60, 60))],
            "texts": [{"user": "what is it?", "assistant": "a cat"}],
        }
        for _ in range(9)
    ]
    config, data = process_group(tmp_path, records, left_length=80, right_length=80)
    result = stats.gather(config, data, 40)
    share = 160 * 5 / (5 + result.sources[0].right[0])
    budget = result.suggested.budget
    assert budget.left in (share // 5 * 5, share // 5 * 5 + 5) and budget.left + budget.right == 160
    assert result.suggested.both > result.fill.both
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    stats.show(result, config, console)
    assert f"--data.left_length {budget.left} --data.right_length {budget.right}" in console.export_text()
    vanilla = stats.gather(
        *process_group(tmp_path, records, left_context="none", left_length=1, right_length=160), 20
    )
    assert (
        vanilla.suggested is None
        and vanilla.fill.left == [0.0] * len(vanilla.fill.right)
        and vanilla.fill.both == pytest.approx(np.mean(vanilla.fill.right))
    )


@pytest.mark.parametrize(
    "own",
    [
        ["--samples", "0"],
        ["--output", "."],
        ["--output", "nowhere/x.html"],
        ["--resume", "auto"],
        ["--rows", "x"],
    ],
)
def test_wrong_arguments(own):
    with pytest.raises(UsageError):
        arguments(own, "", preview.OWN)


def test_own_flags_and_those_of_training_mix():
    args, config, flags = arguments(
        ["--samples", "3", "--data.limit=5", "--config", "vanilla_easyvqa", "--seed", "2"], "", preview.OWN
    )
    assert (args.samples, args.rows, config.config, config.data.limit, config.seed) == (
        3,
        3,
        "vanilla_easyvqa",
        5,
        2,
    ) and set(flags) == {"config", "data.limit", "seed"}


@pytest.mark.parametrize("module", ["tools.preview", "tools.stats"])
def test_a_wrong_flag_is_one_line(module, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", module, "--data.limt", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "data.limit" in done.stderr
        and not done.stdout
    )
