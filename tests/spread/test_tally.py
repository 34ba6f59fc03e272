"""The sum over ranks, by threads in place of processes: no MPI is needed."""

import sys
import threading
from typing import Any

import numpy as np
import pytest

from mesp_ref.spread.tally import SpreadTally


class Meeting:
    """What the threads of a test exchange."""

    def __init__(self, size: int):
        self.size, self.barrier = size, threading.Barrier(size, timeout=20)
        self.given: list[Any] = [None] * size
        self.bytes = 0


class Seat:
    """A rank's World whose ranks are threads."""

    def __init__(self, meeting: Meeting, rank: int):
        self.meeting, self.rank, self.size = meeting, rank, meeting.size

    def _all(self, own: Any) -> list[Any]:
        self.meeting.given[self.rank] = own
        self.meeting.barrier.wait()
        found = list(self.meeting.given)
        self.meeting.barrier.wait()
        self.meeting.bytes += own.nbytes
        return found

    def slices(self, own: Any) -> Any:
        return np.stack([given[self.rank] for given in self._all(own.copy())])

    def joined(self, own: Any, out: Any) -> None:
        out[...] = np.stack(self._all(own.copy()))


class Mute:
    moves = 0

    def waiting(self, waits: bool) -> None:
        pass


def total(parts: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """What every rank has in the end."""
    meeting, found = Meeting(size), [{} for _ in range(size)]

    def rank(number: int) -> None:
        tally = SpreadTally(Seat(meeting, number), len(parts) // size, Mute())  # type: ignore[arg-type]
        for part in parts[number::size]:
            for block in part["blocks"]:
                tally.add({name: grad.copy() for name, grad in block.items()})
        found[number] = tally.close()

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def parts(count: int) -> list[dict[str, Any]]:
    """Gradients of `count` parts in two blocks of odd sizes and very different magnitudes."""
    rng = np.random.default_rng(count)

    def grad(*shape: int) -> Any:
        draw = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 6, shape)
        return draw.astype(np.float32)

    return [
        {
            "blocks": [
                {"b1.A": grad(3, 5), "b1.B": grad(7, 3)},
                {"b0.A": grad(2, 2), "b0.B": grad(1)},
            ]
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("size", "rounds"), [(2, 1), (3, 1), (4, 1), (4, 3), (3, 2), (5, 1), (6, 1)]
)
def test_the_sum_is_that_of_one_process(size: int, rounds: int) -> None:
    given = parts(size * rounds)
    want: dict[str, Any] = {}
    for part in given:  # left to right, tensor by tensor
        for block in part["blocks"]:
            for name, grad in block.items():
                want[name] = want[name] + grad if name in want else grad
    for got in total(given, size):
        assert list(got) == ["b1.A", "b1.B", "b0.A", "b0.B"]
        for name, array in got.items():
            assert array.shape == want[name].shape
            assert array.tobytes() == want[name].tobytes()
    if size * rounds > 2:  # the check can fail: another order gives other bits
        other = sum((p["blocks"][0]["b1.A"] for p in given[-2::-1]), given[-1]["blocks"][0]["b1.A"])
        assert other.tobytes() != want["b1.A"].tobytes()


def test_minus_zero_stays() -> None:
    """0 + (−0) is 0: a sum that began at 0 would lose the sign that one process keeps."""
    given = [{"blocks": [{"g": np.full(3, -0.0, np.float32)}]} for _ in range(2)]
    assert all(np.signbit(got["g"]).all() for got in total(given, 2))


def test_a_gradient_travels_twice() -> None:
    """Each rank gives its gradient to the slices' ranks, and its slice of the sum to all."""
    meeting = Meeting(2)

    def rank(number: int) -> None:
        tally = SpreadTally(Seat(meeting, number), 1, Mute())  # type: ignore[arg-type]
        tally.add({"g": np.ones(100, np.float32)})
        tally.close()

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meeting.bytes == 2 * (400 + 200)


def test_an_error_of_the_thread_is_raised_by_close() -> None:
    class Broken(Seat):
        def slices(self, own: Any) -> Any:
            raise OSError("the network is down")

    tally = SpreadTally(Broken(Meeting(1), 0), 1, Mute())  # type: ignore[arg-type]
    tally.add({"g": np.ones(3, np.float32)})
    with pytest.raises(OSError, match="the network is down"):
        tally.close()


def test_without_mpi_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mesp_ref.cli import main

    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert main(["finetune", "--mpi"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("mesp-ref: error: --mpi: found no ")
    assert "pip install 'mesp-ref[mpi]' mpich" in line
