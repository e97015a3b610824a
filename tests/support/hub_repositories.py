"""What the Hub of `hub_server` keeps: repositories, their commits and files, in memory."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field

import yaml

DATE = "2026-01-01T00:00:00.000Z"
REPO_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


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
    """What the Hub objects to in a card's metadata: names that cannot be those of repositories."""
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
