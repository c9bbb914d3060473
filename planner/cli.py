"""The command line: `planner.commands` may import every package, and only inside the command that needs it.

stdout carries the result, stderr the progress and the errors. Exit codes: 0 done, 1 a bug of ours, 2 the user's error
(one sentence), 3 nothing fits.
"""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from planner.commands import app, cluster, learn, plan, run, validate, write
from simulator.errors import UserError

__all__ = ["app", "cluster", "learn", "main", "plan", "run", "validate", "write"]


def main() -> None:
    """Entry point: a user's error becomes one sentence and its exit code, a bug stays a traceback."""
    # A scheduler ends a job with SIGTERM; the ranks that we started must not outlive it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except UserError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        # Wrong options, which typer knows and has a sentence for.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
