"""A server on loopback that speaks as much of the Hub's HTTP as downloads need: `HF_ENDPOINT` points at it."""

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

COMMIT = "0" * 39 + "1"
REVISIONS = (None, "main", COMMIT, "refs/convert/parquet", "a/branch")
API = re.compile(r"/api/(?:models|(datasets))/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)")


class Hub(str):
    """The address. Requests whose path holds a key of `failures` take their answer from there while it has one:
    "drop" (the connection is closed), "503", "silence" (no answer until the server ends), "cut" (half of a file).
    `served` counts bytes by path.
    """

    def __init__(self, address: str) -> None:
        self.failures: dict[str, Iterator[str]] = {}
        self.served: Counter[str] = Counter()
        self.ended = threading.Event()


@contextmanager
def hub(repos: dict[str, Path], gated: tuple[str, ...] = ()) -> Iterator[Hub]:
    """Serve `repos` (id, or datasets/id → folder) until the block ends; → the address. `gated` ids answer as the Hub does without a token."""

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

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            self.failure = next((kind for part, kinds in here.failures.items() if part in address.path and (kind := next(kinds, None))), None)
            if self.failure == "silence":
                here.ended.wait()
            if self.failure in ("drop", "silence"):
                return None
            if self.failure == "503":
                return self.answer(503)
            match = API.fullmatch(address.path) or FILE.fullmatch(address.path)
            kind, name, route, revision, path = [unquote(group or "") for group in match.groups()] if match else [""] * 5
            name = f"{kind}/{name}" if kind else name
            if name in gated and (route == "resolve" or name not in repos):  # what files there are, everyone may know
                return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message=f"Access to {name} is restricted.")
            if name not in repos:
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            if (revision or None) not in REVISIONS:
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            root, target = repos[name], repos[name] / path
            if route == "resolve" and target.is_file():
                return self.file(target.read_bytes())
            if route == "tree" and target.is_dir():
                found = sorted(target.rglob("*") if "recursive=true" in address.query.lower() else target.iterdir())
                kinds = {True: "directory", False: "file"}
                return self.json([{"type": kinds[p.is_dir()], "path": p.relative_to(root).as_posix(), "size": p.stat().st_size, "oid": COMMIT} for p in found])
            if route in ("", "revision"):
                siblings = [{"rfilename": p.relative_to(root).as_posix()} for p in sorted(root.rglob("*")) if p.is_file()]
                return self.json({"id": name.removeprefix("datasets/"), "sha": COMMIT, "private": False, "siblings": siblings})
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

        def file(self, body: bytes) -> None:
            headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Accept_Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
            if asked is None:
                return self.answer(200, body, **headers)
            first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
            return self.answer(206, body[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(body)}", **headers)

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
