"""The sum of gradients over ranks: in the order of the ranks, while the backward goes on.

Sum       total = ((g₀ + g₁) + g₂) + … over the parts of a step, as one process forms it. An
          Allreduce forms some other tree, which the number of ranks and the network decide
Way       a block's gradients are cut into N slices; rank r gets slice r of all ranks (Alltoall), adds
          them in the order of the ranks, and hands the sum to all (Allgather). Where each rank has
          several parts, slices of further rounds are added to the running sum of the first
Costs     2·(N−1)/N of the gradients sent and received by each rank a step with one part each
Memory    one gradient beside that of the part: a block that waits to be sent is its own gradients, a
          block that was sent is the total
"""

import queue
import threading

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.spread.link import Link
from mesp_ref.spread.world import World


class SpreadTally:
    """A sum over `rounds` parts of each rank; a thread sends what `add` is given.

    All ranks add the same blocks in the same order. What the thread raises is raised by `close`.
    """

    def __init__(self, world: World, rounds: int, link: Link):
        self.world, self.rounds, self.link = world, rounds, link
        self.total: dict[str, Array] = {}
        self._running: dict[tuple[str, ...], tuple[int, Array]] = {}
        self._waiting: queue.SimpleQueue[dict[str, Array] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def add(self, grads: dict[str, Array]) -> None:
        """Gradients of one block of one part, weighted; they are taken over."""
        self._waiting.put(dict(grads))
        grads.clear()
        self.link.moves += 1

    def close(self) -> dict[str, Array]:
        """The sum over all parts of all ranks, once it is here."""
        self._waiting.put(None)
        self.link.waiting(True)
        self._thread.join()
        self.link.waiting(False)
        if self._error is not None:
            raise self._error
        return self.total

    def _serve(self) -> None:
        try:
            while (grads := self._waiting.get()) is not None:
                if grads:
                    self._block(grads)
        except BaseException as error:
            self._error = error

    def _block(self, grads: dict[str, Array]) -> None:
        """One block of one round: slices out, sum, and after the last round the sum to all."""
        names, shapes = tuple(grads), [grad.shape for grad in grads.values()]
        done, running = self._running.pop(names, (0, None))
        pieces = _cut(grads, self.world.size)
        grads.clear()
        found = self.world.slices(pieces)
        begin = 0
        if running is None:
            running, begin = found[0].copy(), 1
        for piece in found[begin:]:
            running += piece
        del found
        if done + 1 < self.rounds:
            self._running[names] = done + 1, running
            return
        self.world.joined(running, pieces)
        self.total.update(_named(names, shapes, pieces.reshape(-1)))


def _cut(grads: dict[str, Array], size: int) -> Array:
    """All gradients behind each other, in `size` slices of one length: [N, n], zeros at the end."""
    count = sum(grad.size for grad in grads.values())
    dtype = next(iter(grads.values())).dtype
    assert all(grad.dtype == dtype for grad in grads.values())
    pieces = np.zeros((size, -(-count // size)), dtype)
    flat, at = pieces.reshape(-1), 0
    for grad in grads.values():
        flat[at : at + grad.size] = grad.reshape(-1)
        at += grad.size
    return pieces


def _named(names: tuple[str, ...], shapes: list[tuple[int, ...]], flat: Array) -> dict[str, Array]:
    """Views of the summed gradients under their names."""
    found, at = {}, 0
    for name, shape in zip(names, shapes, strict=True):
        size = int(np.prod(shape))
        found[name] = flat[at : at + size].reshape(shape)
        at += size
    return found
