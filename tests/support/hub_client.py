"""A Python process that uses the real `huggingface_hub` against a `HubServer`."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from .hub_server import HubServer

ROOT = Path(__file__).resolve().parents[2]

# Runs pieces of code, one JSON line each, and answers with what they leave in `result`.
WORKER = """
import contextlib, importlib.abc, io, json, sys, time, traceback

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = json.loads(sys.argv[1])
sys.meta_path.insert(0, Blocker())
answers, sys.stdout = sys.stdout, sys.stderr
sleep = time.sleep
for line in sys.stdin:
    job = json.loads(line)
    names, printed, answer = dict(job["names"]), io.StringIO(), {}
    time.sleep = sleep if job["waits"] else lambda seconds: None
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            exec(compile(job["code"], "<job>", "exec"), names)
        answer["result"] = names.get("result")
    except BaseException as error:
        kinds = [cls.__name__ for cls in type(error).__mro__]
        answer["error"] = [kinds, str(error), traceback.format_exc()]
    answer["printed"] = printed.getvalue()
    answers.write(json.dumps(answer) + "\\n")
    answers.flush()
"""


class ClientError(AssertionError):
    """What a piece of code raised in the client; `kinds` names its class and those above."""

    def __init__(self, kinds: list[str], message: str, trace: str):
        super().__init__(trace)
        self.kinds, self.message = kinds, message


class HubClient:
    """The process; a context manager.

    Args:
        hub: the only Hub that it knows.
        home: folder for its caches, and its working directory.
        prelude: code that runs before every piece of code.
        token: what it is logged in with; None for nobody.
        lion: whether it can import lion_hf (and triton).
    """

    def __init__(
        self,
        hub: HubServer,
        home: Path,
        prelude: str = "",
        token: str | None = "hf_owner",
        lion: bool = True,
    ):
        blocked = [] if lion else ["lion_hf", "triton"]
        environment = {
            **os.environ,
            **hub.environment(home, token),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "",
        }
        if lion:
            environment["PYTHONPATH"] = str(ROOT)
        home.mkdir(parents=True, exist_ok=True)
        self.prelude, self.printed = prelude, ""
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(blocked)],
            cwd=home,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> "HubClient":
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def send(self, *pieces: str, waits: bool = True, **names: Any) -> None:
        """Starts code without waiting for its answer."""
        code = "\n".join([self.prelude, *map(textwrap.dedent, pieces)])
        self._process.stdin.write(json.dumps({"code": code, "waits": waits, "names": names}) + "\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """Kills the process in the midst of its work."""
        self._process.kill()
        self._process.wait()

    def run(self, *pieces: str, waits: bool = True, **names: Any) -> Any:
        """Runs code; `printed` then holds what it printed.

        Args:
            pieces: the code, one piece after the other.
            waits: whether `time.sleep` sleeps, as the Hub's client does between its attempts.
            names: what the code finds under these names, values of JSON.

        Returns:
            What the code leaves in `result`.

        Raises:
            ClientError: for what the code raised.
        """
        self.send(*pieces, waits=waits, **names)
        line = self._process.stdout.readline()
        assert line, f"the client ended with status {self._process.wait()}"
        answer = json.loads(line)
        self.printed = answer["printed"]
        if "error" in answer:
            kinds, message, trace = answer["error"]
            raise ClientError(kinds, message, f"{self.printed}\n{trace}")
        return answer["result"]
