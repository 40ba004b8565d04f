# SPDX-License-Identifier: Apache-2.0
"""A small in-memory stand-in for the model hub's HTTP API, enough for the real huggingface_hub client.

    with FakeHub() as hub:
        HfApi(endpoint=hub.url, token="hf_test").create_repo("org/x")

Other libraries find it through `HF_ENDPOINT`, which the client reads once, at its first import; `conftest.py` sees to
that. It serves the loopback address only, keeps commits immutable and refuses writes that carry no token. `hub.log`
holds (method, path, status) of every request. Not implemented: Xet storage (set `HF_HUB_DISABLE_XET=1`), multipart LFS
uploads, pull requests, discussions, gated repositories and the validation of model cards.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".parquet", ".onnx", ".model", ".png", ".webp")
LFS_SIZE = 10 * 1024 * 1024
URL_PREFIXES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


class HubError(Exception):
    """A refusal, with the HTTP status and the error code that the client looks at."""

    def __init__(self, status: int, code: str | None, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class Repo:
    """One repository: `commits` maps a commit id to its tree, `refs` a branch to a commit id."""

    def __init__(self, repo_id: str, private: bool = False):
        self.id, self.private = repo_id, private
        self.commits: dict[str, dict] = {}
        self.refs: dict[str, str] = {}
        self.history: list[dict] = []
        self.commit("main", {}, "initial commit")

    def commit(self, ref: str, tree: dict, title: str) -> str:
        self.date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        sha = hashlib.sha1(f"{self.id}{title}{len(self.commits)}{sorted(tree.items())}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = tree, sha
        self.history.insert(0, {"id": sha, "title": title, "message": "", "date": self.date, "authors": []})
        return sha

    def resolve(self, revision: str) -> tuple[str, dict]:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, self.commits[sha]


class FakeHub:
    """The server. As a context manager it runs in a thread and stops at the end."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int]] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def clear(self) -> None:
        """Forget every repository, blob and request."""
        with self.lock:
            self.repos.clear()
            self.blobs.clear()
            self.log.clear()

    def repo(self, kind: str, repo_id: str) -> Repo:
        try:
            return self.repos[kind, repo_id]
        except KeyError:
            raise HubError(404, "RepoNotFound", "Repository not found") from None

    def store(self, data: bytes, lfs: bool) -> dict:
        """Keep `data` and return its tree entry: the key of the bytes, the git id, the size, and whether it is LFS."""
        key = hashlib.sha256(data).hexdigest()
        self.blobs[key] = data
        git_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {"key": key, "oid": git_id, "size": len(data), "lfs": lfs}


class Handler(BaseHTTPRequestHandler):
    """Answers one connection. The table `ROUTES` names the method that serves each address."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub

    # Plumbing

    def log_message(self, *args: object) -> None:
        pass

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(
        self, content: Any = None, status: int = 200, headers: Mapping[str, str] = {}, raw: bytes | None = None
    ) -> None:
        data = json.dumps(content).encode() if raw is None else raw
        self.hub.log.append((self.command, self.path, status))  # before the client can go on
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def serve(self) -> None:
        url = urlsplit(self.path)
        body = self.read_body()
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.error_headers: dict[str, str] = {}
        try:
            self.check_token(url.path)
            for methods, pattern, name in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods:
                    with self.hub.lock:
                        return getattr(self, name)(body, *[group and unquote(group) for group in match.groups()])
            raise HubError(404, None, f"no route for {self.command} {url.path}")
        except HubError as error:
            code = {"X-Error-Code": error.code} if error.code else {}
            headers = {"X-Error-Message": str(error), **code, **self.error_headers}
            self.send({"error": str(error)}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def check_token(self, path: str) -> None:
        # LFS bytes go to a pre-signed style address, for which the real service asks no token either.
        is_open = self.command in ("GET", "HEAD") or re.match(r"/(lfs-put/|api/validate-yaml$)", path)
        if not is_open and not self.headers.get("Authorization", "").startswith("Bearer "):
            raise HubError(401, None, "Invalid username or password.")

    # Accounts and repositories

    def whoami(self, body: bytes) -> None:
        if not self.headers.get("Authorization"):
            raise HubError(401, None, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self.send({"type": "user", "id": "0", "name": "tester", "fullname": "Tester", "orgs": [], "auth": token})

    def validate_yaml(self, body: bytes) -> None:
        self.send({"errors": [], "warnings": []})

    @staticmethod
    def kind_and_id(body: bytes) -> tuple[str, str]:
        request = json.loads(body)
        return (request.get("type") or "model") + "s", f"{request.get('organization') or 'tester'}/{request['name']}"

    def create_repo(self, body: bytes) -> None:
        kind, repo_id = self.kind_and_id(body)
        url = f"{self.hub.url}/{URL_PREFIXES[kind]}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            return self.send({"error": "You already created this repo", "url": url}, 409)
        self.hub.repos[kind, repo_id] = Repo(repo_id, json.loads(body).get("visibility") == "private")
        self.send({"url": url, "id": repo_id, "name": repo_id})

    def delete_repo(self, body: bytes) -> None:
        key = self.kind_and_id(body)
        self.hub.repo(*key)
        del self.hub.repos[key]
        self.send({})

    def info(self, body: bytes, kind: str, repo_id: str, revision: str | None) -> None:
        repo = self.hub.repo(kind, repo_id)
        sha, tree = repo.resolve(revision or "main")
        card = self.hub.blobs[tree["README.md"]["key"]].decode() if "README.md" in tree else ""
        tags = re.findall(r"^- (\S+)$", card.split("---")[1], re.M) if card.startswith("---") else []
        siblings = [
            {"rfilename": path, "size": file["size"], "blobId": file["oid"], **self.lfs_of(file)}
            for path, file in sorted(tree.items())
        ]
        names = {"_id": sha[:24], "id": repo.id, "modelId": repo.id, "sha": sha, "tags": tags, "siblings": siblings}
        state = {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        self.send({**names, **state, "lastModified": repo.date, "createdAt": repo.date})

    def refs(self, body: bytes, kind: str, repo_id: str) -> None:
        refs = self.hub.repo(kind, repo_id).refs
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in refs.items()]
        self.send({"branches": branches, "tags": [], "converts": []})

    def commits(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        self.send(self.hub.repo(kind, repo_id).history)

    def create_branch(self, body: bytes, kind: str, repo_id: str, name: str) -> None:
        repo = self.hub.repo(kind, repo_id)
        if name in repo.refs:
            raise HubError(409, None, "Reference already exists")
        repo.refs[name], _ = repo.resolve(json.loads(body or b"{}").get("startingPoint") or "main")
        self.send({})

    # Reading

    @staticmethod
    def lfs_of(file: dict) -> dict:
        if not file["lfs"]:
            return {}
        return {"lfs": {"oid": file["key"], "sha256": file["key"], "size": file["size"], "pointerSize": 134}}

    def entry(self, path: str, file: dict) -> dict:
        return {"type": "file", "path": path, "oid": file["oid"], "size": file["size"], **self.lfs_of(file)}

    def tree(self, body: bytes, kind: str, repo_id: str, revision: str, folder: str | None) -> None:
        _, tree = self.hub.repo(kind, repo_id).resolve(revision)
        recursive = self.query.get("recursive", "").lower() == "true"
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path, file in sorted(tree.items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(name.encode()).hexdigest()
                entries.setdefault(name, {"type": "directory", "path": name, "size": 0, "oid": oid})
            if recursive or len(parts) == 1:
                entries[path] = self.entry(path, file)
        if folder and not entries:
            raise HubError(404, "EntryNotFound", "Entry not found")
        self.send(list(entries.values()))

    def paths_info(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        _, tree = self.hub.repo(kind, repo_id).resolve(revision)
        paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        self.send([self.entry(path, tree[path]) for path in paths if path in tree])

    def file(self, body: bytes, prefix: str | None, repo_id: str, revision: str, path: str) -> None:
        sha, tree = self.hub.repo((prefix or "models/")[:-1], repo_id).resolve(revision)
        self.error_headers = {"X-Repo-Commit": sha}
        if path not in tree:
            raise HubError(404, "EntryNotFound", "Entry not found")
        file, status = tree[path], 200
        raw = self.hub.blobs[file["key"]]
        etag = file["key"] if file["lfs"] else file["oid"]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(part[1]), min(int(part[2] or len(raw)), len(raw) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(raw)}"
            raw, status = raw[start : end + 1], 206
        self.send(status=status, headers={**headers, "Content-Type": "application/octet-stream"}, raw=raw)

    # Writing

    def preupload(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        _, tree = self.hub.repo(kind, repo_id).resolve(revision)
        answer = []
        for file in json.loads(body)["files"]:
            path, old = file["path"], tree.get(file["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or file["size"] >= LFS_SIZE else "regular"
            oid = {"oid": old["key"] if old["lfs"] else old["oid"]} if old else {}
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        self.send({"files": answer})

    def lfs_batch(self, body: bytes, prefix: str | None, repo_id: str) -> None:
        self.hub.repo((prefix or "models/")[:-1], repo_id)
        objects = []
        for item in json.loads(body)["objects"]:
            upload, verify = f"{self.hub.url}/lfs-put/{item['oid']}", f"{self.hub.url}/lfs-verify"
            actions = {"actions": {"upload": {"href": upload}, "verify": {"href": verify}}}
            objects.append(
                {"oid": item["oid"], "size": item["size"], **({} if item["oid"] in self.hub.blobs else actions)}
            )
        self.send({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, None, "sha256 mismatch")
        self.hub.blobs[oid] = body
        self.send({})

    def lfs_verify(self, body: bytes) -> None:
        request = json.loads(body)
        if len(self.hub.blobs.get(request["oid"], b"")) != request["size"]:
            raise HubError(404, None, "object missing")
        self.send({})

    def commit(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        repo = self.hub.repo(kind, repo_id)
        parent, tree = repo.resolve(revision)
        tree, title = dict(tree), ""
        for line in filter(None, body.split(b"\n")):
            operation = json.loads(line)
            kind_of_change, value = operation["key"], operation["value"]
            if kind_of_change == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
            elif kind_of_change == "file":
                tree[value["path"]] = self.hub.store(base64.b64decode(value["content"]), lfs=False)
            elif kind_of_change == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise HubError(400, None, f"lfs object {value['oid']} was never uploaded")
                tree[value["path"]] = self.hub.store(self.hub.blobs[value["oid"]], lfs=True)
            elif kind_of_change == "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            elif kind_of_change == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                tree = {path: file for path, file in tree.items() if not path.startswith(folder)}
            else:
                raise HubError(400, None, f"unknown change {kind_of_change}")
        sha = repo.commit(revision, tree, title)
        url = f"{self.hub.url}/{URL_PREFIXES[kind]}{repo_id}/commit/{sha}"
        self.send({"success": True, "commitOid": sha, "commitUrl": url})


KIND, ID, REVISION = r"(models|datasets|spaces)", r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("POST",), r"/api/validate-yaml", "validate_yaml"),
    (("POST",), r"/api/repos/create", "create_repo"),
    (("DELETE",), r"/api/repos/delete", "delete_repo"),
    (("GET",), rf"/api/{KIND}/{ID}(?:/revision/{REVISION})?", "info"),
    (("GET",), rf"/api/{KIND}/{ID}/refs", "refs"),
    (("GET",), rf"/api/{KIND}/{ID}/commits/{REVISION}", "commits"),
    (("POST",), rf"/api/{KIND}/{ID}/branch/{REVISION}", "create_branch"),
    (("GET",), rf"/api/{KIND}/{ID}/tree/{REVISION}(?:/(.+))?", "tree"),
    (("POST",), rf"/api/{KIND}/{ID}/paths-info/{REVISION}", "paths_info"),
    (("POST",), rf"/api/{KIND}/{ID}/preupload/{REVISION}", "preupload"),
    (("POST",), rf"/api/{KIND}/{ID}/commit/{REVISION}", "commit"),
    (("POST",), rf"/(datasets/|spaces/)?{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("PUT",), r"/lfs-put/([0-9a-f]{64})", "lfs_put"),
    (("POST",), r"/lfs-verify", "lfs_verify"),
    (("GET", "HEAD"), rf"/(datasets/|spaces/)?{ID}/resolve/{REVISION}/(.+)", "file"),
]
