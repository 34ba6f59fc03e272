"""Memory counted, not sampled: the ledger of a step, and of one that runs over ghosts."""

from mesp_ref.memory.base import Base, Store
from mesp_ref.memory.dry_run import DryRun, dry_run
from mesp_ref.memory.kinds import KINDS, by_kind
from mesp_ref.memory.ledger import Entry, Ledger, Moment, measure
from mesp_ref.memory.longest import Reach, longest, torch_peak, torch_reach
from mesp_ref.memory.plot import plot_timelines
from mesp_ref.memory.predict import PEAKS, Cost, Parts, Peak, cost, peak
from mesp_ref.memory.process import PeakResident, Resident, resident
from mesp_ref.memory.schedule import (
    PLACES,
    SCHEDULES,
    Choice,
    Schedule,
    at,
    choose,
    duration,
    megabytes,
    need,
    parse_size,
)
from mesp_ref.memory.shapes import Shapes
from mesp_ref.memory.speed import Speed, measure_speed, seconds
