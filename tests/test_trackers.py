"""Trackers, read back from their own files and servers.

W&B's offline file and a server on loopback, TensorBoard's events. W&B reads
the environment when they are imported, so each of their runs has its own process.
"""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import trackers
from training.trackers import Trackers, flatten, is_code
from utils.errors import UsageError, UserError

ROOT = Path(__file__).parent.parent
KEY = "0123456789" * 4
LINES = [
    *(
        {
            "step": i,
            "loss": 1 / i,
            "lr": {"vision": 0.001, "left": i / 10},
            "head_losses": [2.0, 3.0],
            "note": "x",
            "nothing": None,
        }
        for i in range(1, 6)
    ),
    {
        "step": 3,
        "validation_loss": 0.5,
        "mmstar.v1_average": 0.25,
        "validation_dropped": {"vqa: image_broken": 2},
    },  # late: step 5 was logged already
]
COUNTS, EDGES = np.array([1, 5, 2]), np.array([-1.0, 0.0, 1.0, 2.0])
CONFIG = {"max_steps": 5, "train": {"lr": 0.1}, "sources": ["a", None]}


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"the group {package} is not installed")


def drive(names: str, folder: str, resumed_from: int | None = None, now: str = "") -> None:
    """A run with trackers: five steps, a validation, a histogram, predictions, an image.

    `now` is done after the first half: a URL is requested, or "kill" ends W&B's process.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (900, 600), "red").save(path / "image.png")
    Image.new("RGB", (80, 40), "blue").save(path / "sheet.png")
    rows = [
        {
            "image": str(path / "image.png"),
            "question": "what | is\nit?",
            "answer": "red",
            "prediction": "blue",
        },
        {"image": "", "question": "1+1?", "answer": "2", "prediction": "2"},
    ]
    session = Trackers(names, path, CONFIG, print, resumed_from)
    for line in LINES:
        session.metrics(line)
    if now == "kill":
        subprocess.run(["pkill", "-KILL", "-P", str(os.getpid()), "wandb-core"], check=True)
        time.sleep(0.5)
    elif now:
        time.sleep(1)
        urllib.request.urlopen(now)
    session.metrics({"step": 6, "loss": 0.1})
    session.histograms(3, {"gates": (COUNTS, EDGES)})
    began = time.monotonic()
    session.predictions(3, rows, path / "sheet.png")
    assert time.monotonic() - began < 12  # W&B asks its server about tables, and waits
    session.picture(3, "tokens", path / "sheet.png")
    session.close(True)


# Torch takes seconds to import; W&B needs it for nothing.
LIGHT = (
    "import sys, types, PIL.Image as p; sys.modules['data.images'] = "
    "types.SimpleNamespace(open_image=lambda path: p.open(path).convert('RGB')); "
)


def run(folder: Path, names: str, *arguments: object, seconds: float = 60, **environment: str) -> str:
    """Run `drive` in its own process and home, on a terminal; returns its output.

    On a terminal W&B could ask for a key. The process must exit with 0 within `seconds`.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "HF_", "PYTEST"))}
    env |= {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "HOME": str(folder.parent / "home"),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    env = {k: v for k, v in env.items() if not (k == "NETRC" or k.startswith("XDG_"))}
    master, slave = pty.openpty()
    call = (
        f"{LIGHT}import test_trackers; "
        f"test_trackers.drive({', '.join(map(repr, (names, str(folder), *arguments)))})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", call],
        env=env,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=folder.parent,
        start_new_session=True,
    )
    os.close(slave)
    out = bytearray()

    def read() -> None:
        try:
            while part := os.read(master, 65536):
                out.extend(part)
        except OSError:  # how a terminal whose other end is closed ends
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    reader.join(5)
    os.close(master)
    text = out.decode().replace("\r\n", "\n")
    assert code == 0 and "Traceback" not in text, text
    return text


def test_names():
    assert Trackers.check("") == Trackers.check(" , ") == []
    with pytest.raises(UsageError, match=r"no tracker 'wandbb' \(did you mean 'wandb'\?\)"):
        Trackers.check("wandbb")
    with pytest.raises(UsageError, match="no tracker 'x'"):
        Trackers.check("x")


def test_packages_are_checked_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # a folder of that name is no package
    monkeypatch.syspath_prepend(tmp_path)

    def installed(name: str) -> str:
        if name not in versions:
            raise trackers.PackageNotFoundError(name)
        return versions[name]

    versions = {"wandb": "0.25.0", "tensorboard": "2.100.dev3"}
    monkeypatch.setattr(trackers, "version", installed)
    assert Trackers.check("tensorboard, tensorboard,") == ["tensorboard"]
    with pytest.raises(UserError, match=r"wandb 0.25.0 is too old.*pip install -e '.\[wandb\]'"):
        Trackers.check("tensorboard,wandb")
    del versions["wandb"]
    with pytest.raises(UserError, match=r"the package wandb is not installed.*pip install -e '.\[wandb\]'"):
        Trackers("wandb", tmp_path / "run", CONFIG, print, None)
    assert not (tmp_path / "run").exists()


def test_the_oldest_versions_are_those_of_the_project_file():
    groups = dict(re.findall(r'^(\w+) = \["\1>=([\d.]+)"\]$', (ROOT / "pyproject.toml").read_text(), re.M))
    assert {name: groups.get(name, oldest) for name, oldest in trackers.OLDEST.items()} == trackers.OLDEST


def test_flatten():
    line = {
        "step": 3,
        "loss": 1.5,
        "lr": {"vision": 0.1, "left": 0},
        "head_losses": [2.0, 3.0],
        "skipped": "loss nan",
        "grad_norm": None,
        "done": True,
        "empty": {},
        "tokens": 7,
    }
    assert flatten(line) == {
        "loss": 1.5,
        "lr/vision": 0.1,
        "lr/left": 0,
        "head_losses/1": 2.0,
        "head_losses/2": 3.0,
        "tokens": 7,
    }


class Recorder:
    """A tracker that notes its calls, and fails in `fails`."""

    fails = ""

    def __init__(self, folder, say):
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            if name == self.fails:
                raise RuntimeError("no\nspace left")

        return call


class Failing(Recorder):
    pass


@pytest.mark.parametrize("fails", ["start", "metrics", "histograms", "predictions", "picture", "close"])
def test_one_that_fails_is_left_out(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(trackers, "TRACKERS", {"bad": Failing, "good": Recorder})
    monkeypatch.setattr(trackers, "OLDEST", {"bad": "1.0", "good": "1.0"})
    monkeypatch.setattr(trackers, "version", lambda name: "1.0.2")
    monkeypatch.setattr(Failing, "fails", fails)
    messages = []
    session = Trackers("bad,good", tmp_path, CONFIG, messages.append, None)
    good = session.open["good"]
    for step in (1, 2):
        session.metrics({"step": step, "loss": 1.0})
        session.histograms(step, {})
        session.predictions(step, [], None)
        session.picture(step, "tokens", tmp_path)
    session.close(True)
    session.close(True)
    assert messages == ["warning: bad: no space left — logging to it stops, metrics.jsonl goes on"]
    assert good.calls == ["start", *["metrics", "histograms", "predictions", "picture"] * 2, "close"]


def test_code_is_the_repository_s_alone():
    files = {str(f.relative_to(ROOT)) for f in ROOT.rglob("*") if f.is_file() and is_code(str(f), str(ROOT))}
    assert {
        "train_dual_tower.py",
        "train.sh",
        "training/trackers.py",
        "models/dual_tower/dual_tower.py",
    } <= files
    assert {Path(f).suffix for f in files} == {".py", ".sh"}
    assert {f.split("/")[0] for f in files if "/" in f} <= {*trackers.PACKAGES, *trackers.REPOSITORY_FOLDERS}


def test_code_of_an_installed_project_is_its_packages_alone(tmp_path):
    files = ("training/trackers.py", "six.py", "tests/test_six.py", "torch/nn.py", "training/README.md")
    assert [f for f in files if is_code(str(tmp_path / f), str(tmp_path))] == ["training/trackers.py"]


@needs("wandb")
def test_wandb_reads_the_key_of_netrc(tmp_path):
    with server() as wandb:
        (tmp_path / "home").mkdir()
        netrc = tmp_path / "home" / ".netrc"
        netrc.write_text(f"machine {wandb.address.removeprefix('http://')} login user password {KEY}\n")
        environment = {name: value for name, value in SHORT.items() if name != "WANDB_API_KEY"}
        text = run(tmp_path / "run", "wandb", WANDB_BASE_URL=wandb.address, **environment)
    assert text.startswith(f"wandb: {wandb.address}/e/p/runs/") and "warning:" not in text


@needs("tensorboard")
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drive("tensorboard", str(tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {key for line in LINES for key in flatten(line)}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (i, pytest.approx(1 / i)) for i in range(1, 6)
    ] + [(6, pytest.approx(0.1))]
    assert [(e.step, e.value) for e in events.Scalars("mmstar.v1_average")] == [(3, 0.25)]
    histogram = events.Histograms("gates")[0].histogram_value
    assert (histogram.min, histogram.max, histogram.num, histogram.bucket, histogram.bucket_limit) == (
        -1,
        2,
        8,
        [1, 5, 2],
        [0, 1, 2],
    )
    for name in ("predictions", "tokens"):
        image = events.Images(name)[0]
        assert (image.step, image.width, image.height) == (3, 80, 40)
    text = {
        tag: events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
        for tag in ("config", "predictions")
    }
    assert json.loads(text["config"]) == CONFIG
    assert text["predictions"].split("\n")[2:] == ["what \\| is it? | red | blue", "1+1? | 2 | 2"]


@needs("tensorboard")
def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def losses() -> list[tuple]:
        return [
            (e.step, e.value)
            for e in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
        ]

    def steps(first: int, last: int, value: float, resumed_from: int | None) -> None:
        session = Trackers("tensorboard", tmp_path, CONFIG, print, resumed_from)
        for step in range(first, last + 1):
            session.metrics({"step": step, "loss": value})
        session.close(False)

    steps(1, 9, 1.0, None)
    steps(9, 10, 2.0, 8)
    assert losses() == [(i, 1.0) for i in range(1, 9)] + [(9, 2.0), (10, 2.0)]
    steps(1, 2, 3.0, None)  # killed before its first checkpoint, and begun anew
    assert losses() == [(1, 3.0), (2, 3.0)]


def records(path: Path) -> Iterator:
    """The records of W&B's file of a run.

    After 7 bytes, LevelDB's log format: blocks of 32 KiB, of records with checksum, length and kind (whole,
    first, middle, last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def history(path: Path) -> list[dict]:
    """Without W&B's own keys."""
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in records(path)
        if r.HasField("history")
    ]
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]


@needs("wandb")
def test_wandb_offline(tmp_path):
    """On a terminal and without a key: no prompt, no request, one line of output.

    All files are in the run folder. A resumed run has the same id.
    """
    folder = tmp_path / "a run"
    with server() as wandb:
        text = run(folder, "wandb", WANDB_BASE_URL=wandb.address)
        (before,) = folder.glob("wandb/offline-run-*/*.wandb")
        text += run(folder, "wandb", 2, WANDB_BASE_URL=wandb.address)
    assert wandb.seen == []
    assert (
        text
        == (
            "wandb: no API key (WANDB_API_KEY, or `wandb login`): kept offline; "
            f"send it with: wandb sync '{folder}'/wandb/offline-run-*\n"
        )
        * 2
    )
    assert not list((tmp_path / "home").glob("**/staging/*")) and not (tmp_path / "wandb").exists()
    name = (folder / "wandb_id").read_text().strip()
    assert [path.name for path in folder.glob("wandb/offline-run-*/*.wandb")] == [f"run-{name}.wandb"] * 2
    rows = history(before)
    assert rows[:5] == [{"step": line["step"]} | flatten(line) for line in LINES[:5]]
    assert rows[5] == {"step": 3, "validation_step": 3} | flatten(LINES[5])
    assert rows[6] == {"step": 6, "loss": 0.1}
    assert rows[7] == {
        "step": 3,
        "gates._type": "histogram",
        "gates.values": COUNTS.tolist(),
        "gates.bins": EDGES.tolist(),
    }
    assert (
        rows[8].items()
        >= {"validation_step": 3, "predictions._type": "table-file", "predictions.nrows": 2}.items()
    )
    assert (
        rows[9].items()
        >= {
            "validation_step": 3,
            "tokens._type": "image-file",
            "tokens.width": 80,
            "tokens.height": 40,
        }.items()
    )
    entries = list(records(before))
    axes = {
        r.metric.name or r.metric.glob_name: r.metric.step_metric for r in entries if r.HasField("metric")
    }
    late = dict.fromkeys([*flatten(LINES[5]), "predictions", "tokens"], "validation_step")
    assert axes == {"step": "", "validation_step": "", "*": "step"} | late
    (start,) = [r.run for r in entries if r.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert (start.run_id, start.project, start.display_name) == (
        name,
        "dualtowervlm",
        "a run",
    ) and config.items() >= CONFIG.items()
    code, table = [r.artifact for r in entries if r.HasField("artifact")]
    assert {Path(c.path).suffix for c in code.manifest.contents} == {
        ".py",
        ".sh",
    } and "training/trackers.py" in {c.path for c in code.manifest.contents}
    (image,) = [c for c in table.manifest.contents if c.path.endswith(".png")]
    assert Image.open(image.local_path).size == (512, 341) and folder in Path(image.local_path).parents


@needs("wandb")
def test_wandb_disabled(tmp_path):
    assert run(tmp_path / "run", "wandb", WANDB_MODE="disabled", WANDB_API_KEY=KEY) == "wandb: disabled\n"
    assert not (tmp_path / "run" / "wandb").exists()


class Server:
    """What it was asked: (path, GraphQL's operation, body)."""

    def __init__(self, address: str) -> None:
        self.address, self.seen, self.silent, self.ended = address, [], False, threading.Event()

    def operations(self) -> set[str]:
        return {operation for _, operation, _ in self.seen}


@contextmanager
def server() -> Iterator[Server]:
    """The part of W&B's server that a run needs, on loopback.

    It stops answering while `silent` is set, or once /silence was requested.
    """
    run = {
        "id": "1",
        "name": "name",
        "displayName": "name",
        "config": "{}",
        "historyLineCount": 0,
        "project": {"id": "2", "name": "p", "entity": {"id": "3", "name": "e"}},
    }
    answers = {
        "RunResumeStatus": {
            "model": {"id": "2", "name": "p", "entity": {"id": "3", "name": "e"}, "bucket": None}
        },
        "UpsertBucket": {"upsertBucket": {"bucket": run, "inserted": True}},
        "Viewer": {
            "viewer": {"id": "4", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}
        },
        "ArtifactType": {"project": {"artifact": None}},
        "CreateArtifact": {
            "createArtifact": {
                "artifact": {
                    "id": "5",
                    "state": "COMMITTED",
                    "artifactSequence": {"id": "6", "latestArtifact": {"id": "5", "versionIndex": 0}},
                }
            }
        },
        "CreateRunFiles": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}},
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
            match = (
                re.search(r"(?:query|mutation)\s+(\w+)", json.loads(body)["query"])
                if self.path == "/graphql"
                else None
            )
            here.seen.append((self.path, match[1] if match else "", body))
            if here.silent:
                here.ended.wait()
                return
            here.silent = self.path == "/silence"
            data = answers.get(match[1], {}) if match else {}
            if data and match[1] == "UpsertBucket":
                run["name"] = json.loads(body)["variables"]["name"]
            elif data and match[1] == "CreateRunFiles":
                data["createRunFiles"]["files"] = [
                    {"name": name, "uploadUrl": f"{here.address}/{name}"}
                    for name in json.loads(body)["variables"]["files"]
                ]
            reply = json.dumps({"data": data} if match else {}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_PUT = do_HEAD = do_POST

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:  # W&B ends without a goodbye
            pass

    http = Quiet(("127.0.0.1", 0), Handler)
    here = Server(f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        here.ended.set()
        http.shutdown()
        http.server_close()
        thread.join()


SHORT = {"WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "2", "WANDB_FINISH_TIMEOUT": "2"}


@needs("wandb")
@pytest.mark.parametrize("refused", [True, False])
def test_wandb_out_of_reach(tmp_path, refused):
    """Nobody at that port, or one who never answers: the run is stored offline, whole."""
    with server() as wandb:
        wandb.silent = True
        address = "http://127.0.0.1:1" if refused else wandb.address
        text = run(tmp_path / "run", "wandb", seconds=30, WANDB_BASE_URL=address, **SHORT)
    assert len(wandb.seen) == 0 if refused else len(wandb.seen) > 0
    assert re.fullmatch(
        f"wandb: Failed .*: kept offline; send it with: wandb sync {tmp_path}/run/wandb/offline-run-\\*\n",
        text,
    )
    (path,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    assert len(history(path)) == 10


@needs("wandb")
def test_wandb_online(tmp_path):
    with server() as wandb:
        text = run(tmp_path / "run", "wandb", WANDB_BASE_URL=wandb.address, **SHORT)
    assert (
        text.startswith(f"wandb: {wandb.address}/e/p/runs/{(tmp_path / 'run' / 'wandb_id').read_text()}")
        and "warning:" not in text
    )
    streamed = [
        json.loads(body)["files"]["wandb-history.jsonl"]["content"]
        for path, _, body in wandb.seen
        if path.endswith("/file_stream") and "wandb-history.jsonl" in body
    ]
    rows = [json.loads(row) for rows in streamed for row in rows]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 3, 6, 3, 3, 3] and [
        row["_step"] for row in rows
    ] == list(range(10))
    assert {"CreateArtifact", "CreateRunFiles"} <= wandb.operations()
    assert not (tmp_path / "home" / ".netrc").exists() and KEY not in "".join(body for *_, body in wandb.seen)


@needs("wandb")
def test_wandb_server_falls_silent(tmp_path):
    """The run continues, with its own time limits.

    Data that was not sent is complete on the disk, and a message says so.
    """
    with server() as wandb:
        text = run(
            tmp_path / "run",
            "wandb",
            None,
            f"{wandb.address}/silence",
            seconds=50,
            WANDB_BASE_URL=wandb.address,
            WANDB_API_KEY=KEY,
        )
    (path,) = tmp_path.glob("run/wandb/run-*/*.wandb")
    assert f"warning: wandb: not everything was sent; send it with: wandb sync {path.parent}\n" in text
    assert len(history(path)) == 10


@needs("wandb")
def test_wandb_s_process_dies(tmp_path):
    text = run(tmp_path / "run", "wandb", None, "kill", WANDB_MODE="offline")
    assert (
        len(re.findall("^warning: wandb: .* — logging to it stops, metrics.jsonl goes on$", text, re.M))
        == text.count("warning")
        == 1
    )
