"""A rank's connection to the watch beside rank 0."""

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn

import psutil

from mesp_ref.errors import MespRefError, escaped
from mesp_ref.spread import watch

_BEAT = 1.0  # seconds between two signs of life


class Address(NamedTuple):
    """Where the watch is, for all ranks."""

    hosts: tuple[str, ...]  # the addresses of rank 0's machine; some may not be reachable from here
    port: int
    token: str  # what a stranger on the network does not know


def start_watch(size: int, patience: float) -> tuple[Address, subprocess.Popen[bytes]]:
    """Start the watch, in a session of its own: the launcher is not to end it with the ranks."""
    token = secrets.token_hex(16)
    process = subprocess.Popen(
        [sys.executable, "-I", watch.__file__, str(size), str(patience), str(_launcher())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(token.encode() + b"\n")
    process.stdin.close()
    port = int(process.stdout.readline())
    process.stdout.close()
    return Address(_addresses(), port, token), process


def _launcher() -> int:
    """The process number of the mpiexec that started this rank; 0 where it is not on this machine."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            if process.name().startswith(("mpiexec", "mpirun", "prterun")):
                return int(process.pid)
    return 0


def _addresses() -> tuple[str, ...]:
    """This machine's addresses, those that others can reach first."""
    found = [
        address.address
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family in (socket.AF_INET, socket.AF_INET6)
    ]
    return tuple(sorted(found, key=lambda text: text.startswith(("127.", "::1"))))


class Link:
    """Signs of life to the watch, from a thread; the process ends when the watch says so.

    at     what this rank is doing, in a few words
    moves  grows as it gets on
    waits  whether it waits for other ranks
    saved  what lies on disk, for the line that the watch may have to print
    """

    def __init__(self, address: Address, rank: int, host: str):
        self.rank, self.host = rank, host
        self.at, self.moves, self.waits, self.saved = "the start", 0, False, ""
        self._connection = self._reach(address)
        self._lock = threading.Lock()
        self._send(token=address.token, rank=rank, host=host, pid=os.getpid())
        self._left = threading.Event()
        for target in (self._beat, self._listen):
            threading.Thread(target=target, daemon=True).start()

    def _reach(self, address: Address) -> socket.socket:
        """A connection by the first of rank 0's addresses that answers."""
        for host in sorted(address.hosts, key=lambda text: text.startswith(("127.", "::1"))):
            with contextlib.suppress(OSError):
                connection = socket.create_connection((host, address.port), timeout=3)
                connection.settimeout(None)
                return connection
        raise MespRefError(
            f"rank {self.rank}: cannot reach port {address.port} of rank 0's machine at any of "
            f"{', '.join(address.hosts)}; let the machines' firewall pass it"
        )

    def _send(self, **line: Any) -> None:
        with self._lock:
            self._connection.sendall(json.dumps(line).encode() + b"\n")

    def _beat(self) -> None:
        while not self._left.wait(_BEAT):
            with contextlib.suppress(OSError):
                self._send(at=self.at, moves=self.moves, waits=self.waits, saved=self.saved)

    def _listen(self) -> None:
        """Wait for the end, or for silence: then rank 0's machine is not there any more."""
        self._connection.settimeout(watch.SILENCE)
        reason = "its watch was killed"
        try:
            while piece := self._connection.recv(1 << 12):
                if found := re.search(rb'"end": *(\d{1,3})}', piece):
                    self._quit(None, int(found[1]))
        except TimeoutError:
            reason = f"its machine has not been heard of for {watch.SILENCE:.0f} s"
        except OSError as error:
            reason = str(error.strerror)
        if not self._left.is_set():
            self._quit(f"rank {self.rank}: rank 0 is lost: {reason}")

    def _quit(self, reason: str | None, code: int = 2) -> None:
        """End this process, whatever its other threads are waiting for."""
        if reason is not None:
            print(f"mesp-ref: error: {escaped(reason)}", file=sys.stderr, flush=True)
        if not self._left.is_set():
            os._exit(code)

    def waiting(self, waits: bool) -> None:
        """A wait for others begins or ends."""
        self.waits = waits

    def fail(self, message: str) -> NoReturn:
        """Have the watch print why this rank ends, and all others end."""
        self._last(error=escaped(" ".join(message.split())))

    def end(self, code: int = 2) -> NoReturn:
        """Have all end with an exit code: rank 0 itself says why."""
        self._last(end=code)

    def _last(self, **line: Any) -> NoReturn:
        with contextlib.suppress(OSError):
            self._send(**line)
        time.sleep(watch.FAREWELL)  # the thread that listens ends the process before
        os._exit(2)

    def leave(self) -> None:
        """Say that this rank ends well."""
        self._left.set()
        with contextlib.suppress(OSError):
            self._send(left=True)
