"""A server on loopback that speaks the part of the Hub's HTTP API that downloads need.

`hub_uploads.py` adds uploads. Clients find it by `HF_ENDPOINT`.

python -m tests.hub_server      serve an empty Hub until Ctrl-C; prints the settings for another terminal
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.hub_uploads import UNKNOWN, Uploads

COMMIT = "0" * 39 + "1"
REVISIONS = (None, "main", COMMIT, "refs/convert/parquet", "a/branch")
API = re.compile(r"/api/(?:models|(datasets))/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)")


class Hub(str):
    """The server's address, its failures and its traffic.

    A request whose path contains a key of `failures` gets the next failure of that key, if any is left:
    "drop" (the connection is closed, for an upload in the middle of it), a status code, "silence"
    (no answer until the server ends), or "cut" (half of a file). `served` counts bytes by path.
    """

    def __init__(self, address: str) -> None:
        self.failures: dict[str, Iterator[str]] = {}
        self.served: Counter[str] = Counter()
        self.ended = threading.Event()


def hub_constants(address: str, cache: str) -> dict[str, object]:
    """What huggingface_hub has read from the environment at its import."""
    return {
        "ENDPOINT": str(address),
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": cache,
        "HF_HUB_OFFLINE": False,
    }


@contextmanager
def hub(repos: dict[str, Path], gated: tuple[str, ...] = (), uploads: Uploads | None = None) -> Iterator[Hub]:
    """Serve `repos` (id, or datasets/id → folder) until the block ends; yields the address.

    Repositories in `gated` answer as the Hub does without a token. `uploads` accepts new ones.
    """

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if self.failure == "cut" else body)
                here.served[urlsplit(self.path).path] += len(body)

        def json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def fails(self) -> bool:
            """Whether this request fails by `failures`; if so, the failure has been sent."""
            path = urlsplit(self.path).path
            self.failure = next(
                (
                    kind
                    for part, kinds in here.failures.items()
                    if part in path and (kind := next(kinds, None))
                ),
                None,
            )
            if self.failure == "silence":
                here.ended.wait()
            if self.failure == "drop" and self.command == "PUT":
                self.rfile.read(1000)
            if self.failure is not None and self.failure.isdigit():
                self.answer(int(self.failure), b"{}")
            return self.failure not in (None, "cut")

        def user(self) -> str | None:
            """Whose token came with the request: "" stands for one that nobody has."""
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
            return uploads.users.get(token, "") if uploads is not None and token else None

        def body(self) -> bytes:
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"] or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def do_POST(self) -> None:
            if self.fails():
                return None
            body, path = self.body(), urlsplit(self.path).path
            if path == "/lfs/verify":
                return self.answer(200 if json.loads(body)["oid"] in uploads.objects else 404)
            if self.user() == "":
                return self.answer(401, b"{}", **UNKNOWN)
            status, content, headers = uploads.post(path, body, self.user(), str(here))
            return self.answer(
                status, json.dumps(content).encode(), Content_Type="application/json", **headers
            )

        def do_PUT(self) -> None:
            if not self.fails():
                self.answer(uploads.receive(self.path.removeprefix("/put/"), self.body()))

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            if self.fails():
                return None
            if self.user() == "":
                return self.answer(401, b"{}", **UNKNOWN)
            match = API.fullmatch(address.path) or FILE.fullmatch(address.path)
            kind, name, route, revision, path = (
                [unquote(group or "") for group in match.groups()] if match else [""] * 5
            )
            name = f"{kind}/{name}" if kind else name
            if name in gated and (
                route == "resolve" or name not in repos
            ):  # what files there are, everyone may know
                return self.answer(
                    403, b"{}", X_Error_Code="GatedRepo", X_Error_Message=f"Access to {name} is restricted."
                )
            written = uploads.visible(name, self.user()) if uploads is not None else None
            if written is None and name not in repos:
                return self.answer(
                    404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
                )
            commit = (
                written.find(revision or "main")
                if written is not None
                else COMMIT
                if (revision or None) in REVISIONS
                else None
            )
            if commit is None:
                return self.answer(
                    404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id"
                )
            root = written.commits[commit] if written is not None else repos[name]
            target = root / path
            if route == "resolve" and target.is_file():
                return self.file(target.read_bytes(), commit)
            if route == "tree" and target.is_dir():
                content = sorted(
                    target.rglob("*") if "recursive=true" in address.query.lower() else target.iterdir()
                )
                kinds = {True: "directory", False: "file"}
                return self.json(
                    [
                        {
                            "type": kinds[p.is_dir()],
                            "path": p.relative_to(root).as_posix(),
                            "size": p.stat().st_size,
                            "oid": COMMIT,
                        }
                        for p in content
                    ]
                )
            if route in ("", "revision"):
                siblings = [
                    {"rfilename": p.relative_to(root).as_posix(), "size": p.stat().st_size}
                    for p in sorted(root.rglob("*"))
                    if p.is_file()
                ]
                return self.json(
                    {
                        "id": name.removeprefix("datasets/"),
                        "sha": commit,
                        "private": written is not None and written.private,
                        "siblings": siblings,
                    }
                )
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)

        def file(self, body: bytes, commit: str) -> None:
            headers = {
                "X_Repo_Commit": commit,
                "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
                "Accept_Ranges": "bytes",
            }
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
            if asked is None:
                return self.answer(200, body, **headers)
            first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
            return self.answer(
                206, body[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(body)}", **headers
            )

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    here = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        here.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    import tempfile

    with (
        tempfile.TemporaryDirectory() as store,
        hub({}, uploads=Uploads(Path(store), {"hf_me": "me"})) as served,
    ):
        print(f"export HF_ENDPOINT={served} HF_TOKEN=hf_me HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()
