"""A Hub on this machine's loopback: what huggingface_hub needs of the Hub's HTTP protocol to create a repository, to
upload to it in commits and to download from it. Repositories of data sets can only be read. It keeps everything in
memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".glb", ".png")  # as in the .gitattributes of a new repository


@dataclass
class Commit:
    """One state of a branch: all its files, what of them the commit changed, and its message."""

    files: dict[str, bytes]
    message: str = "initial commit"
    changed: list[str] = field(default_factory=list)
    parent: str = ""

    @property
    def oid(self) -> str:
        content = repr((sorted(self.files.items()), self.message, self.parent))
        return hashlib.sha1(content.encode()).hexdigest()

    def has(self, path: str) -> bool:
        return any(name == path or name.startswith(f"{path}/") for name in self.files)

    def entry(self, path: str) -> dict[str, object]:
        """What a listing says of a file or folder."""
        if path in self.files:
            return {"type": "file", "path": path, "size": len(self.files[path]), "oid": "0" * 40}
        return {"type": "directory", "path": path, "oid": "0" * 40}


@dataclass
class Repository:
    """Branches by name, each a list of commits, the newest last."""

    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit({".gitattributes": b""})]})

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((commit for each in self.branches.values() for commit in each if commit.oid == revision), None)


class Answer(Exception):
    """Ends the handling of a request with a status, headers and a body."""

    def __init__(self, status: int, body: object = None, **headers: str):
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def refusal(status: int, message: str, code: str | None = None) -> Answer:
    headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
    return Answer(status, {"error": message}, **headers)


class LoopbackHub:
    """
    The server, as a context manager.

    Attributes:
        url: a value for HF_ENDPOINT.
        users: the name of the account that may write, by access token.
        repositories: by id.
        large_files: contents of uploaded LFS objects by their SHA-256.
        requests: (method, path) of all requests, in order.
    """

    def __init__(self, **users: str):
        self.users = {token: user for user, token in users.items()}
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self._failures: list[tuple[str, str, Callable[[], Answer | None]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, path: str, status: int, message: str = "injected", times: int = 1) -> None:
        """Answer the next requests whose path matches a pattern with an error; status 0 hangs up in mid-request."""
        self._failures += [(method, path, lambda: refusal(status, message) if status else None)] * times

    def take_failure(self, method: str, path: str) -> tuple[bool, Answer | None]:
        for index, (wanted, pattern, make) in enumerate(self._failures):
            if wanted == method and re.search(pattern, path):
                del self._failures[index]
                return True, make()
        return False, None

    def sent(self, method: str, pattern: str) -> int:
        """How many requests of a method had a path that matches a pattern."""
        return sum(wanted == method and re.search(pattern, path) is not None for wanted, path in self.requests)

    def may_write(self, token: str | None, repo_id: str) -> None:
        if token not in self.users:
            raise refusal(401, "Invalid username or password.")
        if self.users[token] != repo_id.split("/")[0]:
            raise refusal(403, "You don't have the rights to create a model under this namespace")

    def repository(self, token: str | None, repo_id: str) -> Repository:
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and self.users.get(token) != repo_id.split("/")[0]):
            raise refusal(404, "Repository not found", "RepoNotFound")
        return repository

    def commit(self, token: str | None, repo_id: str, revision: str) -> Commit:
        commit = self.repository(token, repo_id).find(revision)
        if commit is None:
            raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def handle_request(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.hub.requests.append((self.command, address.path))
        failing, failure = self.hub.take_failure(self.command, address.path)
        if failing and failure is None:
            self.close_connection = True
            self.connection.close()
            return
        self.content = self.read_content()
        try:
            if failure is not None:
                raise failure
            for (method, pattern), handle in ROUTES.items():
                match = re.fullmatch(pattern, address.path)
                if match and method == self.command.replace("HEAD", "GET"):
                    handle(self, *map(unquote, match.groups()))
            raise refusal(404, f"nothing is at {address.path}")
        except Answer as answer:
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def create(self) -> None:
        wanted = json.loads(self.content)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        self.hub.may_write(self.token, repo_id)
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            raise Answer(409, {**answer, "error": "You already created this model repo"})
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.repositories[repo_id] = Repository(private)
        raise Answer(200, answer)

    def branch(self, repo_id: str, branch: str) -> None:
        self.hub.may_write(self.token, repo_id)
        branches = self.hub.repository(self.token, repo_id).branches
        if branch in branches:
            raise refusal(409, "Reference already exists")
        branches[branch] = list(branches["main"])
        raise Answer(201, {})

    def model_info(self, repo_id: str, revision: str = "main") -> None:
        commit = self.hub.commit(self.token, repo_id, revision)
        answer = {
            "id": repo_id,
            "sha": commit.oid,
            "private": self.hub.repositories[repo_id].private,
            "siblings": [{"rfilename": name} for name in commit.files],
        }
        if "config.json" in commit.files:
            config = json.loads(commit.files["config.json"])
            answer["config"] = {name: config[name] for name in ("architectures", "model_type") if name in config}
        raise Answer(200, answer)

    def tree(self, repo_id: str, revision: str, path: str = "") -> None:
        commit = self.hub.commit(self.token, repo_id, revision)
        above = f"{path}/" if path else ""
        below = [name for name in commit.files if name.startswith(above)]
        if not below:
            raise refusal(404, f"{path} does not exist", "EntryNotFound")
        if self.query.get("recursive", ["False"])[0].lower() != "true":
            below = sorted({above + name.removeprefix(above).split("/")[0] for name in below})
        raise Answer(200, [commit.entry(name) for name in below])

    def paths_info(self, repo_id: str, revision: str) -> None:
        commit = self.hub.commit(self.token, repo_id, revision)
        wanted = parse_qs(self.content.decode())["paths"]
        raise Answer(200, [commit.entry(path) for path in wanted if commit.has(path)])

    def validate_yaml(self) -> None:
        content = json.loads(self.content)["content"]
        header = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = []
        if header is None or not isinstance(yaml.safe_load(header[1]), dict):
            errors.append({"message": "the metadata are no mapping"})
        raise Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        self.hub.may_write(self.token, repo_id)
        there = self.hub.commit(self.token, repo_id, revision).files
        answers = []
        for file in json.loads(self.content)["files"]:
            large = file["path"].endswith(LARGE)
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in there:
                content = there[file["path"]]
                answer["oid"] = hashlib.sha256(content).hexdigest() if large else git_hash(content)
            answers.append(answer)
        raise Answer(200, {"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self.hub.may_write(self.token, repo_id)
        objects = []
        for wanted in json.loads(self.content)["objects"]:
            oid = wanted["oid"]
            if oid not in self.hub.large_files:
                header = {"Authorization": self.headers["Authorization"]}
                upload = {"href": f"{self.hub.url}/lfs-objects/{oid}", "header": header}
                verify = {"href": f"{self.hub.url}/lfs-verify", "header": header}
                wanted["actions"] = {"upload": upload, "verify": verify}
            objects.append(wanted)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise refusal(400, "the content is not that of its hash")
        self.hub.large_files[oid] = self.content
        raise Answer(200, {})

    def lfs_verify(self) -> None:
        wanted = json.loads(self.content)
        whole = len(self.hub.large_files.get(wanted["oid"], b"")) == wanted["size"]
        raise Answer(200 if whole else 404, {})

    def make_commit(self, repo_id: str, revision: str) -> None:
        self.hub.may_write(self.token, repo_id)
        branches = self.hub.repository(self.token, repo_id).branches
        parent = self.hub.commit(self.token, repo_id, revision)
        files, message, changed = dict(parent.files), "", []
        for line in map(json.loads, self.content.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", parent.oid) != parent.oid:
                    raise refusal(412, "A commit has happened since. Please refresh and try again.")
                continue
            changed.append(value["path"])
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise refusal(400, "an LFS object has not been uploaded")
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif value["path"] in files:
                del files[value["path"]]
            else:
                raise refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        commit = Commit(files, message, changed, parent.oid)
        answer = {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit.oid}", "commitOid": commit.oid}
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(name.startswith("refs/pr/") for name in branches)
            branches[f"refs/pr/{number}"] = [*branches[revision], commit]
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        else:
            branches[revision].append(commit)
        raise Answer(200, answer)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self.hub.commit(self.token, repo_id, revision)
        if path not in commit.files:
            answer = refusal(404, "Entry not found", "EntryNotFound")
            answer.headers["X-Repo-Commit"] = commit.oid
            raise answer
        content = commit.files[path]
        etag = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else git_hash(content)
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": commit.oid, "Content_Type": "application/octet-stream"}
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part is None:
            raise Answer(200, content, **headers)
        start, end = int(part[1]), min(int(part[2]) + 1, len(content))
        raise Answer(206, content[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(content)}", **headers)


def git_hash(content: bytes) -> str:
    """The name of a blob in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROUTES = {
    ("POST", r"/api/repos/create"): _Handler.create,
    ("POST", r"/api/validate-yaml"): _Handler.validate_yaml,
    ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)"): _Handler.branch,
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)"): _Handler.preupload,
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)"): _Handler.make_commit,
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch"): _Handler.lfs_batch,
    ("PUT", r"/lfs-objects/([0-9a-f]{64})"): _Handler.lfs_upload,
    ("POST", r"/lfs-verify"): _Handler.lfs_verify,
    ("GET", r"/api/models/([^/]+/[^/]+)"): _Handler.model_info,
    ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)"): _Handler.model_info,
    ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)"): _Handler.tree,
    ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/(.+)"): _Handler.tree,
    ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"): _Handler.resolve,
    # repositories of data sets, by the ids datasets/USER/NAME, are only read
    ("GET", r"/api/(datasets/[^/]+/[^/]+)"): _Handler.model_info,
    ("GET", r"/api/(datasets/[^/]+/[^/]+)/revision/([^/]+)"): _Handler.model_info,
    ("GET", r"/api/(datasets/[^/]+/[^/]+)/tree/([^/]+)"): _Handler.tree,
    ("GET", r"/api/(datasets/[^/]+/[^/]+)/tree/([^/]+)/(.+)"): _Handler.tree,
    ("POST", r"/api/(datasets/[^/]+/[^/]+)/paths-info/([^/]+)"): _Handler.paths_info,
    ("GET", r"/(datasets/[^/]+/[^/]+)/resolve/([^/]+)/(.+)"): _Handler.resolve,
}
