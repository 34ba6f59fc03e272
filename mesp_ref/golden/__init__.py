"""The golden reference: vectors for other backends, and the checker that reads their answers.

build      make the suite: op cases at 50 and 80 digits, blocks, a model, wrong results
suite      read a suite, every file held against its hash
check      compare the files that a backend wrote, tensor by tensor
explain    say what the differences look like
backends   clients that run the suite: torch
"""

from mesp_ref.golden.check import Report, check
from mesp_ref.golden.suite import SHIPPED, Case, Suite, Tensor

__all__ = ["SHIPPED", "Case", "Report", "Suite", "Tensor", "check"]
