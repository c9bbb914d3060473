"""`python -m runtime` on a rank that dies as it is told to.

Run by test_elastic.py: `torchrun elastic_worker.py DEATHS ARGUMENTS...`. DEATHS is a JSON list: the n-th start of the
ranks ends as its n-th entry says, and starts beyond it are left alone. An entry is [rank, where, number, seconds]: that
rank is killed so many seconds after `where` has come for the number-th time in this start: "step" (a step is done) or
"save" (the files of a checkpoint are written, but it has not got its name).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

DEATH = "this rank is killed"


def die_later(seconds: float) -> None:
    if seconds == 0:
        die()
    threading.Timer(seconds, die).start()


def die() -> None:
    # torchrun names the rank that it saw end first, which may be another that lost this one.
    print(DEATH, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    deaths, *arguments = sys.argv[1:]
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    planned = json.loads(deaths)
    if start < len(planned) and planned[start][0] == int(os.environ["RANK"]):
        arm(*planned[start][1:])
    from runtime import __main__ as entry

    sys.argv = ["runtime", *arguments]
    entry.run_rank()


def arm(where: str, number: int, seconds: float) -> None:
    from runtime import checkpoint_folder
    from runtime.step import Run

    owner: Any = {"step": Run, "save": checkpoint_folder}[where]
    name = {"step": "step", "save": "complete"}[where]
    original, left = getattr(owner, name), number

    def count(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if where == "save" and left == 0:
            die_later(seconds)
            threading.Event().wait(seconds)
        done = original(*arguments)
        if where == "step" and left == 0:
            die_later(seconds)
        return done

    setattr(owner, name, count)


if __name__ == "__main__":
    main()
