"""A process beside rank 0 that knows which rank is lost, and says so in one line.

MPI itself cannot: when a rank is killed, the launcher kills the others before they can speak, and
when a rank hangs, the others wait for it without end. So every rank holds a TCP connection to this
process and is heard of once a second. Standard library only, started by its path: it is to stay
small, and to outlive what happens to NumPy, MPI and their process group.

A line is JSON. From a rank: {"token", "rank", "host", "pid"} first; then {"at", "moves", "waits",
"saved"};
{"error"} when it fails, {"end"} with an exit code when it says why itself; {"left"} when it ends well.
To a rank: {"alive"} once a second, {"end"} with an exit code.
"""

import contextlib
import json
import os
import select
import selectors
import signal
import socket
import sys
import time
from typing import Any

SILENCE = 12.0  # seconds without a word after which a rank is given up
MEETING = 120.0  # seconds within which all ranks must have come
FAREWELL = 3.0  # seconds that the others have to end, and then the launcher
_LONGEST = 1 << 16  # bytes of a line


class Peer:
    """A rank at the other end of a connection."""

    def __init__(self, connection: socket.socket):
        self.connection, self.waiting = connection, b""
        self.rank, self.host, self.pid = -1, "?", 0
        self.heard = self.moved = time.monotonic()
        self.at, self.moves, self.waits, self.left = "the start", 0, False, False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    def send(self, **line: Any) -> None:
        """Best effort: who does not read is found out by its silence."""
        with contextlib.suppress(OSError):
            self.connection.send(json.dumps(line).encode() + b"\n")

    def lines(self) -> list[dict[str, Any]] | None:
        """What has come since the last call; None at the end of the connection."""
        try:
            piece = self.connection.recv(_LONGEST)
        except BlockingIOError:
            return []
        except OSError:
            piece = b""
        if not piece or len(self.waiting) > _LONGEST:
            return None
        *whole, self.waiting = (self.waiting + piece).split(b"\n")
        try:
            found = [json.loads(line) for line in whole]
        except ValueError:
            return None
        return found if all(isinstance(line, dict) for line in found) else None


class Watch:
    """Listens until all ranks have left, or until one is lost, which ends the others."""

    def __init__(self, size: int, token: str, patience: float):
        self.size, self.token, self.patience = size, token, patience
        self.peers: dict[int, Peer] = {}
        self.saved, self.said = "", False
        self.selector = selectors.DefaultSelector()
        self.began = self.looked = time.monotonic()
        self.ended: float | None = None

    def run(self, listener: socket.socket) -> int:
        """Serve; 0 when all left well, 2 when the run was ended."""
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ)
        try:
            self._serve(listener)
        finally:
            for key in list(self.selector.get_map().values()):
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()
            self.selector.close()
        return 2 if self.ended else 0

    def _serve(self, listener: socket.socket) -> None:
        beat = 0.0
        while not self._done():
            # In the order in which they became ready: the first to be lost was lost first.
            for key, _ in self.selector.select(0.25):
                if key.data is None:
                    self._accept(listener)
                else:
                    self._read(key.data)
            now = time.monotonic()
            if now - beat > 1:
                beat = now
                for peer in self.peers.values():
                    peer.send(alive=True)
            self._judge(now)

    def _done(self) -> bool:
        if self.ended is not None:
            return not self.peers or time.monotonic() - self.ended > FAREWELL
        return len(self.peers) == self.size and all(p.left for p in self.peers.values())

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.setblocking(False)
        self.selector.register(connection, selectors.EVENT_READ, Peer(connection))

    def _read(self, peer: Peer) -> None:
        lines = peer.lines()
        for line in lines or ():
            if peer.rank < 0 and not self._known(peer, line):
                lines = None
                break
            self._take(peer, line)
        if lines is None:
            self.selector.unregister(peer.connection)
            peer.connection.close()
            if self.peers.get(peer.rank) is peer and not peer.left:
                del self.peers[peer.rank]
                self._end(
                    f"{peer}: lost at {peer.at}: it was killed, by hand or for want of memory, or "
                    "its machine went away"
                )

    def _known(self, peer: Peer, line: dict[str, Any]) -> bool:
        """Whether a newcomer is one of ours."""
        rank = line.get("rank")
        if line.get("token") != self.token or type(rank) is not int or rank in self.peers:
            return False
        peer.rank, peer.host, peer.pid = rank, str(line.get("host")), int(line.get("pid", 0))
        self.peers[rank] = peer
        return True

    def _take(self, peer: Peer, line: dict[str, Any]) -> None:
        peer.heard = time.monotonic()
        place = (line.get("moves", peer.moves), str(line.get("at", peer.at)))
        waits = bool(line.get("waits", peer.waits))
        if (*place, waits) != (peer.moves, peer.at, peer.waits):
            (peer.moves, peer.at), peer.waits, peer.moved = place, waits, peer.heard
        self.saved = str(line.get("saved", "")) or self.saved
        peer.left = peer.left or "left" in line
        if "error" in line:
            self._end(f"{peer}: {line['error']}")
        elif "end" in line:
            self._end(None, line["end"])

    def _judge(self, now: float) -> None:
        """Look for ranks that did not come, are silent, or hold the others up."""
        paused, self.looked = now - self.looked > SILENCE / 3, now
        if paused:  # it was this process that slept, maybe with the whole machine
            for peer in self.peers.values():
                peer.heard = peer.moved = now
        if self.ended is not None:
            return
        if len(self.peers) < self.size and now - self.began > MEETING:
            missing = ", ".join(str(r) for r in range(self.size) if r not in self.peers)
            self._end(f"rank {missing}: did not come within {MEETING:.0f} s of the start")
            return
        there = [peer for _, peer in sorted(self.peers.items()) if not peer.left]
        if any(now - peer.heard > SILENCE for peer in there):
            silent = [peer for peer in there if now - peer.heard > 0.8 * SILENCE]
            names = ", ".join(map(str, silent))
            why = (
                "it hangs, or its machine is cut off" if len(silent) == 1 else "cut off from rank 0"
            )
            self._end(f"{names}: not heard of for {SILENCE:.0f} s at {silent[0].at}: {why}")
            return
        held_up = any(p.waits and now - p.moved > self.patience for p in there)
        for peer in there:
            if held_up and not peer.waits and now - peer.moved > self.patience:
                self._end(
                    f"{peer}: has not moved from {peer.at} for {self.patience:.0f} s while others "
                    "wait for it"
                )
                return

    def _end(self, reason: str | None, code: object = 2) -> None:
        """Say why, unless somebody else does, and have all ranks end with an exit code."""
        if self.ended is None:
            self.ended = time.monotonic()
            if reason is not None:
                after = f"; {self.saved}" if self.saved else ""
                print(f"mesp-ref: error: {reason}{after}", file=sys.stderr, flush=True)
        for peer in self.peers.values():
            peer.send(end=code)


class Launcher:
    """mpiexec, which waits without end for a machine that is cut off. Linux; elsewhere left alone."""

    def __init__(self, process: int):
        self.handle = -1
        if process and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self.handle = os.pidfd_open(process)  # no later process of this number is meant

    def end(self) -> None:
        """Give it time to end by itself, then end it."""
        if self.handle >= 0 and not select.select([self.handle], [], [], FAREWELL)[0]:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)


def listening() -> socket.socket:
    """A socket on a free port of all interfaces."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def main(size: str, patience: str, process: str) -> int:
    """Read the token, tell the port, watch."""
    listener, launcher = listening(), Launcher(int(process))
    print(listener.getsockname()[1], flush=True)
    sys.stdout.close()
    code = Watch(int(size), sys.stdin.readline().strip(), float(patience)).run(listener)
    if code:
        os.close(2)  # the launcher waits for the end of what is said here
        launcher.end()
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
