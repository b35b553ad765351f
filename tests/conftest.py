"""What holds for every test: one thread, throw-away caches, and no way out to the network."""

import ipaddress
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

ROOT = Path(__file__).resolve().parents[1]

# For this process only: in the environment it would also keep kernels from showing their figures.
matplotlib.use("Agg")

# Before torch is imported: results are bit-identical for one thread count only.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell starts what runs in its background with interrupts ignored, and children inherit that;
# the tests send some.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def throw_away_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`mmdd.paths.cache_dir()` of the tests and their subprocesses is a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMDD_CACHE", str(tmp_path_factory.mktemp("mmdd-cache")))
        yield


# What follows a script that defines `job(*words)`: for every line it reads, the job in a process of
# its own, which can be shot. Importing torch once saves ten seconds each.
_FORK = """
import os
import sys

import torch

torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        job(*line.split())
        os._exit(0)
    print("pid", child, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def forking(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """forking(script): a process that reads lines of words and forks `job(*words)` for each.

    It prints "pid <child>" and, when the child is gone, "ended <exit code>"; what the job prints
    comes in between.
    """
    servers: list[subprocess.Popen[str]] = []

    def start(script: str) -> subprocess.Popen[str]:
        path = tmp_path_factory.mktemp("forking") / "server.py"
        path.write_text(script + _FORK)
        server = subprocess.Popen(
            [sys.executable, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.communicate()


def _leaves_this_machine(family: int, kind: int, address: Any) -> bool:
    """True for a TCP connection to somewhere else.

    Datagram sockets pass: "connecting" one sends nothing, and dask asks for its own address so.
    """
    if family not in (socket.AF_INET, socket.AF_INET6) or not kind & socket.SOCK_STREAM:
        return False
    host = address[0]
    if host in ("", "localhost", socket.gethostname()):
        return False
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return True
    if ip.is_loopback or ip.is_unspecified:
        return False
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))  # works for the machine's own addresses only
        except OSError:
            return True
    return False


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """A connection that leaves this machine is an error, whatever library asks for it."""
    real_connect, real_connect_ex = socket.socket.connect, socket.socket.connect_ex

    def refuse_outside(sock: socket.socket, address: Any) -> None:
        if _leaves_this_machine(sock.family, sock.type, address):
            raise RuntimeError(
                f"a test tried to connect to {address!r}: tests use local servers only"
            )

    def connect(sock: socket.socket, address: Any) -> None:
        refuse_outside(sock, address)
        real_connect(sock, address)

    def connect_ex(sock: socket.socket, address: Any) -> int:
        refuse_outside(sock, address)
        return real_connect_ex(sock, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        patch.setattr(socket.socket, "connect_ex", connect_ex)
        yield
