"""A small Hugging Face Hub on 127.0.0.1, for tests that use the real client.

    with HubServer() as hub:
        subprocess.run(command, env=os.environ | hub.environment(home))

It keeps repositories in memory and speaks the part of the Hub's HTTP protocol that `huggingface_hub`
uses without Xet: repositories, branches, preupload, the LFS batch protocol (single part and multipart),
commits, file trees, and downloads with redirects and ranges. `HF_ENDPOINT` is read when
`huggingface_hub` is imported, so clients must be subprocesses.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

DATE = "2026-01-01T00:00:00.000Z"
REPO_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
MULTIPART_SIZE = 1 << 16  # bytes; small, so that tests upload in several parts


class HubError(Exception):
    """An answer of the Hub that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class File:
    """A file of a commit; `large` files live in the LFS store and are served after a redirect."""

    content: bytes
    large: bool

    @property
    def etag(self) -> str:
        """What the Hub gives as ETag: SHA-256 of a large file, else git's SHA-1 of the blob."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def entry(self, path: str) -> dict:
        """How trees and path listings describe the file."""
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.etag}
        if self.large:
            entry["lfs"] = {"oid": self.etag, "size": entry["size"], "pointerSize": 134}
        return entry | {"lastCommit": {"id": "0" * 40, "title": "commit", "date": DATE}}


@dataclass
class Repository:
    """A repository: its commits by hash, and its branches by name."""

    kind: str
    name: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.commit(
            "main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit"
        )

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        """Makes the files the state of a branch; returns the hash of the commit."""
        commit = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        self.messages.append(message)
        return commit

    def find(self, revision: str) -> str:
        """The hash of the commit that a branch or a hash names."""
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content."""
        return {path: file.content for path, file in self.commits[self.find(revision)].items()}


class HubServer:
    """The server; a context manager. Everything it holds may be read and changed by tests.

    Attributes:
        repositories: by (kind, name), kind "model" or "dataset".
        objects: the LFS store, by SHA-256.
        tokens: token -> user.
        requests: (method, path, status, value of the Range header) of every request, in order.
        cut_downloads: path -> bytes of the file after which the connection breaks, one element per download.
        refuse_uploads: number of LFS uploads that break the connection halfway.
        stop_uploads: while set, LFS uploads after the first part get no answer; `upload_stopped` is then set.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.tokens = {"hf_owner": "owner", "hf_stranger": "stranger"}
        self.requests: list[tuple[str, str, int, str | None]] = []
        self.cut_downloads: dict[str, list[int]] = {}
        self.refuse_uploads = 0
        self.stop_uploads, self.upload_stopped = threading.Event(), threading.Event()
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self})
        )
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.storage_url = (
            f"http://localhost:{port}"  # another host, as the Hub's: the token must not go there
        )
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = "hf_owner") -> dict[str, str]:
        """Environment variables for a client that knows this Hub only and has its own caches in `home`."""
        environment = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token or "",
            "no_proxy": "*",
            "NO_PROXY": "*",
        }
        return environment | ({} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})

    def create(
        self, name: str, kind: str = "model", private: bool = False, **files: bytes
    ) -> Repository:
        """Makes a repository, with small files if there are any."""
        repository = self.repositories[kind, name] = Repository(kind, name, private)
        if files:
            repository.commit(
                "main", {path: File(content, False) for path, content in files.items()}, "files"
            )
        return repository

    def count(self, method: str, pattern: str) -> int:
        """Number of requests so far whose path matches a regular expression."""
        return sum(
            made == method and re.search(pattern, path) is not None
            for made, path, *_ in self.requests
        )


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; the subclass that a server makes knows its `hub`."""

    protocol_version = "HTTP/1.1"
    wbufsize = (
        1 << 16
    )  # header and content leave together, or the client's delayed acknowledgement costs 40 ms
    hub: HubServer

    def log_message(self, *_):
        """Says nothing: `HubServer.requests` is the log."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.sent = 0
        try:
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and (method == self.command or (method, self.command) == ("GET", "HEAD")):
                    found = {
                        name: unquote(value or "") for name, value in match.groupdict().items()
                    }
                    if "kind" in found:
                        found["kind"] = found["kind"].rstrip("s/") or "model"
                    action(self, **found)
                    break
            else:
                raise HubError(404, f"no such page: {self.command} {url.path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message}
            self._send(
                error.status,
                json.dumps({"error": error.message}).encode(),
                headers | ({"X-Error-Code": error.code} if error.code else {}),
            )
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True
        finally:
            self.hub.requests.append((self.command, url.path, self.sent, self.headers.get("Range")))

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    # Reading and writing

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self):
        return json.loads(self._body() or b"{}")

    def _send(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.sent = status
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _break(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()
        raise ConnectionError

    # Who may do what

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _repository(self, kind: str, name: str, write: bool = False) -> Repository:
        user, owner = self._user(), name.split("/")[0]
        repository = self.hub.repositories.get((kind, name))
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if repository is None or (repository.private and user != owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise HubError(403, f"you do not have the right to write to {name}")
        return repository

    # Accounts and repositories

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        self._send_json(
            {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}}
        )

    def validate_yaml(self) -> None:
        errors = card_errors(self._json()["content"])
        self._send_json(
            {"errors": [{"message": error} for error in errors], "warnings": []},
            400 if errors else 200,
        )

    def create_repository(self) -> None:
        asked, user = self._json(), self._user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        owner, kind = asked.get("organization") or user, asked.get("type") or "model"
        name = f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if owner != user:
            raise HubError(
                403, f"you do not have the right to create a repository under the namespace {owner}"
            )
        with self.hub.lock:
            if (kind, name) in self.hub.repositories:
                return self._send_json(
                    {"error": "You already created this repository", "url": url}, 409
                )
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories[kind, name] = Repository(kind, name, bool(private))
        self._send_json({"url": url, "name": name})

    def info(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        commit = repository.find(revision or "main")
        files = repository.commits[commit]
        card = files.get("README.md")
        self._send_json(
            {
                "id": name,
                f"{kind}Id": name,
                "author": name.split("/")[0],
                "sha": commit,
                "private": repository.private,
                "gated": False,
                "disabled": False,
                "lastModified": DATE,
                "createdAt": DATE,
                "tags": (front_matter(card.content.decode()) or {}).get("tags") or []
                if card
                else [],
                "cardData": front_matter(card.content.decode()) if card else None,
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def refs(self, kind: str, name: str) -> None:
        branches = self._repository(kind, name).branches.items()
        refs = [
            {"name": b, "ref": f"refs/heads/{b}", "targetCommit": commit} for b, commit in branches
        ]
        self._send_json({"branches": refs, "converts": [], "tags": []})

    def create_branch(self, kind: str, name: str, branch: str) -> None:
        repository = self._repository(kind, name, write=True)
        start = repository.find(self._json().get("startingPoint") or "main")
        if branch in repository.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repository.branches[branch] = start
        self._send_json({})

    # Reading a repository

    def tree(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._repository(kind, name)
        commit = repository.find(revision)
        files, prefix = repository.commits[commit], f"{path}/" if path else ""
        below = {p: file for p, file in files.items() if p.startswith(prefix)}
        if path and not below:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        folders = {
            p[: m.start()] for p in below for m in re.finditer("/", p) if m.start() > len(prefix)
        }
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        shown = {p for p in (*below, *folders) if recursive or "/" not in p[len(prefix) :]}
        self._send_json([entry_of(p, files) for p in sorted(shown)])

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        files = repository.commits[repository.find(revision)]
        body = self._body().decode()
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body)["paths"]
        known = [p for p in paths if p in files or any(file.startswith(f"{p}/") for file in files)]
        self._send_json([entry_of(p, files) for p in known])

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._repository(kind, name)
        commit = repository.find(revision)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        file = repository.commits[commit].get(path)
        if file is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._send(404, b"Entry not found", headers)
        headers["ETag"] = f'"{file.etag}"'
        if not file.large:
            return self._send_range(path, file.content, headers)
        linked = {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        location = f"{self.hub.storage_url}/storage/{file.etag}/{path}"
        self._send(302, b"", headers | linked | {"Location": location})

    def download(self, oid: str, path: str) -> None:
        if "Authorization" in self.headers:
            raise HubError(400, "a token was sent to the storage")
        self._send_range(
            path, self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        )

    def _send_range(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        status, start, end = 200, 0, len(content)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match and content:
            start, end = int(match[1]), min(int(match[2] or end - 1) + 1, end)
            if start >= len(content):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            status, headers = (
                206,
                headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"},
            )
        cuts = self.hub.cut_downloads.get(path)
        if not cuts or self.command == "HEAD":
            return self._send(status, content[start:end], headers)
        self.sent = status
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(end - start)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[start : start + cuts.pop(0)])
        self._break()

    # Writing to a repository

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name, write=True)
        files, answer = repository.commits[repository.find(revision)], []
        for asked in self._json()["files"]:
            large = b"\0" in base64.b64decode(asked["sample"]) or asked["path"].endswith(
                ".safetensors"
            )
            old = files.get(asked["path"])
            answer.append(
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": old and old.etag,
                }
            )
        self._send_json({"files": answer})

    def lfs_batch(self, kind: str, name: str) -> None:
        self._repository(kind, name, write=True)
        asked = self._json()
        if "basic" not in asked["transfers"]:
            raise HubError(422, f"transfers={asked['transfers']}: expected basic")
        objects = [
            {"oid": x["oid"], "size": x["size"]} | self._lfs_actions(**x) for x in asked["objects"]
        ]
        self._send_json({"transfer": "basic", "objects": objects})

    def _lfs_actions(self, oid: str, size: int) -> dict:
        if oid in self.hub.objects:
            return {}  # the client skips what is there already
        verify = {"href": f"{self.hub.url}/lfs/{oid}/verify"}
        if size <= MULTIPART_SIZE:
            return {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{oid}"}, "verify": verify}}
        parts = range(1, -(-size // MULTIPART_SIZE) + 1)
        header = {"chunk_size": str(MULTIPART_SIZE)} | {
            str(n): f"{self.hub.url}/lfs/{oid}/part/{n}" for n in parts
        }
        return {
            "actions": {
                "upload": {"href": f"{self.hub.url}/lfs/{oid}/complete", "header": header},
                "verify": verify,
            }
        }

    def lfs_put(self, oid: str, part: str = "") -> None:
        with self.hub.lock:
            refused = self.hub.refuse_uploads > 0
            self.hub.refuse_uploads -= refused
        if refused:
            self.rfile.read(1)
            self._break()
        content = self._body()
        if self.hub.stop_uploads.is_set() and part != "1":
            self.hub.upload_stopped.set()
            self._break()
        if part:
            self.hub.parts.setdefault(oid, {})[int(part)] = content
        else:
            self._store(oid, content)
        self._send(200, b"", {"ETag": hashlib.sha1(content).hexdigest()})

    def lfs_complete(self, oid: str) -> None:
        asked, parts = self._json(), self.hub.parts.pop(oid, {})
        if [part["partNumber"] for part in asked["parts"]] != sorted(parts):
            raise HubError(400, f"parts {asked['parts']}: {sorted(parts)} have arrived")
        self._store(oid, b"".join(parts[n] for n in sorted(parts)))
        self._send_json({"success": True})

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, f"the content is not that of {oid}")
        self.hub.objects[oid] = content

    def lfs_verify(self, oid: str) -> None:
        if len(self.hub.objects.get(oid, b"")) != self._json()["size"]:
            raise HubError(404, f"{oid} has not arrived")
        self._send_json({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name, write=True)
        lines = [json.loads(line) for line in self._body().splitlines()]
        with self.hub.lock:
            head = repository.find(revision)
            header, files = lines[0]["value"], dict(repository.commits[head])
            if header.get("parentCommit", head) != head:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            errors = (
                card_errors(files["README.md"].content.decode()) if "README.md" in files else []
            )
            if errors:
                raise HubError(400, "; ".join(errors))
            commit = repository.commit(revision, files, header["summary"])
        self._send_json(
            {
                "success": True,
                "commitOid": commit,
                "commitUrl": f"{self.hub.url}/{name}/commit/{commit}",
            }
        )

    def _apply(self, files: dict[str, File], key: str, value: dict) -> None:
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise HubError(
                    400, f"LFS pointer of {path} points to an object that does not exist"
                )
            files[path] = File(self.hub.objects[value["oid"]], True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            for inside in [p for p in files if p.startswith(f"{path.rstrip('/')}/")]:
                del files[inside]
        else:
            raise HubError(400, f"unknown operation {key}")


def entry_of(path: str, files: dict[str, File]) -> dict:
    """How a file or folder is described in listings."""
    if path in files:
        return files[path].entry(path)
    return {
        "type": "directory",
        "path": path,
        "size": 0,
        "oid": hashlib.sha1(path.encode()).hexdigest(),
    }


def front_matter(text: str) -> dict | None:
    """The metadata of a card."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def card_errors(text: str) -> list[str]:
    """What the Hub objects to in a card's metadata: values that must name something on the Hub and cannot."""
    try:
        data = front_matter(text) or {}
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"]
    errors = []
    for key in ("base_model", "datasets"):
        values = data.get(key) or []
        for value in values if isinstance(values, list) else [values]:
            if not REPO_NAME.fullmatch(str(value)):
                errors.append(f'"{key}" with value "{value}" is not valid. Use an id from the Hub.')
    names = Counter(result.get("name") for result in data.get("model-index") or [])
    return errors + [f'"model-index" lacks a name: {names}' for name in names if not name]


API = r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+(?:/[^/]+)?)"
WEB = r"/(?P<kind>datasets/)?(?P<name>[^/]+(?:/[^/]+)?)"

ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create_repository),
    ("GET", API + "(/revision/(?P<revision>[^/]+))?", Handler.info),
    ("GET", API + "/refs", Handler.refs),
    ("POST", API + "/branch/(?P<branch>[^/]+)", Handler.create_branch),
    ("GET", API + "/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", Handler.tree),
    ("POST", API + "/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("POST", API + "/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", API + "/commit/(?P<revision>[^/]+)", Handler.commit),
    ("GET", WEB + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ("POST", WEB + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("GET", "/storage/(?P<oid>[0-9a-f]{64})/(?P<path>.+)", Handler.download),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})(/part/(?P<part>[0-9]+))?", Handler.lfs_put),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/complete", Handler.lfs_complete),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", Handler.lfs_verify),
]
