"""The watch beside rank 0: who is lost, silent or stuck is named, once, and all others end."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mesp_ref.spread import watch

TOKEN = "of the run"


class Rank:
    """A rank as the watch sees it, in the test's hand."""

    def __init__(self, port: int, number: int, token: str = TOKEN):
        self.socket = connected(port)
        self.say(token=token, rank=number, host="here", pid=100 + number)

    def say(self, **line: Any) -> None:
        self.socket.sendall(json.dumps(line).encode() + b"\n")

    def hears_the_end(self, code: int = 2) -> bool:
        heard = b""
        while piece := self.socket.recv(1 << 12):
            heard += piece
            if b'"end"' in heard:
                return f'"end": {code}}}'.encode() in heard
        return False


class Running:
    """A watch in a thread."""

    def __init__(self, size: int, patience: float = 60.0):
        self.listener = watch.listening()
        self.port = self.listener.getsockname()[1]
        self.watch, self.code = watch.Watch(size, TOKEN, patience), -1
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.code = self.watch.run(self.listener)

    def ends(self) -> int:
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.listener.close()
        return self.code


OPEN: list[socket.socket] = []


def connected(port: int) -> socket.socket:
    OPEN.append(socket.create_connection(("127.0.0.1", port), timeout=10))
    return OPEN[-1]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENCE", 1.5)
    monkeypatch.setattr(watch, "MEETING", 1.0)
    monkeypatch.setattr(watch, "FAREWELL", 1.0)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_all_leave_and_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    running = Running(2)
    for rank in [Rank(running.port, i) for i in range(2)]:
        rank.say(left=True)
    assert running.ends() == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_rank_is_named(lost: int, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    running = Running(3)
    ranks = [Rank(running.port, i) for i in range(3)]
    ranks[0].say(at="step 8", moves=1, waits=False, saved="the save of step 5 stays in out")
    ranks[lost].say(at="step 8")
    time.sleep(0.5)
    ranks[lost].socket.close()
    others = [rank for rank in ranks if rank is not ranks[lost]]
    assert all(rank.hears_the_end() for rank in others)
    for rank in others:
        rank.socket.close()
    assert running.ends() == 2
    line = said(capsys)
    assert line.startswith(
        f"mesp-ref: error: rank {lost} on here (process {100 + lost}): lost at step 8: it was killed"
    )
    assert line.endswith("; the save of step 5 stays in out")


def test_the_first_to_be_lost_is_named_though_others_follow(
    quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher kills the others at once: both ends wait for the watch when it looks."""
    for lost in (0, 1, 2, 1, 0):
        running = Running(3)
        ranks = [Rank(running.port, i) for i in range(3)]
        time.sleep(0.3)
        for number in (lost, *(i for i in range(3) if i != lost)):
            ranks[number].socket.close()
        assert running.ends() == 2
        assert f"rank {lost} on here" in said(capsys)


def test_a_silent_rank_is_named(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    running = Running(2)
    speaks, _silent = Rank(running.port, 0), Rank(running.port, 1)
    begin = time.monotonic()
    while running.watch.ended is None and time.monotonic() - begin < 10:
        speaks.say(at="step 3", moves=0, waits=True)
        time.sleep(0.1)
    assert running.ends() == 2
    assert "rank 1 on here (process 101): not heard of for 2 s at the start: it hangs" in said(
        capsys
    )


def test_a_machine_that_is_cut_off_hears_of_nobody(
    quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    running = Running(3)
    speaks, _one, _two = (Rank(running.port, i) for i in range(3))
    begin = time.monotonic()
    while running.watch.ended is None and time.monotonic() - begin < 10:
        speaks.say(at="step 3", moves=0, waits=True)
        time.sleep(0.1)
    assert running.ends() == 2
    line = said(capsys)
    assert "rank 1 on here (process 101), rank 2 on here (process 102): not heard of" in line
    assert "cut off from rank 0" in line


def test_a_rank_that_does_not_move_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """It is heard of, but the others wait for it: longer than they are told to have patience."""
    running = Running(2, patience=1.0)
    waits, stuck = Rank(running.port, 0), Rank(running.port, 1)
    begin = time.monotonic()
    while running.watch.ended is None and time.monotonic() - begin < 10:
        waits.say(at="step 3", moves=0, waits=True)
        stuck.say(at="step 3", moves=0, waits=False)
        time.sleep(0.1)
    waits.socket.close()
    stuck.socket.close()
    assert running.ends() == 2
    assert "rank 1 on here (process 101): has not moved from step 3 for 1 s" in said(capsys)


def test_a_rank_that_gets_on_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    running = Running(2, patience=0.5)
    waits, slow = Rank(running.port, 0), Rank(running.port, 1)
    for moves in range(15):
        waits.say(at="step 3", moves=0, waits=True)
        slow.say(at="step 3", moves=moves, waits=False)
        time.sleep(0.1)
    waits.say(left=True)
    slow.say(left=True)
    assert running.ends() == 0
    assert not capsys.readouterr().err


def test_a_rank_that_does_not_come_is_named(
    quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    running = Running(3)
    ranks = [Rank(running.port, i) for i in (0, 2)]
    for rank in ranks:
        assert rank.hears_the_end()
        rank.socket.close()
    assert running.ends() == 2
    assert "rank 1: did not come within 1 s" in said(capsys)


def test_a_rank_tells_its_error(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    running = Running(2)
    ranks = [Rank(running.port, i) for i in range(2)]
    ranks[1].say(error="/tmp: no space left")
    assert all(rank.hears_the_end() for rank in ranks)
    for rank in ranks:
        rank.socket.close()
    assert running.ends() == 2
    assert said(capsys) == "mesp-ref: error: rank 1 on here (process 101): /tmp: no space left"


def test_rank_0_says_itself_why_all_end(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    """After Ctrl-C, for one: with its exit code, and the watch says nothing."""
    running = Running(2)
    ranks = [Rank(running.port, i) for i in range(2)]
    time.sleep(0.3)
    ranks[0].say(end=130)
    assert all(rank.hears_the_end(130) for rank in ranks)
    for rank in ranks:
        rank.socket.close()
    assert running.ends() == 2
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "line", [b"GET / HTTP/1.1\n", b"[]\n", b"{}\n", b'{"rank": 1}\n', b"x" * 9]
)
def test_a_stranger_is_no_rank(line: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    running = Running(2)
    stranger = connected(running.port)
    stranger.sendall(line)
    wrong = Rank(running.port, 1, token="guessed")
    time.sleep(0.3)
    stranger.close()
    for rank in [Rank(running.port, i) for i in range(2)]:
        rank.say(left=True)
    assert running.ends() == 0
    assert not capsys.readouterr().err
    wrong.socket.close()
