"""Marks of records: CLIP scores, near duplicates, and longer captions, as training reads them."""

import importlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from configs.train import DataConfig, FilterConfig
from data.curation import Marks, write_marks
from data.datasets import SampleDataset
from data.mixture import InMemoryRecords, Source
from data.sources import open_sources
from tests.conftest import TINY_CLIP, TINY_MODEL, lively_model
from tools import duplicates, recaption, score
from utils.errors import UsageError, UserError


def drawing(number: int, shift: int = 0) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    generator = np.random.default_rng(number)
    for _ in range(4):
        x, y = generator.integers(0, 40, 2)
        draw.rectangle((x, y, x + 20, y + 12), fill=tuple(int(c) for c in generator.integers(0, 255, 3)))
    if shift:
        draw.point((shift, shift), fill="black")
    return image


@pytest.fixture
def captions(tmp_path) -> Path:
    """Ten drawings with captions, two of them saved again with a changed pixel and another caption."""
    lines = []
    for n in (*range(10), 0, 1):
        file = f"{len(lines)}.png"
        drawing(n, len(lines) // 10).save(tmp_path / file)
        answer = {"role": "assistant", "content": f"drawing {len(lines)}"}
        lines.append(
            {"image": file, "messages": [{"role": "user", "content": "Describe the image."}, answer]}
        )
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "set.jsonl"


def opened(captions: Path, **options):
    config = DataConfig(sources=f"jsonl={captions}", **{"validation_images": 2} | options)
    return config, *open_sources(config)


@pytest.fixture
def clip(tmp_path) -> Path:
    """A tiny CLIP model with open_clip's own files."""
    import open_clip

    folder = tmp_path / "clip"
    folder.mkdir()
    torch.manual_seed(0)
    factory = importlib.import_module("open_clip.factory")
    factory._MODEL_CONFIGS["tiny_clip"] = TINY_CLIP
    model = open_clip.create_model("tiny_clip")
    del factory._MODEL_CONFIGS["tiny_clip"]
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": {}}))
    return folder


def test_scores_are_open_clips_and_filter(captions, clip, renderer, capsys):
    import open_clip

    output = captions.with_name("scores.parquet")
    flags = ["--data.sources", f"jsonl={captions}", "--output", str(output), "--data.validation_images", "2"]
    score.main([*flags, "--clip", f"local-dir:{clip}", "--clip_weights", "", "--batch", "5"])
    assert "12 of 12 records scored" in capsys.readouterr().out
    config, [training], _ = opened(captions, curation=str(output))
    marks = Marks(config.curation, [training])
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    for number in range(12):
        record = training.records[number]
        with torch.no_grad(), Image.open(record["images"][0]) as image:
            features = model.eval().encode_image(preprocess(image)[None])
            text = model.encode_text(tokenizer([record["messages"][1]["content"]]))
            expected = torch.cosine_similarity(features, text).item()
        assert abs(marks.score(training.name, number) - expected) < 1e-4
    scores = [marks.score(training.name, number) for number in range(training.start, training.stop)]
    middle = max(float(np.median(scores)), 0.0)
    filtered = FilterConfig(min_clip_score=middle) if middle else FilterConfig(min_clip_score=1e-9)
    data = SampleDataset(
        [training],
        renderer,
        TINY_MODEL.vision,
        DataConfig(left_length=64, right_length=128, curation=str(output), filters=filtered),
        256,
    )
    kept = [n for n in range(training.start, training.stop) if data.samples(0, n, True)]
    assert kept == [
        n
        for n in range(training.start, training.stop)
        if marks.score(training.name, n) >= filtered.min_clip_score
    ]
    assert data.dropped[training.name, "clip_score"] == 10 - len(kept)


def test_near_duplicates_are_marked_and_left_out(captions, renderer, capsys):
    output = captions.with_name("duplicates.parquet")
    flags = ["--data.sources", f"jsonl={captions}", "--output", str(output), "--data.validation_images", "2"]
    duplicates.main(flags)
    config, [training], _ = opened(captions, curation=str(output))
    marks = Marks(config.curation, [training])
    number_of = [int(Path(r["images"][0]).stem) for r in training.records.records]
    drawn = [n if n < 10 else n - 10 for n in number_of]
    expected = {
        n
        for n in range(training.start, training.stop)
        if drawn[n] in drawn[: training.start] or drawn[n] in drawn[training.start : n]
    }
    marked = {n for n in range(len(training.records)) if marks.is_duplicate(training.name, n)}
    assert marked == expected and len(marked) == 2
    assert "2 of 10 training records are duplicates" in capsys.readouterr().out
    settings = DataConfig(left_length=64, right_length=128, curation=str(output))
    data = SampleDataset([training], renderer, TINY_MODEL.vision, settings, 256)
    assert [n for n in range(12) if not data.samples(0, n, True)] == sorted(marked)
    assert dict(data.dropped) == {(training.name, "duplicate"): 2}


@pytest.mark.parametrize("bits", [0, 1, 4, 9])
def test_near_hashes_are_those_of_a_full_comparison(bits):
    generator = np.random.default_rng(bits)
    base = [int(value) for value in generator.integers(0, 2**63, 20)]
    hashes = [
        value ^ sum(1 << int(b) for b in generator.choice(64, generator.integers(0, 12), replace=False))
        for value in base * 10
    ]
    near = duplicates.NearHashes(bits)
    for number, value in enumerate(hashes):
        expected = any((value ^ other).bit_count() <= bits for other in hashes[:number])
        assert (near.find((value,), "") is not None) == expected
        near.add((value,), "", str(number))
    assert near.find((hashes[0],), "another question") is None
    assert near.find((hashes[0], hashes[0]), "") is None


def test_marks_of_other_data_are_refused(tmp_path):
    sources = [Source("a", InMemoryRecords([{}] * 3), 0, 3)]
    write_marks(
        tmp_path / "a.parquet", [{"source": "a", "record": 1, "clip_score": 0.5}], "clip_score", sources
    )
    marks = Marks(f"{tmp_path}/a.parquet", sources)
    assert (marks.score("a", 1), marks.score("a", 2), marks.is_duplicate("a", 1)) == (0.5, None, False)

    said = {"texts": [{"user": "a", "assistant": "b"}]}
    for other, message in (
        ([Source("b", InMemoryRecords([{}] * 3), 0, 3)], "has marks of a, not of b"),
        ([Source("a", InMemoryRecords([{}, {}, said]), 0, 3)], "other records of a than there are now"),
        (
            [Source("a", InMemoryRecords([{}] * 4), 0, 3)],
            "made for other records of a than there are now: make it",
        ),
    ):
        with pytest.raises(UserError, match=message):
            Marks(f"{tmp_path}/a.parquet", other)
    (tmp_path / "b.parquet").write_bytes(b"noise")
    with pytest.raises(UserError, match="b.parquet cannot be read as marks of records"):
        Marks(f"{tmp_path}/b.parquet", sources)


class Caption(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that says what it was shown; every third request fails once."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        failed = len(self.server.requests) % 3 == 2
        [message] = request["messages"]
        picture, text = message["content"]
        content = f"{request['model']}: {text['text']} {len(picture['image_url']['url'])}"
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        answer = {"id": "1", "created": 0, "model": "m", "system_fingerprint": "", "choices": [choice]}
        body = b"{}" if failed else json.dumps(answer | {"usage": None}).encode()
        self.send_response(503 if failed else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Caption)
    server.requests = []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_captions_of_an_endpoint(captions, endpoint, capsys, monkeypatch):
    """Interrupted, and gone on with; what is written trains."""
    monkeypatch.setattr("utils.hub.pause", lambda seconds: None)
    output = captions.with_name("longer.jsonl")
    flags = ["--data.sources", f"jsonl={captions}", "--output", str(output), "--data.validation_images", "2"]
    flags += [
        "--endpoint",
        f"http://127.0.0.1:{endpoint.server_port}/v1",
        "--model",
        "m",
        "--prompt",
        "More?",
    ]
    recaption.main(flags)
    whole = output.read_text()
    lines = whole.splitlines(keepends=True)
    output.write_text("".join(lines[:4]) + lines[4][:30])  # killed while it wrote
    recaption.main(flags)
    assert output.read_text() == whole and "8 captions written, 4 were there" in capsys.readouterr().out
    _, [training], _ = opened(output)
    records = training.records.records
    assert len(records) == 12 and all(r["messages"][1]["content"].startswith("m: More? ") for r in records)
    _, [original], _ = opened(captions)
    assert {r["images"][0] for r in records} == {r["images"][0] for r in original.records.records}


def test_captions_of_an_own_model(tokenizer, tmp_path, capsys):
    """Images in a table have no file: they are written beside the captions."""
    import datasets

    lively_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    rows = {"image": [drawing(n) for n in range(5)], "caption": ["a"] * 5}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "train.parquet")
    flags = ["--data.sources", f"tables={tmp_path}/set", "--output", str(tmp_path / "longer.jsonl")]
    flags += [
        "--data.validation_images",
        "1",
        "--checkpoint",
        str(tmp_path / "model"),
        "--max_new_tokens",
        "5",
    ]
    recaption.main([*flags, "--batch", "2"])
    assert "5 captions written" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "longer.jsonl").read_text().splitlines()]
    for n, line in enumerate(lines):
        with Image.open(tmp_path / line["image"]) as image:
            assert (np.asarray(image) == np.asarray(drawing(n))).all()
    with pytest.raises(UsageError, match="give either --checkpoint, or --endpoint with --model"):
        recaption.main(flags[:4])
