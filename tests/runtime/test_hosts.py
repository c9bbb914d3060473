"""Two hosts in network namespaces: a link that is as slow as it says, and nothing left behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import hosts
from runtime.hosts import hindrance, on_two_hosts
from simulator.hosts import Wire

WIRE = Wire(20e6)
REASON = hindrance(WIRE)
permitted = pytest.mark.skipif(REASON is not None, reason=REASON or "")

# Each host runs it: the one with the first address receives, the other one sends.
TRANSFER = """
import socket, time
size = 10_000_000
try:
    server = socket.create_server(("192.0.2.1", 5000))
except OSError:
    for _ in range(100):
        try:
            line = socket.create_connection(("192.0.2.1", 5000))
            break
        except OSError:
            time.sleep(0.05)
    line.sendall(bytes(size))
    line.shutdown(socket.SHUT_WR)
    assert line.recv(1) == b"x"
else:
    line, _ = server.accept()
    begin, got = time.perf_counter(), 0
    while got < size:
        got += len(line.recv(1 << 20))
    print(time.perf_counter() - begin, flush=True)
    line.sendall(b"x")
"""


def alive(mark: str) -> list[int]:
    """Processes with this word on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if mark in words:
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def sleeping(mark: str) -> int:
    """Of those processes the ones that sleep, one for each host, and in a namespace each."""
    names = set()
    for pid in alive(mark):
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == "sleep":
                names.add(os.readlink(f"/proc/{pid}/ns/net"))
        except OSError:
            continue
    return len(names - {os.readlink("/proc/self/ns/net")})


def environment() -> dict[str, str]:
    return hosts._environment()


@permitted
def test_the_link_is_as_slow_as_it_says() -> None:
    """10 MB at 20 MB/s, of which 1448 of 1514 bytes are payload: 0.52 s, less what may be sent at once."""
    command = on_two_hosts(WIRE, [sys.executable, "-c", TRANSFER])
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert 0.48 < float(result.stdout) < 2.0
    # Without the limit the same takes some hundredths of it.
    command = on_two_hosts(Wire(), [sys.executable, "-c", TRANSFER])
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert float(result.stdout) < 0.4


@permitted
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ending_it_ends_both_hosts(number: signal.Signals) -> None:
    mark = f"6{os.getpid()}.{int(number)}"
    process = subprocess.Popen(on_two_hosts(WIRE, ["sleep", mark]), env=environment(), start_new_session=True)
    assert wait_until(lambda: sleeping(mark) == 2)
    os.killpg(process.pid, number)
    process.wait(timeout=20)
    assert wait_until(lambda: alive(mark) == [])


@permitted
def test_nothing_outlives_who_started_it() -> None:
    """The process that asked for two hosts is killed, so that it cannot clean up; the kernel does."""
    mark = f"7{os.getpid()}.5"
    script = (
        "import subprocess, time; from runtime.hosts import on_two_hosts; from simulator.hosts import Wire\n"
        f"subprocess.Popen(on_two_hosts(Wire(2e7), ['sleep', '{mark}']), start_new_session=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment())
    assert wait_until(lambda: sleeping(mark) == 2)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: alive(mark) == [])
    assert hosts.DEVICE not in os.listdir("/sys/class/net")


@permitted
def test_a_host_that_fails_ends_the_other_one() -> None:
    """The second host has no such address and fails at once; the first one would sleep for long."""
    script = "import socket, time; socket.create_server(('192.0.2.1', 5000)); time.sleep(60)"
    begin = time.monotonic()
    command = on_two_hosts(WIRE, [sys.executable, "-c", script])
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "Cannot assign requested address" in result.stderr
    assert time.monotonic() - begin < 20


@permitted
def test_a_kernel_without_a_delay_says_so() -> None:
    """Where the kernel has netem the delay is made."""
    reason = hindrance(Wire(1e8, 1e-3))
    assert reason is None or "the delay needs the kernel's netem" in reason


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as changed:
        changed.setattr(sys, "platform", "darwin")
        assert "need Linux" in (hindrance(WIRE) or "")
    with monkeypatch.context() as changed:
        changed.setattr(hosts.shutil, "which", lambda name, path: None if name == "tc" else name)
        assert "the program 'tc' (iproute2), which is not installed" in (hindrance(WIRE) or "")
    refusing = [sys.executable, "-c", "import sys; sys.exit('unshare: Operation not permitted')"]
    with monkeypatch.context() as changed:
        changed.setattr(hosts.shutil, "which", lambda name, path: name)
        changed.setattr(hosts, "on_two_hosts", lambda *_: refusing)
        assert (hindrance(WIRE) or "").endswith(
            "does not permit two hosts on one machine: unshare: Operation not permitted"
        )


def test_torchrun_learns_which_host_it_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    command = ["python", "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "runtime", "plan.json"]
    told = ["--nnodes=2", "--node-rank=1", "--master-addr=192.0.2.1", "--master-port=29500"]
    assert hosts._torchrun(command, 1) == [*command[:3], *told, *command[3:]]
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lw0"
    assert hosts._torchrun(["true"], 1) == ["true"]
