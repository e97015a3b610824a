"""The HTTP protocol of the Hub of `hub_server`: one method per request that the client makes."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .hub_repositories import (
    DATE,
    File,
    HubError,
    Repository,
    card_errors,
    entry_of,
    front_matter,
)

MULTIPART_SIZE = 1 << 13  # bytes; small, so that models are uploaded in several parts


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; the subclass that a server makes knows its `hub`."""

    protocol_version = "HTTP/1.1"
    wbufsize = (
        1 << 16
    )  # header and content leave together, or the client's delayed acknowledgement costs 40 ms
    hub: Any  # the HubServer

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
                self._send_json({"error": "You already created this repository", "url": url}, 409)
                return
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
            self._send(404, b"Entry not found", headers)
            return
        headers["ETag"] = f'"{file.etag}"'
        if not file.large:
            self._send_range(path, file.content, headers)
            return
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
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            status, headers = (
                206,
                headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"},
            )
        cuts = self.hub.cut_downloads.get(path)
        if not cuts or self.command == "HEAD":
            self._send(status, content[start:end], headers)
            return
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
