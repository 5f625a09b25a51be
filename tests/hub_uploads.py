"""The upload half of `hub_server.py`: creating repositories and committing over the Hub's HTTP API."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import yaml

Answer = tuple[int, dict, dict]  # status, body, headers
UNKNOWN = {"X_Error_Message": "Invalid credentials in Authorization header"}


class Repo:
    """A folder for each commit; `branches` name the last one's."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.branches: dict[str, str] = {}
        self.commits: dict[str, Path] = {}
        self.messages: list[str] = []

    def find(self, revision: str) -> str | None:
        """→ the commit."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        """Of the last commit on main."""
        folder = self.commits[self.branches["main"]]
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }


class Uploads:
    """The state of uploads; `users` maps a token to a name.

    Files larger than `largest` bytes are refused. Binary files and files over 10 kB are uploaded by LFS.
    """

    def __init__(self, store: Path, users: dict[str, str], largest: int = 1 << 40) -> None:
        self.store, self.users, self.largest = store, users, largest
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # what LFS holds
        self.put: list[str] = []  # objects in the order in which they came

    def visible(self, name: str, user: str | None) -> Repo | None:
        repo = self.repos.get(name)
        return None if repo is None or (repo.private and name.split("/")[0] != user) else repo

    def post(self, path: str, body: bytes, user: str | None, address: str) -> Answer:
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if user is None:
            return 401, {"error": "Invalid username or password."}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body), user, address)
        match = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path
        ) or re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/(objects)/(batch)", path)
        repo = self.visible(match[1], user) if match else None
        if match is None or repo is None:
            return 404, {}, {"X_Error_Code": "RepoNotFound", "X_Error_Message": "Repository not found"}
        if match[1].split("/")[0] != user:
            return 403, {"error": f"You have no rights to write to {match[1]}"}, {}
        if match[2] == "branch":
            return self._branch(repo, unquote(match[3]))
        if match[2] == "objects":
            return self._batch(json.loads(body), address)
        branch = unquote(match[3])
        if branch not in repo.branches:
            return (
                404,
                {},
                {"X_Error_Code": "RevisionNotFound", "X_Error_Message": f"Invalid rev id: {branch}"},
            )
        return (
            self._preupload(repo, branch, json.loads(body))
            if match[2] == "preupload"
            else self._commit(match[1], repo, branch, body, address)
        )

    def _validate(self, card: str) -> Answer:
        matter = re.match(r"---\n(.*?)\n---\n", card, re.S)
        values = yaml.safe_load(matter[1]) if matter else None
        wrong = [] if isinstance(values, dict) else ["no metadata"]
        wrong += (
            ['"license" must be a string']
            if not wrong and not isinstance(values.get("license", ""), str)
            else []
        )
        return (
            400 if wrong else 200,
            {"errors": [{"message": problem} for problem in wrong], "warnings": []},
            {},
        )

    def _create(self, asked: dict, user: str, address: str) -> Answer:
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            return (
                403,
                {"error": f'You don\'t have the rights to create a model under the namespace "{owner}"'},
                {},
            )
        if name in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{address}/{name}"}, {}
        repo = self.repos[name] = Repo(asked.get("visibility") == "private")
        self._add(name, repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return 200, {"url": f"{address}/{name}"}, {}

    def _branch(self, repo: Repo, branch: str) -> Answer:
        if branch in repo.branches:
            return 409, {"error": "Reference already exists"}, {}
        repo.branches[branch] = repo.branches["main"]
        return 200, {}, {}

    def _preupload(self, repo: Repo, branch: str, asked: dict) -> Answer:
        folder, out = repo.commits[repo.branches[branch]], []
        for file in asked["files"]:
            large = file["size"] > 10_000 or file["path"].endswith((".safetensors", ".png"))
            there, oid = folder / file["path"], None
            if there.is_file():
                data = there.read_bytes()
                oid = (
                    hashlib.sha256(data).hexdigest()
                    if large
                    else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                )
            out.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        return 200, {"files": out}, {}

    def _batch(self, asked: dict, address: str) -> Answer:
        out = []
        for entry in asked["objects"]:
            if entry["size"] > self.largest:
                out.append(
                    entry | {"error": {"code": 422, "message": "This file is larger than your plan allows"}}
                )
            elif entry["oid"] in self.objects:
                out.append(entry)
            else:
                out.append(
                    entry
                    | {
                        "actions": {
                            "upload": {"href": f"{address}/put/{entry['oid']}"},
                            "verify": {"href": f"{address}/lfs/verify"},
                        }
                    }
                )
        return 200, {"transfer": "basic", "objects": out}, {}

    def receive(self, oid: str, body: bytes) -> int:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400
        self.objects[oid] = body
        self.put.append(oid)
        return 200

    def _commit(self, name: str, repo: Repo, branch: str, body: bytes, address: str) -> Answer:
        lines = [json.loads(line) for line in body.splitlines()]
        folder = repo.commits[repo.branches[branch]]
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for key, value in ((line["key"], line["value"]) for line in lines[1:]):
            if key == "deletedFile":
                files.pop(value["path"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] not in self.objects:
                return 400, {"error": f"LFS object {value['oid']} is missing"}, {}
            else:
                files[value["path"]] = self.objects[value["oid"]]
        commit = self._add(name, repo, branch, files, lines[0]["value"]["summary"])
        return (
            200,
            {"success": True, "commitOid": commit, "commitUrl": f"{address}/{name}/commit/{commit}"},
            {},
        )

    def _add(self, name: str, repo: Repo, branch: str, files: dict[str, bytes], message: str) -> str:
        commit = hashlib.sha1(f"{name} {len(repo.commits)}".encode()).hexdigest()
        folder = self.store / name / commit
        shutil.rmtree(folder, ignore_errors=True)
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        repo.commits[commit], repo.branches[branch] = folder, commit
        repo.messages.append(message)
        return commit
