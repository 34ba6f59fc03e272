"""Early stopping: where the held-out loss was lowest, and how many evaluations ago."""

from typing import NamedTuple


class Best(NamedTuple):
    """What is known of the held-out losses so far. Lower by any amount is better."""

    step: int = 0  # where the loss was lowest
    loss: float | None = None  # nats per token; None before the first evaluation
    waited: int = 0  # evaluations since then
    latest: int = -1  # the last step that was evaluated

    def after(self, step: int, loss: float) -> "Best":
        """With the evaluation of one more step; one that is told again changes nothing."""
        if step <= self.latest:
            return self
        if self.loss is None or loss < self.loss:
            return Best(step, loss, 0, step)
        return self._replace(waited=self.waited + 1, latest=step)
