"""Two hosts on one machine: network namespaces that a shaped pair of virtual Ethernet devices joins (Linux only).

    python -m runtime.hosts --rate BYTES --delay SECONDS -- torchrun ...

starts torchrun once on each host, with half of the processors each, and gloo on the link between them. Ranks of one
host talk over its loopback, which is as fast as ever. Nothing has to be cleaned up: namespaces have no names, so that
the kernel removes them, and all that is in them, with their last process; and `unshare --pid --kill-child` under
`setpriv --pdeathsig` lets no process outlive the one that asked for it, however that ends. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from simulator.hosts import HOSTS, Wire

DEVICE = "lw0"
# TEST-NET-1 (RFC 5737): an address that nothing else has, and in namespaces of their own nobody sees it anyway.
ADDRESSES = ("192.0.2.1", "192.0.2.2")
PORT = 29500
# Seconds of sending at the full rate that tbf lets through at once, and bytes at least: it sends some 64 KiB at a time.
_BURST_SECONDS, _LEAST_BURST = 1e-3, 128 * 1024
# How long a packet may wait for its turn until it is dropped (tc-tbf(8), latency).
_QUEUE = "20ms"
_PATIENCE = 10.0
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "setpriv": "util-linux"}


def on_two_hosts(wire: Wire, torchrun: Sequence[str]) -> list[str]:
    """The command that runs this torchrun on both hosts, with the options that tell them from each other added."""
    rate = [] if math.isinf(wire.bandwidth) else [f"--rate={wire.bandwidth!r}"]
    delay = [f"--delay={wire.delay!r}"] if wire.delay else []
    return [*_in_a_namespace(), sys.executable, "-m", "runtime.hosts", *rate, *delay, "--", *torchrun]


def _in_a_namespace() -> list[str]:
    """What begins a command that has a network and processes of its own, and ends when who started it does. Who is not
    root is root in a namespace of users, where the kernel lets him."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *user, "--net", "--pid", "--fork", "--kill-child"]


def hindrance(wire: Wire) -> str | None:
    """Why this machine cannot make two hosts with such a link, in words; None if it can. It tries."""
    if sys.platform != "linux":
        return "two hosts on one machine need Linux, its network namespaces"
    for tool, package in _TOOLS.items():
        if shutil.which(tool, path=_path()) is None:
            return f"two hosts on one machine need the program '{tool}' ({package}), which is not installed"
    command = on_two_hosts(wire, ["true"])
    try:
        result = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=2 * _PATIENCE)
    except subprocess.TimeoutExpired:
        return "two hosts on one machine: making their network namespaces took too long"
    if result.returncode == 0:
        return None
    said = [line for line in result.stderr.splitlines() if line.strip()] or [f"exit code {result.returncode}"]
    return f"this system does not permit two hosts on one machine: {said[-1].removeprefix('error: ').strip()}"


def _path() -> str:
    """Where programs lie; those of iproute2 are not on everybody's path."""
    return os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    found = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return os.environ | {"PATH": _path(), "PYTHONPATH": found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Be the first host, inside of a new network namespace: make the second one, and run a torchrun on each."""
    parser = argparse.ArgumentParser(prog="python -m runtime.hosts", description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, help="bytes per second each way; nothing limits it without")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds one way")
    parser.add_argument("--second", type=int, help="be the second host, and say in this file that it is there")
    parser.add_argument("command", nargs="+", help="torchrun with its arguments")
    options = parser.parse_args(arguments)
    wire = Wire(options.rate or math.inf, options.delay)
    os.environ |= _environment()
    try:
        if options.second is not None:
            _be_second(wire, options.second, options.command)
        return _be_first(wire, sys.argv[1:] if arguments is None else list(arguments), options.command)
    except (subprocess.CalledProcessError, OSError, TimeoutError) as error:
        said = getattr(error, "stderr", "") or str(error)
        sys.stderr.write(f"error: {said.strip().splitlines()[-1]}\n")
        return 2


def _be_first(wire: Wire, arguments: Sequence[str], command: Sequence[str]) -> int:
    """Make the link once the second host is there, then run both to their end; when one fails the other ends too."""
    ready, told = os.pipe()
    # Whoever ends this process signals its group; the torchruns are in it, and this waits for them.
    signal.signal(signal.SIGTERM, lambda *_: None)
    again = [sys.executable, "-m", "runtime.hosts", f"--second={told}", *arguments]
    second = subprocess.Popen(["unshare", "--net", *again], pass_fds=(told,))
    os.close(told)
    try:
        if not os.read(ready, 1):
            second.wait()
            raise OSError("the second host could not be made")
        _ip("link", "set", "lo", "up")
        _ip("link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", str(second.pid))
        _configure(wire, 0)
        first = subprocess.Popen(_torchrun(command, 0), preexec_fn=lambda: _take_processors(0))
        return _wait(first, second)
    finally:
        if second.poll() is None:
            second.kill()


def _wait(*hosts: subprocess.Popen[bytes]) -> int:
    """The first exit code that is not 0, once all have ended; one that fails takes the others along."""
    code = 0
    while None in [host.poll() for host in hosts]:
        time.sleep(0.05)
        failed = next((host.returncode for host in hosts if host.returncode), 0)
        if failed and not code:
            code = failed
            for host in hosts:
                if host.poll() is None:
                    host.terminate()
    return code or next((host.returncode for host in hosts if host.returncode), 0)


def _be_second(wire: Wire, told: int, command: Sequence[str]) -> NoReturn:
    """Say that this namespace is there, wait for the link to appear in it, and become its torchrun."""
    os.write(told, b"1")
    os.close(told)
    _await_link(DEVICE, "the link to the first host did not appear")
    _ip("link", "set", "lo", "up")
    _configure(wire, 1)
    # A command that ends before the first host is ready would take the link with it.
    _await_link("LOWER_UP", "the first host did not configure the link")
    _take_processors(1)
    os.execvp(command[0], _torchrun(command, 1))


def _await_link(word: str, otherwise: str) -> None:
    """Wait until `ip link show` of the device says this word. Raises TimeoutError with the sentence if it does not."""
    deadline = time.monotonic() + _PATIENCE
    while word not in subprocess.run(["ip", "link", "show", DEVICE], capture_output=True, text=True).stdout:
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.02)


def _configure(wire: Wire, host: int) -> None:
    """Give this end of the link its address and shape what leaves it."""
    _ip("addr", "add", f"{ADDRESSES[host]}/24", "dev", DEVICE)
    parent = ["root"]
    if wire.delay:
        try:
            # As many packets as the wire holds, and some.
            _tc(*parent, "handle", "1:", "netem", "delay", f"{wire.delay * 1e6:.0f}us", "limit", "1000000")
        except subprocess.CalledProcessError as error:
            raise OSError(
                f"the delay needs the kernel's netem, and tc says: {error.stderr.strip().splitlines()[-1]} "
                "Leave the delay out"
            ) from None
        parent = ["parent", "1:1"]
    if not math.isinf(wire.bandwidth):
        burst = max(_LEAST_BURST, int(wire.bandwidth * _BURST_SECONDS))
        _tc(*parent, "tbf", "rate", f"{wire.bandwidth * 8:.0f}bit", "burst", str(burst), "latency", _QUEUE)
    # Last, because the other end takes it for a sign that this one is ready.
    _ip("link", "set", DEVICE, "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _tc(*arguments: str) -> None:
    command = ["tc", "qdisc", "add", "dev", DEVICE, *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _torchrun(command: Sequence[str], host: int) -> list[str]:
    """torchrun's options for one of the hosts, behind the module; other commands stay as they are."""
    if "torch.distributed.run" not in command:
        return list(command)
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    place = command.index("torch.distributed.run") + 1
    meeting = [f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}"]
    return [*command[:place], f"--nnodes={HOSTS}", f"--node-rank={host}", *meeting, *command[place:]]


def _take_processors(host: int) -> None:
    """Keep this process and its children on one half of the processors; the middle one of an odd number idles."""
    with contextlib.suppress(OSError):
        allowed = sorted(os.sched_getaffinity(0))
        half = len(allowed) // HOSTS
        os.sched_setaffinity(0, allowed[:half] if host == 0 else allowed[-half:])


if __name__ == "__main__":
    raise SystemExit(main())
