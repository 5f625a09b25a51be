"""Run the project's programs in processes of their own, forked from a server.

The server has already imported the heavy packages, which saves seconds per process. Use `subprocess` to test
import order and environment variables that are read at import.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import timm  # noqa: F401
import tokenizers  # noqa: F401
import torch  # noqa: F401
import transformers.dynamic_module_utils

import training.script  # noqa: F401
from hf.flat_code import code_files

with suppress(ImportError):  # lmms-eval is optional
    import eval.tasks  # noqa: F401

code_files()  # each exported model holds it
ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.programs"])


@cache
def start_server() -> None:
    """Offline and with one thread each, whatever this process has."""
    before = dict(os.environ)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ |= before


class Program:
    """A running `python SCRIPT FLAGS`, much like `subprocess.Popen` with its output in files."""

    def __init__(self, command: list[str], cwd: Path, before: Callable[[], None] | None = None) -> None:
        self.command = [part for part in map(str, command) if part != sys.executable]
        start_server()
        self.folder = Path(tempfile.mkdtemp())
        self.process = SERVER.Process(target=_main, args=(self.command, str(cwd), str(self.folder), before))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> subprocess.CompletedProcess:
        self.process.join()
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        shutil.rmtree(self.folder)
        return subprocess.CompletedProcess(self.command, self.process.exitcode, out, err)


def at_hub(address: str, cache: str, token: str = "") -> None:
    """Make `address` the program's Hub; pass it as `before`.

    It has the effect of HF_ENDPOINT being set when huggingface_hub and datasets were imported.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    from tests.hub_server import hub_constants

    disable_progress_bars()
    os.environ |= {"HF_ENDPOINT": address, "HF_HOME": cache, "HF_DATASETS_CACHE": cache, "HF_TOKEN": token}
    constants.HF_HUB_DISABLE_XET = True
    for name, value in hub_constants(address, cache).items():
        setattr(constants, name, value)
    if (datasets := sys.modules.get("datasets")) is not None:
        datasets.config.HF_ENDPOINT, datasets.config.HF_HUB_OFFLINE = address, False
        datasets.config.HF_DATASETS_CACHE = Path(cache)


def with_modules_in(folder: Path) -> None:
    """Let transformers keep the code that it loads in `folder`; what the parent loaded is not seen."""
    sys.path[:] = [path for path in sys.path if not (Path(path) / "transformers_modules").is_dir()]
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(folder)


def run_program(
    command: list[str], cwd: Path, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess:
    """`command` to its end; `before` is called in its process first."""
    return Program(command, cwd, before).wait()


def run_ranks(number: int, command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Run `command` as the ranks of one run.

    Sets the variables that torchrun gives its workers, without importing everything again in each. Returns
    the outputs of all ranks, concatenated, and the first non-zero exit status.
    """
    ranks = start_ranks(number, command, cwd)
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):  # the others would wait for it
            for rank in ranks:
                rank.process.kill()
        time.sleep(0.01)
    done = [rank.wait() for rank in ranks]
    return subprocess.CompletedProcess(
        command,
        next((d.returncode for d in done if d.returncode), 0),
        "".join(d.stdout for d in done),
        "".join(d.stderr for d in done),
    )


def start_ranks(number: int, command: list[str], cwd: Path, local: int = 0) -> list[Program]:
    """The same, not waited for; `local` of them on a node, as its flags say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        Program(command, cwd, partial(_as_rank, rank, number, local or number, port))
        for rank in range(number)
    ]


def _as_rank(rank: int, number: int, local: int, port: int) -> None:
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank % local,
        "WORLD_SIZE": number,
        "LOCAL_WORLD_SIZE": local,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in variables.items()}


def _main(command: list[str], cwd: str, folder: str, before: Callable[[], None] | None) -> None:
    multiprocessing.set_start_method(
        None, force=True
    )  # as in a program from a shell: its data workers are its own children
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    os.chdir(cwd)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    if before is not None:
        before()
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            sys.path.insert(0, str(ROOT))
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).absolute().parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def without_local_batch_size(flags: list[str]) -> list[str]:
    """These flags without `--train.local_batch_size` and its value, for a run with `--fit-memory`."""
    at = flags.index("--train.local_batch_size")
    return flags[:at] + flags[at + 2 :]
