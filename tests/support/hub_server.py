"""A small Hugging Face Hub on 127.0.0.1, for tests that use the real client.

    with HubServer() as hub:
        subprocess.run(command, env=os.environ | hub.environment(home))

It keeps repositories in memory and speaks the part of the Hub's HTTP protocol that
`huggingface_hub` uses without Xet: repositories, branches, preupload, the LFS batch protocol (also
multipart), commits, file trees, and downloads with redirects and ranges. `HF_ENDPOINT` is read when
`huggingface_hub` is imported, so clients must be subprocesses.
"""

import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

from .hub_protocol import Handler
from .hub_repositories import File, Repository


class HubServer:
    """The server; a context manager. Everything it holds may be read and changed by tests.

    Attributes:
        repositories: by (kind, name), kind "model" or "dataset".
        objects: the LFS store, by SHA-256.
        tokens: token -> user.
        requests: (method, path, status, value of the Range header) of every request, in order.
        cut_downloads: path -> for each download, the bytes after which the connection breaks.
        refuse_uploads: number of LFS uploads that break the connection halfway.
        stop_uploads: while set, LFS uploads after the first part get no answer.
        upload_stopped: set when that has happened.
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
        """Environment variables for a client of this Hub only, with its caches in `home`."""
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
