"""Image KVs on disk.

They are bit for bit those of the encoder and are refused if anything is wrong. The store's order and bytes
are counted by hand; answers from the disk equal those of a cold encode.
"""

import os
import resource
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval.predictor
import models.image_store
from configs.model import GenerationConfig
from data.conversations import ask
from data.images import Tiles
from data.render import Renderer
from eval.predictor import ImageBlock, Predictor
from models.dual_tower.dual_tower import DualTowerVLM
from models.generation import generate
from models.image_store import ImageStore, image_kv_fingerprint, load_image_kv, save_image_kv
from models.kv_cache import ImageKV
from tests.conftest import TINY_MODEL, random_tiles, tiny_model
from utils.errors import UserError
from utils.files import replacing

FINGERPRINT, OTHER = "0a" * 16, "0b" * 16
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def kv_of(seed: int, tokens: int = 8, dtype: torch.dtype = torch.float32) -> ImageKV:
    """2 layers, 1 head of 16: 256 bytes a token in fp32."""
    return ImageKV(torch.randn(2, 2, 1, tokens, 16, generator=torch.Generator().manual_seed(seed)).to(dtype))


def same(a: ImageKV | None, b: ImageKV) -> bool:
    return (
        a is not None
        and a.data.dtype == b.data.dtype
        and torch.equal(a.data.view(BITS[a.data.dtype]), b.data.view(BITS[b.data.dtype]))
    )


def files(folder: Path) -> set[str]:
    return {path.name.removesuffix(".safetensors") for path in folder.rglob("*") if path.is_file()}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def as_bf16(kv: ImageKV, path: Path) -> None:
    """The same bytes under the name of another type of number."""
    save_image_kv(kv, path, FINGERPRINT)
    save_file({"data": kv.data.view(torch.bfloat16)}, path, metadata_of(path))


class TestFile:
    @pytest.mark.parametrize("dtype", BITS)
    def test_comes_back_bit_for_bit(self, tmp_path, dtype):
        data = kv_of(0, dtype=dtype).data
        data.view(BITS[dtype])[0, 0, 0, 0, :4] = torch.tensor(
            [torch.iinfo(BITS[dtype]).min, 1, 2, 0], dtype=BITS[dtype]
        )  # −0, two subnormal numbers, 0
        for number, tensor in enumerate(
            (data, data.transpose(3, 4), torch.cat((data, data))[1:3])
        ):  # as it lies in memory, and otherwise
            path = tmp_path / f"{number}.safetensors"
            save_image_kv(ImageKV(tensor), path, FINGERPRINT)
            read = load_image_kv(path, FINGERPRINT)
            assert same(read, ImageKV(tensor)) and read.tokens == tensor.shape[3]
            assert torch.equal(
                load_file(path)["data"].view(BITS[dtype]), tensor.contiguous().view(BITS[dtype])
            )  # any reader of safetensors reads it
        assert files(tmp_path) == {"0", "1", "2"}  # no other files

    def test_what_was_loaded_does_not_change_with_its_file(self, tmp_path):
        path, kv = tmp_path / "a.safetensors", kv_of(0)
        save_image_kv(kv, path, FINGERPRINT)
        read = load_image_kv(path, FINGERPRINT)
        with open(path, "r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(bytes(64))
        assert same(read, kv)

    @pytest.mark.parametrize(
        ("spoil", "reason"),
        [
            (lambda path: path.unlink(), "cannot be read as an image KV"),
            (lambda path: path.write_bytes(b""), "cannot be read as an image KV"),
            (
                lambda path: path.write_text("an image of a cat, in words alone"),
                "cannot be read as an image KV",
            ),
            (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot be read as an image KV"),
            (lambda path: path.write_bytes(path.read_bytes()[:40]), "cannot be read as an image KV"),
            (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "cannot be read as an image KV"),
            (lambda path: (path.unlink(), path.mkdir()), "cannot be read as an image KV"),
            (
                lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x11"),
                "is damaged, its checksum is another",
            ),
            (lambda path: save_file(load_file(path), path), "has image KV format None; this version reads 3"),
            (
                lambda path: save_file(load_file(path), path, {"format": "2", "fingerprint": FINGERPRINT}),
                "has image KV format '2'; this version reads 3",
            ),
            (
                lambda path: save_file(
                    {"other": torch.zeros(2)}, path, {"format": "3", "fingerprint": FINGERPRINT, "key": ""}
                ),
                "cannot be read as an image KV",
            ),
            (
                lambda path: save_file(
                    load_file(path), path, {"format": "3", "fingerprint": FINGERPRINT, "key": ""}
                ),
                "is damaged, its checksum is another",
            ),
            (
                lambda path: save_file(
                    {"data": load_file(path)["data"].view(2, 2, 2, 8, 8)}, path, metadata_of(path)
                ),
                "is damaged, its checksum is another",
            ),
            (
                lambda path: as_bf16(kv_of(0, dtype=torch.float16), path),
                "is damaged, its checksum is another",
            ),
            (
                lambda path: save_image_kv(kv_of(0), path, OTHER),
                "was made by other weights or another preprocessing",
            ),
            (
                lambda path: save_image_kv(ImageKV(torch.zeros(2, 3, 1, 8, 16)), path, FINGERPRINT),
                r"holds \(2, 3, 1, 8, 16\) of torch.float32, not the keys and values",
            ),
            (
                lambda path: save_image_kv(ImageKV(torch.zeros(2, 2, 8, 16)), path, FINGERPRINT),
                r"holds \(2, 2, 8, 16\) of torch.float32, not the keys and values",
            ),
            (
                lambda path: save_image_kv(ImageKV(torch.zeros(2, 2, 1, 0, 16)), path, FINGERPRINT),
                r"holds \(2, 2, 1, 0, 16\) of torch.float32, not the keys and values",
            ),
            (
                lambda path: save_image_kv(kv_of(0), path, FINGERPRINT, "ab"),
                "holds another image than its name says",
            ),
            (
                lambda path: save_image_kv(
                    ImageKV(torch.zeros(2, 2, 1, 8, 16).to(torch.float8_e4m3fn)), path, FINGERPRINT
                ),
                r"of torch.float8_e4m3fn, not the keys and values",
            ),
            (
                lambda path: save_image_kv(ImageKV(torch.zeros(2, 2, 1, 8, 16).int()), path, FINGERPRINT),
                r"of torch.int32, not the keys and values",
            ),
            (
                lambda path: save_image_kv(
                    ImageKV(kv_of(0).data.index_fill(3, torch.tensor([5]), torch.nan)), path, FINGERPRINT
                ),
                "holds values that are not finite",
            ),
            (
                lambda path: save_image_kv(
                    ImageKV(kv_of(0, dtype=torch.float16).data.index_fill(3, torch.tensor([5]), -torch.inf)),
                    path,
                    FINGERPRINT,
                ),
                "holds values that are not finite",
            ),
        ],
    )
    def test_refusals(self, tmp_path, spoil, reason):
        path = tmp_path / "a.safetensors"
        save_image_kv(kv_of(0), path, FINGERPRINT)
        assert same(load_image_kv(path, FINGERPRINT), kv_of(0))
        spoil(path)
        with pytest.raises(UserError, match=reason) as caught:
            load_image_kv(path, FINGERPRINT)
        message = str(caught.value)
        assert (
            message.startswith(str(path))
            and message.endswith(": encode the image again")
            and "\n" not in message
        )

    def test_no_flipped_bit_gives_other_numbers(self, tmp_path):
        """Two bits of each byte, header included: refused, or (blanks at the header's end) the same."""
        path, kv = (
            tmp_path / "a.safetensors",
            ImageKV(torch.tensor([1.0, -2.0, 3.5, 4.0], dtype=torch.bfloat16).view(1, 2, 1, 2, 1)),
        )
        save_image_kv(kv, path, FINGERPRINT)
        whole, refused = path.read_bytes(), 0
        for index in range(len(whole)):
            for bit in (0, 5):
                path.write_bytes(whole[:index] + bytes([whole[index] ^ 1 << bit]) + whole[index + 1 :])
                try:
                    assert same(load_image_kv(path, FINGERPRINT), kv), (index, bit)
                except UserError:
                    refused += 1
        assert refused > 2 * len(whole) - 16

    def test_a_disk_that_refuses_says_so(self, tmp_path):
        with pytest.raises(UserError, match=r"a\.safetensors could not be written"):
            save_image_kv(kv_of(0), tmp_path / "missing" / "a.safetensors", FINGERPRINT)


class TestOrigin:
    def test_every_tensor_of_the_left_tower_changes_it_and_none_of_the_right(self, model):
        before = image_kv_fingerprint(model)
        assert len(bytes.fromhex(before)) == 16
        seen = {before}
        for tensor in (*model.left.parameters(), *model.left.buffers()):
            with torch.no_grad():
                old = tensor.flatten()[-1].item()
                tensor.view(-1)[-1] += 1
                seen.add(image_kv_fingerprint(model))
                tensor.view(-1)[-1] = old
        assert len(seen) == 1 + len([*model.left.parameters(), *model.left.buffers()])
        assert image_kv_fingerprint(model) == before
        with torch.no_grad():
            for parameter in model.right.parameters():
                parameter.add_(1)
        assert image_kv_fingerprint(model) == before

    def test_settings_and_types_of_number_change_it(self, tokenizer, model):
        c = TINY_MODEL
        configs = [
            replace(c, left_attention="bidirectional"),
            replace(c, image_isolation=False),
            replace(c, vision=replace(c.vision, normalize="unit")),
            replace(c, vision=replace(c.vision, max_side=128)),
            replace(c, left=replace(c.left, rope_theta=500.0)),
        ]
        origins = {image_kv_fingerprint(tiny_model(tokenizer, config)) for config in configs}
        assert (
            len(
                origins
                | {
                    image_kv_fingerprint(model),
                    image_kv_fingerprint(tiny_model(tokenizer, seed=1)),
                    image_kv_fingerprint(tiny_model(tokenizer).bfloat16()),
                }
            )
            == len(configs) + 3
        )
        assert image_kv_fingerprint(
            tiny_model(tokenizer, replace(c, right=replace(c.right, rope_theta=500.0)))
        ) == image_kv_fingerprint(model)

    def test_a_saved_model_keeps_it(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        assert image_kv_fingerprint(DualTowerVLM.from_pretrained(tmp_path)) == image_kv_fingerprint(model)


class TestMemory:
    def test_the_longest_unused_is_evicted_first(self):
        store, kvs = ImageStore(memory_bytes=3 * 2048), {key: kv_of(i) for i, key in enumerate("abcde")}
        for key in "abc":
            store.put(key, kvs[key])
        assert store.get("a") is kvs["a"]
        store.put("d", kvs["d"])
        assert (
            [key for key in "abcd" if store.get(key) is kvs[key]] == ["a", "c", "d"]
            and store.get("b") is None
            and len(store) == 3
        )
        store.put("a", kvs["a"])  # a use, too
        store.put("e", kvs["e"])
        assert [key for key in "abcde" if store.get(key) is not None] == ["a", "d", "e"]

    def test_bytes_are_counted_not_images(self):
        store = ImageStore(memory_bytes=4096)
        store.put("a", kv_of(0, tokens=4))
        store.put("b", kv_of(1, tokens=8))
        store.put("c", kv_of(2, tokens=4))  # 1024 + 2048 + 1024: just fits
        assert len(store) == 3
        store.put("d", kv_of(3, tokens=1))
        assert len(store) == 3 and store.get("a") is None
        store.put(
            "b", kv_of(1, tokens=3)
        )  # smaller than the one it replaces: 256 + 1024 + 768, so that 2048 fit
        store.put("e", kv_of(4, tokens=8))
        assert len(store) == 4 and store.get("b").tokens == 3
        store.put("f", kv_of(5, tokens=8, dtype=torch.bfloat16))  # 1024 bytes: as many as c holds
        assert [key for key in "abcdef" if store.get(key) is not None] == ["b", "d", "e", "f"]

    def test_larger_than_the_cap_is_not_stored_and_evicts_nothing(self):
        store = ImageStore(memory_bytes=2048)
        store.put("a", kv_of(0))
        store.put("b", kv_of(1, tokens=9))
        assert store.get("b") is None and store.get("a") is not None


class TestDisk:
    def store(self, folder, **options) -> ImageStore:
        """Without memory, so that every hit comes from the disk; `messages` collects its lines."""
        self.messages = []
        return ImageStore(
            **{"memory_bytes": 0, "folder": folder, "fingerprint": FINGERPRINT, "say": self.messages.append}
            | options
        )

    def test_another_process_finds_it(self, tmp_path):
        kv = kv_of(0, dtype=torch.bfloat16)
        self.store(tmp_path / "new" / "folder").put("a1", kv)
        assert [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()] == [
            Path("new/folder") / FINGERPRINT / "a1.safetensors"
        ]
        again = self.store(tmp_path / "new" / "folder", memory_bytes=1 << 20)
        assert len(again) == 0 and same(again.get("a1"), kv) and len(again) == 1
        (tmp_path / "new" / "folder" / FINGERPRINT / "a1.safetensors").unlink()
        assert same(again.get("a1"), kv)  # from memory by now
        assert again.get("b2") is None and not self.messages

    def test_the_longest_unused_is_evicted_first_and_bytes_hold(self, tmp_path):
        cap = 3 * (2048 + 1024) + 100  # three files, not four
        store = self.store(tmp_path, disk_bytes=cap)
        for i, key in enumerate("abc"):
            store.put(key, kv_of(i))
        assert files(tmp_path) == {"a", "b", "c"}
        assert store.get("a") is not None
        store.put("d", kv_of(3))
        assert files(tmp_path) == {"a", "c", "d"} and size(tmp_path) <= cap
        store.put("b19", kv_of(4, tokens=16))  # 4096 bytes: two make room
        assert files(tmp_path) == {"d", "b19"} and size(tmp_path) <= cap
        store.put("fff", kv_of(5, tokens=64))  # larger than the cap
        assert (
            files(tmp_path) == {"d", "b19"}
            and store.get("fff") is None
            and same(store.get("b19"), kv_of(4, tokens=16))
        )

    def test_many_files_never_exceed_the_cap(self, tmp_path, monkeypatch):
        """The folder is not looked through at every write: the count must hold in between."""
        monkeypatch.setattr(models.image_store, "SHARE", 8)
        cap, generator = 64 * 1024, torch.Generator().manual_seed(0)
        store = self.store(tmp_path, disk_bytes=cap)
        looked, look = [], store._scan
        monkeypatch.setattr(store, "_scan", lambda folder: looked.append(folder) or look(folder))
        for i in range(120):
            store.put(f"{i:x}", kv_of(i, tokens=int(torch.randint(1, 9, (), generator=generator))))
            assert size(tmp_path) <= cap
        retained = sorted(int(name, 16) for name in files(tmp_path))
        assert retained == list(range(120 - len(retained), 120)) and size(tmp_path) > cap * 0.8
        assert len(looked) < 60

    def test_a_file_used_since_the_folder_was_looked_through_stays(self, tmp_path, monkeypatch):
        monkeypatch.setattr(models.image_store, "SHARE", 1)
        store = self.store(tmp_path, disk_bytes=3 * (2048 + 1024) + 100)
        for i, key in enumerate("abcd"):
            store.put(key, kv_of(i))
        assert files(tmp_path) == {"b", "c", "d"}
        store.get("b")
        store.put("e", kv_of(4))
        assert files(tmp_path) == {"b", "d", "e"}

    def test_a_hit_in_memory_is_a_use_on_disk(self, tmp_path):
        store = self.store(tmp_path, memory_bytes=1 << 20, disk_bytes=2 * (2048 + 1024))
        store.put("a", kv_of(0))
        store.put("b", kv_of(1))
        store.get("a")
        store.put("c", kv_of(2))
        assert files(tmp_path) == {"a", "c"}

    def test_two_stores_share_a_folder_and_its_cap(self, tmp_path):
        cap = 3 * (2048 + 1024)
        one, two = (
            self.store(tmp_path, disk_bytes=cap, fingerprint=fingerprint)
            for fingerprint in (FINGERPRINT, FINGERPRINT)
        )
        other = self.store(tmp_path, disk_bytes=cap, fingerprint=OTHER)
        one.put("a", kv_of(0))
        two.put("b", kv_of(1))
        other.put("a", kv_of(2))  # another model's image KV of the same image
        assert (
            same(two.get("a"), kv_of(0))
            and same(one.get("b"), kv_of(1))
            and same(other.get("a"), kv_of(2))
            and other.get("b") is None
        )
        assert {p.name for p in tmp_path.iterdir()} == {FINGERPRINT, OTHER}
        one.get("a")
        two.put("c", kv_of(3))  # b is the oldest, though one wrote it not
        assert files(tmp_path / FINGERPRINT) == {"a", "c"} and files(tmp_path / OTHER) == {"a"}
        two.put("d", kv_of(4))  # now it is the other model's
        assert files(tmp_path / FINGERPRINT) == {"a", "c", "d"} and not files(tmp_path / OTHER)
        assert other.get("a") is None and size(tmp_path) <= cap and not self.messages

    def test_vanished_files_are_misses(self, tmp_path):
        cap = 2 * (2048 + 1024)
        store = self.store(tmp_path, disk_bytes=cap)
        store.put("a", kv_of(0))
        store.put("b", kv_of(1))
        for path in list((tmp_path / FINGERPRINT).iterdir()):
            path.unlink()
        assert store.get("a") is None
        store.put("c", kv_of(2))
        store.put("d", kv_of(3))
        (tmp_path / FINGERPRINT / "c.safetensors").unlink()
        (tmp_path / FINGERPRINT / "d.safetensors").unlink()
        (tmp_path / FINGERPRINT).rmdir()
        store.put("e", kv_of(4))
        assert files(tmp_path) == {"e"} and not self.messages

    @pytest.mark.parametrize(
        ("spoil", "why"),
        [
            (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read as an image KV"),
            (
                lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x3c" + path.read_bytes()[-8:]),
                "is damaged, its checksum is another",
            ),
            (lambda path: save_image_kv(kv_of(0), path, OTHER, "a"), "was made by other weights"),
            (
                lambda path: save_image_kv(kv_of(0), path, FINGERPRINT, "b"),
                "holds another image than its name says",
            ),
        ],
    )
    def test_a_bad_file_is_a_miss_reported_once_and_deleted(self, tmp_path, spoil, why):
        store, path = self.store(tmp_path), tmp_path / FINGERPRINT / "a.safetensors"
        for _ in range(2):
            store.put("a", kv_of(0))
            assert same(store.get("a"), kv_of(0))
            spoil(path)
            assert store.get("a") is None and store.get("a") is None and not path.exists()
        assert (
            len(self.messages) == 1
            and str(path) in self.messages[0]
            and why in self.messages[0]
            and "\n" not in self.messages[0]
        )
        store.put("b", kv_of(1))
        assert same(store.get("b"), kv_of(1))  # the disk is still in use

    @pytest.mark.parametrize(
        "shape", [(3, 2, 1, 8, 16), (2, 2, 2, 8, 16), (2, 2, 1, 9, 16), (2, 2, 1, 8, 32)]
    )
    def test_a_file_of_another_shape_is_a_miss(self, tmp_path, shape):
        self.store(tmp_path).put("a", kv_of(0))
        assert same(self.store(tmp_path).get("a", (2, 2, 1, 8, 16)), kv_of(0)) and not self.messages
        assert (
            self.store(tmp_path).get("a", shape) is None
            and "holds (2, 2, 1, 8, 16) of torch.float32, not the keys and values of an image"
            in self.messages[0]
        )

    def test_lines_go_to_stderr_by_default(self, tmp_path, capsys):
        store = ImageStore(0, tmp_path, fingerprint=FINGERPRINT)
        (tmp_path / FINGERPRINT / "a.safetensors").write_bytes(b"")
        assert store.get("a") is None
        assert capsys.readouterr().err.startswith(f"warning: {tmp_path}")

    def test_a_whole_file_that_cannot_be_opened_stays(self, tmp_path):
        """Too many open files, say: nothing is wrong with it."""
        ImageStore(folder=tmp_path, fingerprint=FINGERPRINT).put("01", kv_of(1))
        lines: list[str] = []
        store, limits, held = (
            ImageStore(folder=tmp_path, fingerprint=FINGERPRINT, say=lines.append),
            resource.getrlimit(resource.RLIMIT_NOFILE),
            [],
        )
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
            with suppress(OSError):
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            assert store.get("01") is None
        finally:
            for number in held:
                os.close(number)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert (
            files(tmp_path) == {"01"}
            and len(lines) == 1
            and "goes on without" in lines[0]
            and "Too many open files" in lines[0]
        )
        assert same(ImageStore(folder=tmp_path, fingerprint=FINGERPRINT).get("01"), kv_of(1))

    def test_two_that_write_one_file_at_once_both_do(self, tmp_path):
        """Threads, or processes of two containers, which may have one number."""
        path = tmp_path / "a"
        with replacing(path) as one, replacing(path) as other:
            one.write_text("one")
            other.write_text("other")
        assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
        assert models.image_store.TEMPORARY.fullmatch(other.name.replace(".a.", ".0a.safetensors."))

    def test_an_impossible_folder_is_reported_once(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        store = self.store(tmp_path / "file", memory_bytes=1 << 20)
        store.put("a", kv_of(0))
        store.put("b", kv_of(1))
        assert len(self.messages) == 1 and f"goes on without {tmp_path / 'file'}" in self.messages[0]
        assert same(store.get("a"), kv_of(0)) and store.get("c") is None  # memory still serves

    def test_a_folder_that_becomes_a_file_is_reported_once(self, tmp_path):
        store = self.store(tmp_path / "folder", memory_bytes=1 << 20)
        store.put("a", kv_of(0))
        (tmp_path / "folder").rename(tmp_path / "away")
        (tmp_path / "folder").write_text("in the way")
        assert same(store.get("a"), kv_of(0)) and store.get("b") is None
        store.put("b", kv_of(1))
        store.put("c", kv_of(2))
        assert len(self.messages) == 1 and len(store) == 3

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
    def test_a_read_only_folder_is_read_then_reported_once(self, tmp_path):
        self.store(tmp_path).put("a", kv_of(0))
        (tmp_path / FINGERPRINT).chmod(0o555)
        try:
            store = self.store(tmp_path)
            assert same(store.get("a"), kv_of(0)) and not self.messages
            store.put("b", kv_of(1))
            store.put("c", kv_of(2))
            assert len(self.messages) == 1 and files(tmp_path) == {"a"}
        finally:
            (tmp_path / FINGERPRINT).chmod(0o755)

    def test_a_full_disk_is_reported_once_and_leaves_nothing_behind(self, tmp_path):
        store = self.store(tmp_path, memory_bytes=1 << 20)
        store.put("a", kv_of(0))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            store.put("b", kv_of(1))
            store.put("c", kv_of(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(self.messages) == 1 and "could not be written" in self.messages[0]
        assert files(tmp_path) == {"a"} and len(store) == 3

    def test_killed_runs_leave_nothing_and_other_files_are_let_be(self, tmp_path):
        (tmp_path / FINGERPRINT).mkdir()
        (tmp_path / "mine").mkdir()
        old, young = [".a.safetensors.17", ".tmpA1b2C3"], [".b.safetensors.18", ".tmpD4e5F6"]
        others = [
            tmp_path / "mine" / "abc.safetensors",
            tmp_path / FINGERPRINT / "model.safetensors",
            tmp_path / FINGERPRINT / ".tmp",
            tmp_path / FINGERPRINT / "notes.txt",
        ]
        for path in (*(tmp_path / FINGERPRINT / name for name in old + young), *others):
            path.write_bytes(bytes(2000))
            os.utime(path, (time.time() - (10 if path.name in young else 4000),) * 2)
        store = self.store(tmp_path, disk_bytes=2 * 2000 + 2 * (2048 + 1024))
        assert not any((tmp_path / FINGERPRINT / name).exists() for name in old)
        for i, key in enumerate(("a", "b", "c")):  # two fit next to what may still be being written
            store.put(key, kv_of(i))
        assert files(tmp_path / FINGERPRINT) == {"b", "c", *young, "model", ".tmp", "notes.txt"}
        assert all(path.exists() for path in others)

    def test_names_that_are_not_hex_never_reach_the_disk(self, tmp_path):
        with pytest.raises(ValueError, match="fingerprint '' is not in hex"):
            ImageStore(folder=tmp_path)
        with pytest.raises(ValueError, match="key '../a' is not in hex"):
            self.store(tmp_path).put("../a", kv_of(0))


class TestPredictor:
    settings = GenerationConfig(max_new_tokens=8)

    def asked(self) -> list:
        a, b, c = (Tiles((1, 1), random_tiles(1, seed)) for seed in range(3))
        return [
            ([a], "what color is the shape?"),
            ([b, c], "what is it?"),
            ([], "is it small?"),
            ([a], "is there a red circle in the image?"),
        ]

    @pytest.fixture(autouse=True)
    def watch(self, model, monkeypatch):
        """Blocks encoded at each call, and the tokens of every answer."""
        self.encoded, self.tokens = [], []
        encode, generate = model.encode_images, eval.predictor.generate
        monkeypatch.setattr(
            model,
            "encode_images",
            lambda tiles, blocks, images: self.encoded.append(len(blocks)) or encode(tiles, blocks, images),
        )
        monkeypatch.setattr(
            eval.predictor,
            "generate",
            lambda *a, **k: self.tokens.append((result := generate(*a, **k)).tokens) or result,
        )

    def test_an_image_kv_from_the_disk_answers_as_a_cold_one(self, model, renderer, tmp_path):
        for store in (
            None,
            *(
                ImageStore(memory_bytes=0, folder=tmp_path, fingerprint=image_kv_fingerprint(model))
                for _ in range(2)
            ),
        ):
            answers = Predictor(model, renderer, store).answer(self.asked(), self.settings)
            if store is None:
                assert [a.image_kv for a in answers] == ["computed", "computed", "none", "reused"]
        assert [a.image_kv for a in answers] == ["reused", "reused", "none", "reused"]
        assert self.encoded == [3, 3]  # not by the third
        assert (
            self.tokens[0] == self.tokens[1] == self.tokens[2]
            and all(self.tokens[0])
            and len({tuple(row) for row in self.tokens[0]}) == 4
        )

    def test_changed_weights_do_not_find_the_old_ones(self, model, renderer, tmp_path):
        asked = self.asked()[:1]
        Predictor(
            model, renderer, ImageStore(folder=tmp_path, fingerprint=image_kv_fingerprint(model))
        ).answer(asked, self.settings)
        with torch.no_grad():
            model.left.modality_projector.proj.weight.mul_(-1)
        expected = Predictor(model, renderer).answer(asked, self.settings)
        answers = Predictor(
            model, renderer, ImageStore(folder=tmp_path, fingerprint=image_kv_fingerprint(model))
        ).answer(asked, self.settings)
        assert (
            [a.image_kv for a in answers] == ["computed"]
            and answers[0].text == expected[0].text
            and self.tokens[0] != self.tokens[1]
        )

    def test_a_damaged_file_costs_an_encode_and_nothing_else(self, model, renderer, tmp_path):
        messages = []
        for _ in range(2):
            store = ImageStore(folder=tmp_path, fingerprint=image_kv_fingerprint(model), say=messages.append)
            kinds = [
                a.image_kv for a in Predictor(model, renderer, store).answer(self.asked()[:2], self.settings)
            ]
            path = sorted(
                (tmp_path / image_kv_fingerprint(model)).iterdir(), key=lambda p: p.stat().st_mtime_ns
            )[0]
            path.write_bytes(path.read_bytes()[:-5])
        assert (
            kinds == ["computed", "reused"]
            and self.encoded == [3, 1]
            and self.tokens[0] == self.tokens[1]
            and len(messages) == 1
        )

    def test_a_store_without_room_still_serves_the_batch(self, model, renderer):
        asked = self.asked()
        expected = [a.text for a in Predictor(model, renderer).answer(asked, self.settings)]
        for capacity in (0, 1500):
            store = ImageStore(memory_bytes=capacity)
            answers = Predictor(model, renderer, store).answer(asked, self.settings)
            assert [a.text for a in answers] == expected and [a.image_kv for a in answers] == [
                "computed",
                "computed",
                "none",
                "reused",
            ]
            assert sum(kv.data.nbytes for kv in store.memory.values()) == store.bytes <= capacity
        assert self.encoded == [3, 3, 3]

    def test_the_key_knows_bytes_shape_ids_images_and_precision(self, model, renderer):
        predictor = Predictor(model, renderer)
        ids = renderer.image_block()
        tiles, images = random_tiles(1), [0] * len(ids)
        first = ImageBlock(tiles, ids, images, 0)
        darker = tiles.clone()
        darker[0, 2, 63, 63] ^= 1
        others = [
            ImageBlock(darker, ids, images, 0),
            ImageBlock(tiles.view(1, 3, 32, 128), ids, images, 0),
            ImageBlock(tiles, [ids[0] + 1, *ids[1:]], images, 0),
            ImageBlock(tiles, ids, [1] * len(ids), 0),
        ]
        for block in (first, *others):
            assert predictor.encode([block])[1] == [True]
        assert (
            predictor.encode([first, *others, first._replace(start=7, tiles=tiles.clone())])[1] == [False] * 6
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert predictor.encode([first, first])[1] == [True, False]
        assert self.encoded == [1] * 6

    def test_an_image_kv_of_another_model_is_refused(self, model, renderer):
        """Fewer layers, more heads, larger heads: none is read as if it were this model's."""
        prompt, config = renderer.prompt(ask("what is it?", 1), [(1, 1)]), model.right.config
        batch = {"ids": torch.tensor([prompt.right_ids]), "positions": torch.tensor([prompt.right_positions])}
        settings, shape = (
            GenerationConfig(max_new_tokens=1),
            [config.layers, 2, config.kv_heads, 5, config.head_size],
        )
        generate(model, images=[[(ImageKV(torch.zeros(shape)), 0)]], turn_end=-1, settings=settings, **batch)
        for axis, other in ((0, 1), (2, 2 * config.kv_heads), (4, 2 * config.head_size)):
            with pytest.raises(UserError, match="of another model"):
                generate(
                    model,
                    images=[[(ImageKV(torch.zeros([*shape[:axis], other, *shape[axis + 1 :]])), 0)]],
                    turn_end=-1,
                    settings=settings,
                    **batch,
                )

    def test_vanilla_models_leave_it_empty(self, tokenizer):
        config = replace(TINY_MODEL, left_context="none")
        store = ImageStore()
        answers = Predictor(
            tiny_model(tokenizer, config), Renderer(tokenizer, config.tokens_per_tile, "none"), store
        ).answer(self.asked(), self.settings)
        assert [a.image_kv for a in answers] == ["none"] * 4 and len(store) == 0
