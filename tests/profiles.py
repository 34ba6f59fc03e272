"""How many examples Hypothesis draws: few by default, many when asked.

Quick     make test: a fixed sequence of examples, the same in every run
Thorough  MESP_REF_THOROUGH=20 make test: 20 times as many, the next ones of the same sequence;
          a failure prints the example, and `derandomize` makes it come again
"""

import os

from hypothesis import settings

TIMES = int(os.environ.get("MESP_REF_THOROUGH", "1"))


def examples(count: int) -> settings:
    """Settings for `count` examples in the quick profile."""
    return settings(max_examples=count * TIMES, deadline=None, derandomize=True, print_blob=True)
