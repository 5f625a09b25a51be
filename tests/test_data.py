"""Records → samples → rows → batches.

Nothing is dropped silently, every sample comes once an epoch, the state is exact, bad records are counted.
"""

import json
import multiprocessing
import os
import signal
import time
import warnings
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.loader
from configs.cli import resolve
from configs.train import FilterConfig
from data.collators import collate
from data.datasets import SampleStream, sample_bytes
from data.images import ImageError
from data.loader import Loader
from data.mixture import InMemoryRecords, Mixture, Source
from data.packing import Budget, RowStream, pack
from data.parquet import UnreadableBlock
from eval.validation import Validation
from tests.conftest import TINY_MODEL, TURNS, chat, dataset_of
from training.setup import build_data
from utils.errors import UserError

SHORT = {"left_length": 15, "right_length": 60}  # three images of 5 tokens


@pytest.fixture
def records(tmp_path):
    out = []
    for i in range(12):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (20 + i, 30), (i * 20, 0, 255 - i * 20)).save(path)
        out.append({"images": [str(path)], "texts": TURNS[: 1 + i % 4], "id": f"r{i}"})
    return out


def samples_of(dataset, count=True):
    return [sample for i in range(len(dataset.sources[0])) for sample in dataset.samples(0, i, count)]


def stream_of(dataset, seed=0, **options):
    return SampleStream(dataset, Mixture(dataset.sources, seed, **options))


LOADERS: list[Loader] = []


@pytest.fixture(autouse=True)
def close_loaders():
    yield
    while LOADERS:
        LOADERS.pop().close()


def loader_of(records, renderer, workers=0, window=5, rank=0, ranks=1, **options) -> Loader:
    dataset = dataset_of(records, renderer, keep=workers == 0, **SHORT | options)
    stream = stream_of(dataset, 3, rank=rank, ranks=ranks)
    LOADERS.append(
        Loader(RowStream(stream, Budget(15, 60, 5), window), 2, renderer.tokenizer.global_image, workers)
    )
    return LOADERS[-1]


def digest(batch) -> str:
    return " ".join(
        f"{name}{tuple(value.shape)}{hash(value.numpy().tobytes())}" for name, value in sorted(batch.items())
    )


class TestEpochs:
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_every_sample_once(self, records, renderer, ranks):
        dataset = dataset_of(
            records, renderer, left_length=15, right_length=40
        )  # so short that records split into parts
        expected = Counter(s.key for s in samples_of(dataset))
        assert any(part for _, _, part in expected) and sum(
            len(s.documents) for s in samples_of(dataset)
        ) == sum(len(r["texts"]) for r in records)
        streams = [iter(stream_of(dataset, rank=rank, ranks=ranks)) for rank in range(ranks)]
        own = [
            {int(i) for i in Mixture(dataset.sources, 0, rank=rank, ranks=ranks).epoch(0)[1]}
            for rank in range(ranks)
        ]
        assert sum(map(len, own)) == len(records)  # disjoint
        for _ in range(3):
            epoch = []
            for rank, stream in enumerate(streams):
                own = {int(i) for i in Mixture(dataset.sources, 0, rank=rank, ranks=ranks).epoch(_)[1]}
                epoch += [
                    s.key for s in islice(stream, sum(n for key, n in expected.items() if key[1] in own))
                ]
            assert Counter(epoch) == expected

    def test_order_depends_on_seed_and_epoch(self, records, renderer):
        def order(seed):
            return [s.key for s in islice(stream_of(dataset_of(records, renderer), seed), 24)]

        assert order(0) == order(0) != order(1)
        assert order(0)[:12] != order(0)[12:] and sorted(order(0)[:12]) == sorted(order(0)[12:])

    def test_weights_caps_and_temperature(self):
        def source(name, n, weight=1.0, cap=0):
            return Source(name, InMemoryRecords([{}] * n), 0, n, weight, cap)

        sources = [source("a", 100), source("b", 60, 0.25), source("c", 10, 3.0), source("d", 40, cap=7)]
        mixture = Mixture(sources, 5)
        assert mixture.drawn == [100, 15, 30, 7]
        seen = [Counter() for _ in sources]
        for epoch in range(40):
            which, record, first = mixture.epoch(epoch)
            assert Counter(which.tolist()) == {0: 100, 1: 15, 2: 30, 3: 7}
            for s, r, new in zip(which.tolist(), record.tolist(), first.tolist(), strict=True):
                assert new == (r not in seen[s])
                seen[s][r] += 1
            for counts, whole in zip(seen, sources, strict=True):  # none comes again before all have come
                counted = [counts[i] for i in range(len(whole))]
                assert max(counted) - min(counted) <= 1
        assert Mixture([source("large", 900), source("small", 100)], 0, temperature=2.0).drawn == [
            750,
            250,
        ]  # √900 : √100 = 3 : 1
        with pytest.raises(UserError, match="holds no record"):
            Mixture([source("a", 10, 0.01)], 0)
        assert Mixture([source(str(n), 100, n / 100) for n in range(1, 100)], 0).drawn == [
            *range(1, 100)
        ]  # 0.29 · 100 is less than 29

    @pytest.mark.parametrize("ranks", [1, 3])
    def test_parts_of_a_record_are_carried_over(self, ranks):
        """Sources that are due less than once an epoch are used in time.

        None of their records is repeated before all have been used.
        """
        sources = [
            Source(name, InMemoryRecords([{}] * n), 0, n, weight)
            for name, n, weight in (("big", 30, 1.0), ("tiny", 4, 0.1), ("half", 5, 0.5), ("one", 1, 0.3))
        ]
        mixtures = [Mixture(sources, 5, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert mixtures[0].drawn == [30, Fraction(2, 5), Fraction(5, 2), Fraction(3, 10)]
        seen = [Counter() for _ in sources]
        for epoch in range(20):
            for mixture in mixtures:
                which, record, first = mixture.epoch(epoch)
                for s, r, new in zip(which.tolist(), record.tolist(), first.tolist(), strict=True):
                    assert new == (r not in seen[s])
                    seen[s][r] += 1
            if ranks == 1:
                assert [sum(counts.values()) for counts in seen] == [
                    floor((epoch + 1) * drawn) for drawn in mixtures[0].drawn
                ]
            if epoch % 2:
                assert set(seen[2].values()) == {(epoch + 1) // 2}, "half of it, the other half in the next"
        assert [sorted(counts.values()) for counts in seen] == [[20] * 30, [2] * 4, [10] * 5, [6]]

    def test_an_epoch_without_a_record_is_passed_over(self, renderer):
        sources = [
            Source(name, InMemoryRecords([{"images": [], "texts": TURNS[:1], "id": name}] * 5), 0, 5, 0.1)
            for name in "ab"
        ]
        dataset = dataset_of([], renderer)
        dataset.sources[:] = sources
        stream = stream_of(dataset)
        assert not len(stream.mixture.epoch(0)[0]) and Counter(s.key[0] for s in islice(stream, 10)) == {
            0: 5,
            1: 5,
        }

    def test_sources_are_mixed_and_ranks_differ(self):
        sources = [Source(name, InMemoryRecords([{}] * 200), 0, 200) for name in "ab"]
        which = Mixture(sources, 0).epoch(0)[0]
        assert 60 < sum(which[:200]) < 140
        shares = [
            {*zip(*(x.tolist() for x in Mixture(sources, 0, rank=r, ranks=3).epoch(4)[:2]), strict=True)}
            for r in range(3)
        ]
        assert sum(map(len, shares)) == 400 == len(set.union(*shares))


class TestLoader:
    def test_workers_change_nothing(self, records, renderer):
        """One, two or three workers give the same results as none.

        Batches, losses, counts and the global random state are equal, and every sample comes once an epoch.
        """
        (records[5]["images"],) = ([records[4]["images"][0] + ".nowhere"],)
        torch.manual_seed(1)
        plain = loader_of(records, renderer)
        expected = [digest(b) for b in islice(plain, 50)]
        after = torch.get_rng_state()
        for workers in (1, 2, 3):
            torch.manual_seed(1)
            loader = loader_of(records, renderer, workers)
            assert [
                digest(b) for b in islice(loader, 50)
            ] == expected  # so many that the memory of early ones is used again
            assert torch.equal(torch.get_rng_state(), after) and loader.dropped() == plain.dropped() == {
                ("test", "image_missing"): 1
            }
            assert json.dumps(loader.state()) == json.dumps(plain.state())

    def test_retained_batches_do_not_change(self, records, renderer):
        """Workers use their shared memory again; what was given out stays as it was."""
        plain = [batch["tiles"] for batch in islice(loader_of(records, renderer), 40)]
        retained = [batch["tiles"] for batch in islice(loader_of(records, renderer, workers=1), 40)]
        assert all(map(torch.equal, plain, retained)) and len({t.data_ptr() for t in retained}) == 40

    @pytest.mark.parametrize("workers", [1, 2, 3])
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_an_epoch_of_batches_holds_every_sample_once(
        self, records, renderer, workers, ranks, monkeypatch
    ):
        consumed: list[tuple[int, int, int]] = []
        finish = Loader._finish

        def watched(self, batch, dropped):
            consumed.extend(s.key for row in self.plan[0][0] for s in row)
            return finish(self, batch, dropped)

        monkeypatch.setattr(Loader, "_finish", watched)
        epochs = []
        for rank in range(ranks):
            loader = loader_of(records, renderer, workers, window=1, rank=rank, ranks=ranks, right_length=40)
            while not loader.consumed or loader.consumed["epoch"] < 2:
                next(loader)
            everything = Counter(
                s.key for s in samples_of(dataset_of(records, renderer, **SHORT | {"right_length": 40}))
            )
            own = [
                set(Mixture(loader.dataset.sources, 3, rank=rank, ranks=ranks).epoch(e)[1].tolist())
                for e in (0, 1)
            ]
            sizes = [sum(n for key, n in everything.items() if key[1] in share) for share in own]
            epochs.append((Counter(consumed[: sizes[0]]), Counter(consumed[sizes[0] : sum(sizes)])))
            consumed.clear()
            loader.close()
        for number in (0, 1):
            assert sum((epoch[number] for epoch in epochs), Counter()) == everything

    @pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 0), (0, 1)])
    def test_resumes_exactly_with_any_number_of_workers(self, records, renderer, before, after):
        for record in records[::3]:
            Path(record["images"][0]).write_bytes(b"\x89PNG nothing")
        whole = loader_of(records, renderer)
        expected = [digest(b) for b in islice(whole, 14)]
        for stop in (0, 1, 2, 6):
            first = loader_of(records, renderer, before)
            assert [digest(b) for b in islice(first, stop)] == expected[:stop]
            again = loader_of(records, renderer, after)
            again.load_state(json.loads(json.dumps(first.state())))
            assert [digest(b) for b in islice(again, 14 - stop)] == expected[stop:]
            assert again.dropped() == whole.dropped() == {("test", "image_damaged"): 4}

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("error", [UserError("drawing an SVG needs a package"), MemoryError()])
    def test_what_no_worker_can_mend_is_its_own_line(self, records, renderer, monkeypatch, workers, error):
        def failing(_):
            raise error

        monkeypatch.setattr("data.datasets.open_pixels", failing)
        loader = loader_of(records, renderer, workers)
        for _ in range(2):  # the second time it is at no end
            with pytest.raises(
                UserError,
                match="^drawing an SVG needs a package$"
                if str(error)
                else "^not enough memory to decode an image of test: ",
            ):
                next(loader)

    @pytest.mark.parametrize("end", ["killed", "exit 0"])
    def test_a_worker_that_dies_is_one_line_within_seconds(self, records, renderer, monkeypatch, end):
        """However it ends; and no line besides, from a destructor or PyTorch's handler of signals."""
        original, last = data.loader.decode, Path(records[0]["images"][0]).with_name("end")

        def ending(sample, vision):
            if last.exists():
                os._exit(0)
            return original(sample, vision)

        monkeypatch.setattr("data.loader.decode", ending)
        handler = signal.getsignal(signal.SIGCHLD)
        loader = loader_of(records, renderer, workers=2)
        next(loader)
        assert signal.getsignal(signal.SIGCHLD) == handler
        if end == "killed":
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        else:
            last.touch()
        before = time.monotonic()
        for _ in range(2):
            with pytest.raises(
                UserError,
                match="^a data worker died .process [0-9]+, "
                f"{'SIGKILL' if end == 'killed' else 'exit status 0'}.: .*--resume auto",
            ):
                while True:
                    next(loader)
        assert time.monotonic() - before < 30

    def test_a_connection_that_breaks_is_a_death_where_somebody_died(self, monkeypatch):
        monkeypatch.setattr("data.loader.EXIT_SECONDS", 0.2)

        def broken(error):
            raise error
            yield

        dead, alive = (
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(seconds,))
            for seconds in (0, 60)
        )
        dead.start(), alive.start()
        try:
            for error in (ConnectionResetError("reset"), EOFError(), FileNotFoundError("socket")):
                with pytest.raises(UserError, match="a data worker died .process"):
                    next(data.loader._while_alive(broken(error), {dead, alive}))
                with pytest.raises(type(error)):
                    next(data.loader._while_alive(broken(error), {alive}))
        finally:
            alive.kill(), alive.join()

    def test_workers_that_are_silent_are_given_up(self, records, renderer, monkeypatch):
        monkeypatch.setattr("data.loader.POLL_SECONDS", 0.2)
        monkeypatch.setattr("data.loader.TIMEOUT_SECONDS", 1.0)
        monkeypatch.setattr("data.loader.decode", lambda *_: time.sleep(60))
        with pytest.raises(UserError, match="the data workers gave nothing for 1.0 s"):
            next(loader_of(records, renderer, workers=2))
        for worker in multiprocessing.active_children():
            worker.kill()

    def test_slow_workers_are_waited_for(self, records, renderer, monkeypatch):
        expected = [digest(b) for b in islice(loader_of(records, renderer), 6)]
        original = data.loader.decode
        monkeypatch.setattr("data.loader.POLL_SECONDS", 0.01)
        monkeypatch.setattr("data.loader.decode", lambda *a: time.sleep(0.02) or original(*a))
        assert [digest(b) for b in islice(loader_of(records, renderer, workers=2), 6)] == expected

    def test_more_workers_than_cores_are_not_warned_of(self, records, renderer, monkeypatch):
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            next(loader_of(records, renderer, workers=2))
        assert not [w for w in caught if "DataLoader" in str(w.message)]

    def test_images_that_are_damaged_for_some_small_epochs_are_not_the_end(self, records, renderer):
        dataset = dataset_of(records, renderer, **SHORT)
        dataset.sources[0] = replace(dataset.sources[0], cap=1)
        for epoch in range(11):  # all but the last
            Path(records[int(stream_of(dataset).mixture.epoch(epoch)[1][0])]["images"][0]).write_bytes(
                b"\x89PNG nothing"
            )
        loader = Loader(
            RowStream(stream_of(dataset), Budget(15, 60, 5), 1), 1, renderer.tokenizer.global_image, 0
        )
        counts = [len(next(loader)["tiles"]) for _ in range(40)]
        assert counts[0] == 0 and 1 in counts

    def test_images_missing_at_a_resume_are_skipped_and_counted(self, records, renderer):
        vision = replace(TINY_MODEL.vision, max_side=128)  # sizes are read when a sample is planned

        def tiled() -> Loader:
            dataset = dataset_of(records, renderer, vision, keep=False, **SHORT | {"left_length": 60})
            LOADERS.append(
                Loader(
                    RowStream(stream_of(dataset), Budget(60, 60, 5), 8), 2, renderer.tokenizer.global_image, 0
                )
            )
            return LOADERS[-1]

        first = tiled()
        next(first)
        state = json.loads(json.dumps(first.state()))
        waiting = {key[1] for _, key, _ in state["window"]}
        Path(records[min(waiting)]["images"][0]).unlink()
        again = tiled()
        again.load_state(state)
        for _ in range(6):
            next(again)
        assert again.dropped()["test", "gone"] == sum(key[1] == min(waiting) for _, key, _ in state["window"])

    def test_what_cannot_be_read_at_a_resume_is_counted_once(self, records, renderer, monkeypatch):
        first = loader_of(records, renderer, right_length=40)  # records split into parts
        next(first)
        state = json.loads(json.dumps(first.state()))
        readable, lost = InMemoryRecords.__getitem__, state["window"][0][1][1]

        def failing(self, index):
            if index == lost:
                raise UnreadableBlock("gone for now")
            return readable(self, index)

        monkeypatch.setattr(InMemoryRecords, "__getitem__", failing)
        again = loader_of(records, renderer, right_length=40)
        again.load_state(state)
        assert again.dropped() == {("test", "gone"): sum(key[1] == lost for _, key, _ in state["window"])}

    def test_ranks_see_disjoint_data(self, records, renderer):
        seen = []
        for rank in range(2):
            stream = iter(loader_of(records, renderer, rank=rank, ranks=2).rows)
            seen.append({s.key[1] for row in islice(stream, 30) for s in row})
        epoch = [
            set(
                Mixture([Source("test", InMemoryRecords(records), 0, 12)], 3, rank=r, ranks=2)
                .epoch(0)[1]
                .tolist()
            )
            for r in range(2)
        ]
        assert not epoch[0] & epoch[1] and len(epoch[0] | epoch[1]) == 12 and all(seen)

    def test_memory_is_not_needed_for_exactness(self, records, renderer):
        cached, uncached = loader_of(records, renderer), loader_of(records, renderer)
        uncached.dataset.capacity = 0
        assert [digest(b) for b in islice(cached, 12)] == [digest(b) for b in islice(uncached, 12)]
        assert cached.dataset.cache and not uncached.dataset.cache


class TestSamples:
    def test_branch_shares_the_image_and_chain_is_one_conversation(self, records, renderer, tokenizer):
        record = [records[3]]  # four turns
        branch, chain, marked = (
            dataset_of(r, renderer, left_length=15, turns=t)
            for r, t in ((record, "branch"), (record, "chain"), ([records[3] | {"turns": "branch"}], "chain"))
        )
        (branched,), (chained,), (own,) = samples_of(branch), samples_of(chain), samples_of(marked)
        assert len(branched.documents) == 4 == len(own.documents) and len(chained.documents) == 1
        assert branched.left_length == chained.left_length == 5
        batch = collate([[branch.decoded(branched)]], tokenizer.global_image)
        assert batch["left_ids"].shape == (1, 5) and batch["right_documents"].unique().tolist() == [
            0,
            1,
            2,
            3,
        ]
        assert batch["right_groups"].unique().tolist() == [0]

    def test_a_long_conversation_is_split_between_turns(self, records, renderer):
        """Every answer stays whole and is supervised once; only a turn too long by itself is dropped."""
        turns = [{"user": f"question {i}?", "assistant": "answer " * (1 + i % 3) + str(i)} for i in range(12)]
        turns[7] = {"user": "tell me all", "assistant": "much " * 200}
        dataset = dataset_of(
            [records[0] | {"texts": turns}], renderer, **SHORT | {"right_length": 100}, turns="chain"
        )
        samples = samples_of(dataset)
        assert len(samples) > 1 and dataset.dropped == {("test", "too_long"): 1}
        supervised = []
        for sample in samples:
            (document,) = sample.documents
            assert len(document.right_ids) <= 100 and sample.left_length == 5
            assert [sample.key[2]] == [samples.index(sample)]
            supervised += [t for t in document.labels if t >= 0]
        answers = [
            token
            for i, turn in enumerate(turns)
            if i != 7
            for token in (*renderer.tokenizer.encode(turn["assistant"]), renderer.tokenizer.turn_end)
        ]
        assert supervised == answers
        shorter = [len(renderer.conversation(chat(turns[:n], 1), [(1, 1)]).right_ids) for n in (1, 2, 3, 4)]
        assert max(n for n in range(4) if shorter[n] <= 100) + 1 == sum(
            t == renderer.tokenizer.turn_end for t in samples[0].documents[0].labels
        )

    def test_tiles(self, renderer, tmp_path):
        """Two images of a record, one cut into 2 × 3 tiles: tokens, tiles and grid belong together."""
        vision = replace(TINY_MODEL.vision, max_side=192)
        wide, small = Image.new("RGB", (190, 120), "red"), Image.new("RGB", (30, 40), "blue")
        wide.save(tmp_path / "wide.png"), small.save(tmp_path / "small.png")
        record = {
            "images": [str(tmp_path / "wide.png"), str(tmp_path / "small.png")],
            "texts": TURNS[:1],
            "id": "x",
        }
        dataset = dataset_of([record], renderer, vision)
        (sample,) = samples_of(dataset)
        assert sample.grids == [(2, 3), (1, 1)] and sample.tile_total == 8 and sample.left_length == 8 * 5
        sample = dataset.decoded(sample)
        assert (
            sample.tiles.shape == (8, 3, 64, 64)
            and (sample.tiles[:7, 0] == 255).all()
            and (sample.tiles[7, 2] == 255).all()
        )
        tok = renderer.tokenizer
        heads = [t for t in sample.documents[0].left_ids if t != tok.image]
        assert tok.backend.decode(heads, skip_special_tokens=False).split("><") == [
            "<|global_image|", *[f"row_{r}_col_{c}" for r in (1, 2) for c in (1, 2, 3)], "|global_image|>"
        ]  # fmt: skip
        assert sample.documents[0].left_images == [0] * 35 + [1] * 5
        batch = collate([[sample]], tok.global_image)
        assert (batch["left_ids"] == tok.image).sum() == len(batch["tiles"]) * 4 and batch[
            "left_images"
        ].tolist() == [[0] * 35 + [1] * 5]

    def test_without_a_left_stream_every_document_has_its_own_images(self, records, renderer):
        vanilla = type(renderer)(renderer.tokenizer, 4, "none")
        samples = samples_of(dataset_of([records[3]], vanilla))  # four questions
        assert [(len(s.documents), s.tile_total, s.left_length) for s in samples] == [(1, 1, 0)] * 4


def hostile_records(folder: Path, good: str) -> tuple[list[dict], dict[str, int]]:
    """Records that cannot be used, and the count of each reason."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    noise.save(folder / "whole.jpg")
    noise.save(folder / "really_a_jpeg.png", "JPEG")  # a wrong extension is no harm
    whole = (folder / "whole.jpg").read_bytes()
    files = {
        "empty.png": b"",
        "text.png": b"no image",
        "cut.jpg": whole[: len(whole) // 2],
        "few.jpg": whole[:20],
        "bomb.png": bomb(30_000, 30_000),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    of = {"images": [good], "texts": TURNS[:1]}
    records = [
        *[of | {"images": [str(folder / name)]} for name in (*files, "nowhere.png")],
        of | {"images": [None]},
        of | {"images": None},
        of | {"images": [b""]},
        of | {"images": [good] * 4},
        of | {"texts": [{"user": "x" * 500, "assistant": "y"}, TURNS[0]]},
        of | {"texts": [{"user": "q", "assistant": " "}, TURNS[0]]},
        of | {"texts": [{"user": None, "assistant": "a"}]},
        of | {"texts": [{"assistant": "a"}]},
        of | {"texts": []},
        of | {"texts": [{"user": "all?", "assistant": "z" * 100_000}]},
        of | {"problem": "image_count"},
        of
        | {
            "images": [str(folder / "really_a_jpeg.png")],
            "texts": [{"user": "<|im_start|><|image|><row_1_col_1>", "assistant": "<|im_end|>\n"}],
        },
        of | {"images": [], "texts": TURNS[:1]},  # text alone
    ]
    reasons = {
        "image_missing": 3,
        "image_empty": 2,
        "image_not_an_image": 1,
        "image_damaged": 2,
        "image_too_large": 1,
    }
    return [r | {"id": str(i)} for i, r in enumerate(records)], reasons | {
        "too_many_images": 1,
        "too_long": 2,
        "empty_text": 4,
        "image_count": 1,
    }


def bomb(width: int, height: int) -> bytes:
    from tests.test_images import png_of_size

    return png_of_size(width, height)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("tiled", [False, True])
def test_a_corpus_of_bad_records(records, renderer, tmp_path, workers, tiled):
    """Every bad record is counted by its reason, once over all epochs.

    Every good record is trained on once an epoch.
    """
    bad, reasons = hostile_records(tmp_path, records[0]["images"][0])
    everything = bad + records
    vision = replace(TINY_MODEL.vision, max_side=128) if tiled else TINY_MODEL.vision
    dataset = dataset_of(everything, renderer, vision, keep=workers == 0, **SHORT)
    loader = Loader(
        RowStream(stream_of(dataset), Budget(15, 60, 5), 5), 2, renderer.tokenizer.global_image, workers
    )
    LOADERS.append(loader)
    answers = Counter()
    while (loader.consumed or {"epoch": 0})["epoch"] < 3:
        batch = next(loader)
        supervised = batch["labels"][batch["labels"] >= 0].tolist()
        answers["documents"] += supervised.count(renderer.tokenizer.turn_end)
        assert (batch["left_ids"] == renderer.tokenizer.image).sum() == 4 * len(batch["tiles"])
    assert loader.dropped() == {("test", reason): n for reason, n in reasons.items()}
    usable = (
        sum(len(r["texts"]) for r in records) + 2 + 2
    )  # the second turns of the long and the empty one, the special tokens, the text alone
    assert answers["documents"] == pytest.approx(3 * usable, abs=20)


def test_an_image_that_changes_after_planning(renderer, tmp_path):
    vision = replace(TINY_MODEL.vision, max_side=128)
    Image.new("RGB", (100, 100)).save(tmp_path / "x.png")
    dataset = dataset_of(
        [{"images": [str(tmp_path / "x.png")], "texts": TURNS[:1], "id": "x"}], renderer, vision
    )
    (sample,) = samples_of(dataset)
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png")
    with pytest.raises(ImageError, match="not of the size"):
        dataset.decoded(sample)


def test_a_resume_within_a_record_does_not_count_it_again(records, renderer):
    """One turn too long, the others more than a row holds."""
    record = records[0] | {"texts": [{"user": "x" * 500, "assistant": "y"}, *TURNS]}
    stream = stream_of(dataset_of([record], renderer, left_length=15, right_length=40))
    keys = [next(iter(stream)).key, next(iter(stream)).key]
    assert keys == [(0, 0, 0), (0, 0, 1)] and stream.dataset.dropped == {("test", "too_long"): 1}
    again = stream_of(dataset_of([record], renderer, left_length=15, right_length=40))
    again.load_state(json.loads(json.dumps(stream.state())))
    assert next(iter(again)).key == (0, 0, 2) and again.dataset.dropped == {("test", "too_long"): 1}


def test_filters_leave_validation_alone(tmp_path):
    flags = ["--data.filters.min_question", "1000", "--data.limit", "20", "--data.validation_images", "4"]
    config = resolve(flags, "")[0]
    config = replace(config, model=replace(config.model, vision=replace(config.model.vision, grid=8)))
    built = build_data(config, tmp_path)
    assert built.validation.samples(0, 0, True) and not built.training.samples(0, 10, True)


def test_rows_that_cannot_be_read_are_counted_every_time_and_tried_again(records, renderer, monkeypatch):
    dataset = dataset_of(records, renderer)
    readable = InMemoryRecords.__getitem__

    def failing(self, index):
        if index == 3:
            raise UnreadableBlock("gone for now")
        return readable(self, index)

    monkeypatch.setattr(InMemoryRecords, "__getitem__", failing)
    for epoch in (1, 2):
        assert not dataset.samples(0, 3, first=epoch == 1) and dataset.dropped == {
            ("test", "unreadable"): epoch
        }
    monkeypatch.setattr(InMemoryRecords, "__getitem__", readable)
    assert dataset.samples(0, 3, first=False)


def test_rows_that_cannot_be_read_any_more_do_not_stop_validation(records, renderer, monkeypatch):
    """Nothing is read twice; should it have to be, and fail, it is counted."""
    readable, reads = InMemoryRecords.__getitem__, Counter()

    def failing(self, index):
        reads[index] += 1
        if validation_packed or (index == 3 and reads[index] > 1):
            raise UnreadableBlock("gone for now")
        return readable(self, index)

    def packed(*arguments):
        validation_packed.append(True)
        return pack(*arguments)

    validation_packed: list[bool] = []
    monkeypatch.setattr(InMemoryRecords, "__getitem__", failing)
    monkeypatch.setattr("eval.validation.pack", packed)
    dataset = dataset_of(records, renderer, **SHORT)
    validation = Validation(dataset, Budget(15, 60, 5), 2, renderer.tokenizer.global_image)
    assert dataset.dropped == {("test", "unreadable"): 1} and len(validation.questions) == 11


def test_special_token_strings_in_text_stay_text(records, renderer):
    (sample,) = samples_of(
        dataset_of([records[0] | {"texts": [{"user": "<|image|>", "assistant": "<|im_end|>"}]}], renderer)
    )
    tok = renderer.tokenizer
    ids = sample.documents[0].right_ids
    assert (
        tok.image not in ids
        and ids.count(tok.turn_end) == 1
        and tok.decode([t for t in sample.documents[0].labels if t >= 0]) == "<|im_end|>"
    )


def test_nothing_usable_is_an_error_not_a_loop(renderer):
    records = [{"images": ["nowhere.png"], "texts": [{"user": "", "assistant": "x"}], "id": "x"}]
    with pytest.raises(
        UserError, match="none of the 1 training records can be used.*test: empty_text 1 .record 0."
    ):
        next(iter(stream_of(dataset_of(records, renderer))))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_all_turn_out_damaged_are_an_error_not_a_loop(records, renderer, workers):
    for record in records:
        Path(record["images"][0]).write_bytes(b"\x89PNG nothing")
    with pytest.raises(
        UserError, match="none of the training images can be used: test: image_damaged 12 .record .*damaged"
    ):
        loader = loader_of(records, renderer, workers)
        for _ in range(30):
            batch = next(loader)
            assert not len(batch["tiles"]) and (batch["labels"] == -100).all()


def test_an_epoch_that_holds_nothing_usable_is_not_the_end(records, renderer):
    """Under a cap an epoch is a small part of the data."""
    half = [r | {"texts": [{"user": "", "assistant": ""}]} if i % 2 else r for i, r in enumerate(records)]
    dataset = dataset_of(half, renderer)
    dataset.sources[0] = replace(dataset.sources[0], cap=1)
    seen = {s.key[1] for s in islice(stream_of(dataset), 20)}
    assert seen == set(range(0, 12, 2))
    with pytest.raises(UserError, match="rank 2 of 3 has no record"):
        next(iter(stream_of(dataset_of(records[:2], renderer), rank=2, ranks=3)))


def test_prefix_routing_with_any_left_length(records, renderer):
    """Left lengths count in steps of 16 there: what a row cannot take is dropped, not waited for."""
    prefix = type(renderer)(renderer.tokenizer, 4, "prefix")
    for length in range(5, 40, 3):
        dataset = dataset_of(records, prefix, left_length=length)
        if samples := [s for i in range(12) for s in dataset.samples(0, i, True)]:
            rows = pack(samples, Budget(length, 128, prefix.left_unit))
            assert sum(map(len, rows)) == len(samples)
        else:
            assert dataset.dropped["test", "too_many_images"] == 12


class TestFilters:
    def count(self, records, renderer, **filters):
        dataset = dataset_of(
            records, renderer, filters=FilterConfig(**filters), **SHORT | {"right_length": 200}
        )
        retained = [document for sample in samples_of(dataset) for document in sample.documents]
        return len(retained), {reason: n for (_, reason), n in dataset.dropped.items()}

    def test_ratings_lengths_sizes_and_scores(self, records, renderer):
        turns = [
            {"user": "short?", "assistant": "yes", "ratings": {"relevance": 5, "formatting": 2}},
            {"user": "a longer question?", "assistant": "a longer answer", "ratings": {"relevance": 3}},
            {"user": "no ratings?", "assistant": "none", "ratings": {"relevance": None}},
        ]
        of = [records[0] | {"texts": turns}]  # an image of 20 × 30
        assert self.count(of, renderer) == (3, {})
        assert self.count(of, renderer, min_relevance=4) == (2, {"rating_relevance": 1})
        assert self.count(of, renderer, min_formatting=3, min_visual_dependency=5) == (
            2,
            {"rating_formatting": 1},
        )
        assert self.count(of, renderer, min_question=7) == (2, {"short_question": 1})
        assert self.count(of, renderer, max_question=11) == (2, {"long_question": 1})
        assert self.count(of, renderer, min_answer=4) == (2, {"short_answer": 1})
        assert self.count(of, renderer, max_answer=4) == (2, {"long_answer": 1})
        assert self.count(of, renderer, min_side=20) == (3, {}) and self.count(of, renderer, min_side=21) == (
            0,
            {"image_small": 1},
        )
        scored = [of[0] | {"clip_score": 0.2}, of[0] | {"clip_score": 0.3}, of[0]]
        assert self.count(scored, renderer, min_clip_score=0.25) == (6, {"clip_score": 1})
        assert self.count([of[0] | {"clip_score": -0.2}], renderer) == (3, {})


def test_the_cache_charges_a_sample_once(records, renderer):
    """However often it is decoded: what the cache holds and what is left of it are its capacity."""
    dataset = dataset_of(records, renderer)
    whole = dataset.capacity
    for _ in range(3):
        for sample in [s for i in range(len(records)) for s in dataset.samples(0, i, True)]:
            dataset.decoded(
                replace(sample, tiles=None, images=sample.images or list(records[sample.key[1]]["images"]))
            )
    held = sum(sample_bytes(sample) for samples in dataset.cache.values() for sample in samples)
    assert dataset.cache and dataset.capacity + held == whole


def test_the_cache_ends_at_its_capacity(records, renderer):
    dataset = dataset_of(records, renderer)
    dataset.capacity = 3 * sample_bytes(dataset.samples(0, 0, True)[0])
    dataset.cache.clear()
    for i in range(len(records)):
        dataset.samples(0, i, True)
    assert dataset.capacity >= 0 and 0 < len(dataset.cache) < len(records)
