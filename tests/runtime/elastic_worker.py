"""`python -m runtime` on a rank that dies as it is told to.

Run by test_elastic.py: `torchrun elastic_worker.py DEATHS ARGUMENTS...`. DEATHS is a JSON list: the n-th start of the
ranks ends as its n-th entry says, and starts beyond it are left alone. An entry is [rank, where, seconds]: that rank is
killed so many seconds after `where`: "step" (its first step in this start is done) or "save" (its second checkpoint
in this start is written, but has not got its name).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any


def die_later(seconds: float) -> None:
    if seconds == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def main() -> None:
    deaths, *arguments = sys.argv[1:]
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    planned = json.loads(deaths)
    if start < len(planned) and planned[start][0] == int(os.environ["RANK"]):
        arm(*planned[start][1:])
    from runtime import __main__ as entry

    sys.argv = ["runtime", *arguments]
    entry.run_rank()


def arm(where: str, seconds: float) -> None:
    if where == "save":
        from runtime import checkpoint_folder

        complete, saves = checkpoint_folder.complete, []

        def second(*files: Any) -> Any:
            saves.append(files)
            return complete(*files) if len(saves) == 1 else die_later(seconds)

        checkpoint_folder.complete = second
        return
    from runtime.step import Run

    step = Run.step

    def first(run: Run, *batch: Any) -> Any:
        done = step(run, *batch)
        Run.step = step  # type: ignore[method-assign]
        die_later(seconds)
        return done

    Run.step = first  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
