"""Ledgers as curves: bytes alive over the ops of a step, by kind of tensor."""

from typing import NamedTuple

import numpy as np

from mesp_ref.memory.kinds import KINDS, by_kind
from mesp_ref.memory.ledger import Ledger
from mesp_ref.ops import Array

ADDED = "results and scratch of the running op"
# Paul Tol's "light" scheme and neighbours, which colour-blind readers can tell apart; the order of
# the stack is that of the legend.
COLOURS = dict(
    zip(
        (*KINDS, ADDED),
        (
            "#4477AA", "#77AADD", "#44BB99", "#EE8866", "#BBCC33", "#AA3377",
            "#FFAABB", "#882255", "#EEDD88", "#AAAA00", "#555555", "#9A9A9A",
        ),
        strict=True,
    )
)  # fmt: skip


class Timeline(NamedTuple):
    """One step, op by op. MB."""

    ops: list[str]
    kinds: dict[str, Array]  # of what lives when an op is called, and ADDED: [ops] each
    total: Array  # their sum
    head: int  # the op at which the forward ends

    @property
    def top(self) -> int:
        """The op at the peak."""
        return int(self.total.argmax())

    def label(self) -> str:
        return f"peak {self.total[self.top]:,.2f} MB in {self.ops[self.top]}"


def timeline(ledger: Ledger, rank: int) -> Timeline:
    """A ledger as curves; kinds that never live are left out."""
    moments = ledger.moments
    parts = [by_kind(moment, rank) for moment in moments]
    kinds = {name: np.array([part[name] for part in parts]) / 1e6 for name in KINDS}
    kinds[ADDED] = np.array([moment.added for moment in moments]) / 1e6
    ops = [moment.op for moment in moments]
    head = ops.index("lm_loss") if "lm_loss" in ops else len(ops)
    total = np.sum(list(kinds.values()), axis=0)
    return Timeline(ops, {name: y for name, y in kinds.items() if y.any()}, total, head)
