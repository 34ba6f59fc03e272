"""Memory counted, not sampled: the ledger of a step and its closed form."""

from mesp_ref.memory.closed_form import PEAKS, Parts, Peak, Shapes, peak
from mesp_ref.memory.ledger import Entry, Ledger, Moment, measure
from mesp_ref.memory.timeline import plot_timeline
