"""Memory of the training process: fragments are returned, and a run's memory stays flat and as estimated.

Each case runs in a process of its own, because memory that other tests freed would be used first.
"""

import ctypes
import json
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.trial import MARKERS, SIZES, make_config
from configs.model import Vocabulary
from models.dual_tower.dual_tower import DualTowerVLM
from training.memory import OVERHEAD, step_memory
from training.process_memory import GROWTH, FreedMemory, resident_bytes

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

# A step needs 128 MB in tensors of one size. Every eighth is retained, and the next size fits into no hole.
FRAGMENTS = """
import json, sys
import torch
from training.process_memory import FreedMemory, resident_bytes
torch.set_num_threads(1)
memory, retained, held = FreedMemory(torch.device("cpu")), [], [resident_bytes()]
for size in (1 << 14, 1 << 17, 1 << 20, 1 << 23):
    for step in range(4):
        work = [torch.ones(size, dtype=torch.uint8) for _ in range((1 << 27) // size)]
        if step == 0:
            retained += work[::8]
        del work
        if sys.argv[1] == "returned":
            memory.after_step()
        held.append(resident_bytes())
print(json.dumps(held))
"""

# Batches of one to six documents, an evaluation every ten steps, a save every fifty.
TRAINING = """
import json, random, sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
import torch
from benchmarks.trial import MARKERS, SIZES, make_config, standard_row
from configs.model import Vocabulary
from models.dual_tower.dual_tower import DualTowerVLM
from training.logging import RunLog
from training.process_memory import resident_bytes
from training.callbacks import Callback
from training.trainer import Trainer

torch.set_num_threads(1)
config, vocabulary = make_config("dual_tower", SIZES["tiny"], "fp32"), Vocabulary(SIZES["tiny"].text, MARKERS)
settings = replace(config.train, device="cpu", eval_every=10, checkpoint_every=50, diagnostics_every=0)
config = replace(config, max_steps=150, train=settings)
model, folder = DualTowerVLM(config.model, vocabulary), Path(sys.argv[1])
row, number, held = standard_row(config.model, vocabulary), random.Random(0), []

def documents(count):
    left, right = row["left_images"][0] < count, row["right_documents"][0] < count
    streams = {n: c[:, left if n.startswith("left") else right] for n, c in row.items() if n != "tiles"}
    return streams | {"tiles": row["tiles"][:count]}

class Batches:
    def __next__(self): return documents(number.randint(1, 6))
    def state(self): return {}
    def load_state(self, states): pass
    def sources(self): return []
    def dropped(self): return Counter()
    def examples(self): return {}
    def samples(self): return []
    def close(self): pass

class Evaluation(Callback):
    def evaluate(self, trainer):
        model(**row)
        held.append(resident_bytes())
        return {}

Trainer(config, model, Batches(), folder, RunLog(folder, silent=True), [Evaluation()]).train()
print(json.dumps(held))
"""


def run(program: str, argument: str) -> list[int]:
    command = [sys.executable, "-c", program, argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held: list[int] = json.loads(done.stdout.splitlines()[-1])
    return held


has_glibc = pytest.mark.skipif(FreedMemory(CPU).libc is None, reason="the C library is not glibc")


@has_glibc
def test_fragments_are_returned():
    """Where all freed memory is kept, the same steps hold twice as much as they need, and more."""
    needed = (1 << 27) + 4 * (1 << 24)
    (before, *_, kept), (before_too, *_, returned) = run(FRAGMENTS, "kept"), run(FRAGMENTS, "returned")
    assert kept - before > 2 * needed and returned < 1.02 * GROWTH * (before_too + needed)


def test_a_run_holds_what_the_estimate_says(tmp_path):
    """After the first 50 of 150 steps, a run does not grow; it never holds 1.2 times the estimate."""
    held = run(TRAINING, str(tmp_path))
    assert len(held) == 15 and max(held[5:]) < 1.02 * max(held[:5]), held
    config, vocabulary = (
        make_config("dual_tower", SIZES["tiny"], "fp32"),
        Vocabulary(SIZES["tiny"].text, MARKERS),
    )
    parts = step_memory(config, DualTowerVLM, vocabulary, 1, save=True)
    assert max(held) < 1.2 * (OVERHEAD + sum(parts.values()))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_nothing_is_done_on_a_gpu_or_without_glibc(monkeypatch, device):
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    memory = FreedMemory(torch.device(device))
    memory.after_step()
    assert memory.libc is None


@has_glibc
def test_pages_are_returned_when_the_process_has_grown(monkeypatch):
    """The limit follows what a step needed after a return, and never falls."""
    memory, returns, sizes = FreedMemory(CPU), [], [100, 50, 54, 56, 40, 54, 50, 57]
    calls = iter(sizes)
    monkeypatch.setattr("training.process_memory.resident_bytes", lambda: next(calls))
    memory.libc = type("Libc", (), {"malloc_trim": lambda self, pad: returns.append(step)})()
    for step in range(len(sizes)):  # noqa: B007 (malloc_trim reads it)
        memory.after_step()
    assert returns == [0, 3, 7] and memory.limit == GROWTH * 50


def test_resident_bytes_is_the_size_of_a_process():
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    before, size = resident_bytes(), 1 << 26
    with mmap.mmap(-1, size) as pages:
        pages.write(bytes(size))
        assert resident_bytes() - before > 0.9 * size
    assert resident_bytes(1 << 30) == 0  # no such process
