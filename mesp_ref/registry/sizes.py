"""The axis lengths that op cases are drawn with."""

from typing import Any, NamedTuple

Args = dict[str, Any]  # arguments of an op by name


class Sizes(NamedTuple):
    """Axis lengths of an op case, under the letters used everywhere. All defaults differ."""

    n: int = 2  # batch
    t: int = 5  # tokens
    past: int = 3  # earlier keys in a cache: Tk = t + past
    c: int = 7  # hidden
    g: int = 3  # key/value heads
    share: int = 2  # query heads that share one of them: H = g·share
    d: int = 4  # head size, even
    f: int = 9  # MLP width, or a layer's output
    v: int = 11  # vocabulary
    r: int = 6  # LoRA rank

    @property
    def h(self) -> int:
        """Query heads."""
        return self.g * self.share
