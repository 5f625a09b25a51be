"""The commands of docs/serving.md are run against servers with a tiny model on loopback."""

import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import yaml
from PIL import Image

from configs.train import Config
from serve import make_parser
from tests.conftest import TINY_MODEL, lively_model, random_tiles
from tests.programs import Program, run_program
from training.export import export

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
QUESTION = {"type": "text", "text": "what color is the shape?"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.S | re.M)


CURLS = [block for block in blocks("bash") if block.startswith("curl")]
SERVERS = [
    line
    for block in blocks("bash")
    for line in block.splitlines()
    if line.startswith(".venv/bin/python serve.py")
]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    """An empty folder with a model where the page has one, and an image."""
    folder = tmp_path_factory.mktemp("serving")
    model = lively_model(tokenizer, TINY_MODEL)
    path = folder / "runs" / "dual_tower_easyvqa" / "model"
    path.parent.mkdir(parents=True)
    export(model, path, tokenizer, Config(model=model.config), folder)
    (folder / "photo.png").write_bytes(png())
    return folder


def png(seed: int = 0) -> bytes:
    data = io.BytesIO()
    Image.fromarray(random_tiles(1, seed)[0].permute(1, 2, 0).numpy()).save(data, "PNG")
    return data.getvalue()


def wait_for(address: str, running: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        assert running() and time.monotonic() < end, f"no server at {address}"
        with suppress(httpx.TransportError):
            if httpx.get(f"{address}/health").status_code == 200:
                return
        time.sleep(0.05)


@contextmanager
def server(command: str, folder: Path, **variables: str) -> Iterator[str]:
    """Run a command of the page at a free port until the end of the block → the address."""
    for name, value in variables.items():
        command = command.replace(f"${name}", value)
    port = free_port()
    script, *flags = shlex.split(command)[1:]
    program = Program([ROOT / script, *flags, "--host", "127.0.0.1", "--port", str(port)], folder)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, lambda: program.poll() is None, 60)
        yield address
    finally:
        program.process.terminate()
        done = program.wait()
    assert done.returncode in (0, -15), done.stderr


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    with server(SERVERS[0], folder) as address:
        yield address


def curl(block: str, address: str, folder: Path, key: str = "") -> str:
    code = f"KEY={key}\n" + block.replace("http://127.0.0.1:8000", address)
    done = subprocess.run(
        ["bash", "-euc", code.replace("curl -s", "curl -sS --fail-with-body")],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(address, folder):
    ask, models, metrics = CURLS
    assert '"finish_reason"' in curl(ask, address, folder)
    assert '"dual_tower_easyvqa"' in curl(models, address, folder)
    written = curl(metrics, address, folder)
    named = set(re.findall(r"dualtower_\w+", PAGE))
    assert len(named) >= 10 and [name for name in named if f"# HELP {name} " not in written] == []


def test_the_python_blocks(address, folder, tmp_path):
    """openai, LangChain, handles, a JSON schema and the header of image-affine routing."""
    code = "\n".join(blocks("python")).replace("http://127.0.0.1:8000", address)
    (tmp_path / "blocks.py").write_text(code, encoding="utf-8")
    done = run_program([tmp_path / "blocks.py"], folder)
    assert done.returncode == 0, done.stderr
    image = {"url": "data:;base64," + b64encode((folder / "photo.png").read_bytes()).decode()}
    first, second = (
        answer(address, [{"type": "image_url", "image_url": image}, {"type": "text", "text": text}])
        for text in (QUESTION["text"], "is there a circle?")
    )
    cached = 1 + TINY_MODEL.tokens_per_tile
    expected = f"{first}\n{first}\n{first} {cached}\n{second} {cached}\n"
    expected = re.sub("\r\n?", "\n", expected)  # as a file is read
    assert done.stdout.startswith(expected)
    assert re.fullmatch(r"color='(red|green|blue)'\n", done.stdout.removeprefix(expected))


def answer(address: str, content: list) -> str:
    body = {"messages": [{"role": "user", "content": content}]}
    chat = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    return chat["choices"][0]["message"]["content"]


def test_a_handle_is_valid_after_a_restart_and_on_every_replica(folder):
    """One process uploads and ends; another, with the same key and store, answers."""
    keyed, first, second = SERVERS[1:]
    handles = []
    for one, other, key in ((keyed, keyed, "secret"), (first, second, "none")):
        headers = {"Authorization": f"Bearer {key}"}
        with server(one, folder, KEY=key) as address:
            if one is keyed:
                assert httpx.get(f"{address}/v1/models").status_code == 401
                if shutil.which("curl"):
                    assert "dual_tower_easyvqa" in curl(CURLS[1], address, folder, key)
            image = httpx.post(f"{address}/v1/images", content=png(), headers=headers).json()
            handles.append(image["id"])
        content = [{"type": "image", "id": image["id"]}, QUESTION]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
        with server(other, folder, KEY=key) as address:
            chat = httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers).json()
            assert chat["dualtower"]["image_kv"] == "reused", chat
    assert len(set(handles)) == 2  # sealed with the key


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_sends_an_image_to_one_replica(folder, tmp_path):
    """And spreads requests without the header."""
    (config,) = blocks("nginx")
    with server(SERVERS[0], folder) as one, server(SERVERS[0], folder) as other:
        address = f"127.0.0.1:{free_port()}"
        for in_page, real in (
            ("127.0.0.1:8001", one),
            ("127.0.0.1:8002", other),
            ("listen 8000", f"listen {address}"),
        ):
            config = config.replace(in_page, real.removeprefix("http://"))
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        main = "daemon off; master_process off; pid nginx.pid; error_log stderr; events {}"
        http = "access_log off;" + "".join(f"{kind}_temp_path {kind};" for kind in kinds) + config
        (tmp_path / "nginx.conf").write_text(f"{main} http {{ {http} }}")
        nginx = subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", "nginx.conf"])
        try:
            wait_for(f"http://{address}", lambda: nginx.poll() is None, 20)
            check_image_affinity(f"http://{address}")
        finally:
            nginx.terminate()
            nginx.wait()


def check_image_affinity(address: str) -> None:
    """Handles are valid with the header that they came with, and without it at one of two replicas."""

    def ask(content: list, headers: dict[str, str]) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
        return httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=60)

    for n in range(8):
        headers, data = {"X-Image": f"image {n}"}, png(seed=n)
        uploaded = httpx.post(f"{address}/v1/images", content=data, headers=headers, timeout=60).json()
        content = [{"type": "image", "id": uploaded["id"]}, QUESTION]
        for _ in range(2):
            answer = ask(content, headers)
            assert answer.status_code == 200 and answer.json()["dualtower"]["image_kv"] == "reused"
    assert {ask(content, {}).status_code for _ in range(24)} == {200, 404}


def test_kubernetes_and_limits_name_real_flags():
    (pod,) = map(yaml.safe_load, blocks("yaml"))
    (container,) = pod["spec"]["containers"]
    args = make_parser().parse(container["command"][2:])
    assert (args.host, args.port) == ("0.0.0.0", container["readinessProbe"]["httpGet"]["port"])
    assert args.store == container["volumeMounts"][0]["mountPath"]
    rows = re.findall(r"^\| `(--\w+) (\d+)` \|", PAGE, re.M)
    defaults = make_parser().parse(["--checkpoint", "x"])
    assert (
        len(rows) == 9 and [flag for flag, value in rows if getattr(defaults, flag[2:]) != float(value)] == []
    )


def test_ray_serve_sends_an_image_to_one_of_two_replicas(folder, tmp_path):
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'ray[serve]'")
    command = next(line for block in blocks("bash") for line in block.splitlines() if "ray_serve" in line)
    flags = shlex.split(command.replace("--store image_kvs", ""))[1:]  # each replica knows its own images
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as ray_folder:  # a short path: it holds sockets
        env = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "RAY_TMPDIR": ray_folder}
        env |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
        with open(tmp_path / "log", "w") as log:
            ray = subprocess.Popen(
                [sys.executable, *flags, "--port", address.split(":")[1]],
                cwd=folder,
                env=os.environ | env,
                stdout=log,
                stderr=log,
            )
        try:
            while "is ready at" not in (tmp_path / "log").read_text():  # both replicas, not only the first
                assert ray.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            check_image_affinity(f"http://{address}")
        finally:
            ray.terminate()
            ray.wait()
