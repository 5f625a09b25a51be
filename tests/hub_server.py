"""A server on loopback that speaks as much of the Hub's HTTP as downloads need: `HF_ENDPOINT` points at it."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 39 + "1"


@contextmanager
def hub(repos: dict[str, Path], gated: tuple[str, ...] = ()) -> Iterator[str]:
    """Serve `repos` (id → folder) until the block ends; → the address. `gated` ids answer as the Hub does without a token."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(?:\?.*)?", self.path)
            tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+)(?:\?.*)?", self.path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            name, revision = (api or tree or file).group(1, 2) if api or tree or file else ("", None)
            if name in gated:
                return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message=f"Access to model {name} is restricted.")
            if name not in repos:
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            if revision not in (None, "main", COMMIT):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            folder = repos[name]
            names = sorted(p.name for p in folder.iterdir())
            if api:
                return self.answer(
                    200, json.dumps({"id": name, "sha": COMMIT, "private": False, "siblings": [{"rfilename": n} for n in names]}).encode(), Content_Type="application/json"
                )
            if tree:
                entries = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": COMMIT} for n in names]
                return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
            if file.group(3) not in names:
                return self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            body = (folder / file.group(3)).read_bytes()
            return self.answer(200, body, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(body).hexdigest()}"')

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
