"""Runs run_mlm.py in children that are killed at random moments, until it gets through.

It prints what happened as JSON.

    python tests/support/killed_runs.py KILLS SEED [arguments of run_mlm.py]

The children are forks of one process that has imported everything, so they start at once.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from lion_hf.tasks import mlm
from lion_hf.training import checkpoints


def start(argv: list[str]) -> int:
    """The process number of a child that trains and ends."""
    child = os.fork()
    if child == 0:
        try:
            mlm.main(argv)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return child


def whole(output: Path) -> bool:
    """Whether there is a checkpoint to continue from; one that is being written is none yet."""
    return any(checkpoints.damage(folder) is None for folder in checkpoints.checkpoints(output))


def main() -> None:
    kills, seed, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    output, moments = Path(argv[argv.index("--output_dir") + 1]), random.Random(seed)
    start_time = time.perf_counter()
    warm_up = [*argv[: argv.index("--output_dir")], "--output_dir", f"{output}-whole"]
    assert os.waitpid(start(warm_up), 0)[1] == 0, "the unbroken run fails"
    duration, report = time.perf_counter() - start_time, []
    while len(report) < kills:
        child = start(argv)
        time.sleep(moments.uniform(0.15, 0.75) * duration)
        late = time.perf_counter() + 4 * duration
        # the later half is killed with something to continue from, however slow the start is
        while len(report) >= kills // 2 and not whole(output) and time.perf_counter() < late:
            time.sleep(0.01)
        name = moments.choice(["SIGKILL", "SIGTERM", "SIGINT"])
        os.kill(child, getattr(signal, name))
        status = os.waitpid(child, 0)[1]
        found = checkpoints.checkpoints(output)
        broken = [folder.name for folder in found if checkpoints.damage(folder)]
        report.append(
            {
                "signal": name,
                "finished": status == 0,
                "found": [folder.name for folder in found],
                "broken": broken,
            }
        )
    assert os.waitpid(start(argv), 0)[1] == 0, "the last run fails"
    print(json.dumps(report))


if __name__ == "__main__":
    main()
