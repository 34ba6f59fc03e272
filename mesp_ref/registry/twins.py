"""What the ops of other frameworks are written in; none is imported here.

A functional twin is given a Namespace: `fw.xp` is an array namespace such as jax.numpy, on which
NumPy's names work. A torch twin is given the module torch.
"""

from typing import Any, Protocol


class Namespace(Protocol):
    """An array namespace `xp` and the three functions that have no common name."""

    xp: Any

    def silu(self, x: Any) -> Any: ...
    def softmax(self, x: Any) -> Any: ...
    def logsumexp(self, x: Any) -> Any: ...


def wide(fw: Namespace, x: Any) -> Any:
    """16-bit values in float32, as frameworks take norms, softmax and losses."""
    return x.astype(fw.xp.float32) if "16" in str(x.dtype) else x


def torch_wide(torch: Any, x: Any) -> Any:
    """The same of a torch tensor."""
    return x if x.dtype == torch.float64 else x.float()
