"""Arrays inside lists, tuples and dictionaries: taken out in order, and put back."""

from collections.abc import Iterator, Sequence
from typing import Any


def _children(value: Any) -> Iterator[tuple[str, Any]] | None:
    """The parts of a container with how an index writes them; None for everything else."""
    if isinstance(value, dict):
        return ((f"[{key!r}]", part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return ((f"[{i}]", part) for i, part in enumerate(value))
    return None


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Everything that is no container, depth first, each with its path: [("['w'][0]", array), …]."""
    children = _children(value)
    if children is None:
        return [(path, value)]
    return [leaf for key, part in children for leaf in leaves(part, path + key)]


def _built(like: Any, parts: Iterator[Any]) -> Any:
    if isinstance(like, dict):
        return {key: _built(part, parts) for key, part in like.items()}
    if isinstance(like, list | tuple):
        made = [_built(part, parts) for part in like]
        named = hasattr(like, "_fields")
        return type(like)(*made) if named else type(like)(made)
    return next(parts)


def rebuild(like: Any, parts: Sequence[Any]) -> Any:
    """The containers of `like` with other leaves, in the order of leaves()."""
    return _built(like, iter(parts))


def matched(like: Any, value: Any) -> list[Any]:
    """The leaves of `value` at the places of those of `like`; None stands for all below it.

    Raises ValueError where the containers differ.
    """
    if value is None:
        return [None] * len(leaves(like))
    if isinstance(like, dict):
        if not isinstance(value, dict) or value.keys() != like.keys():
            raise ValueError(f"gradient of a dictionary with {list(like)}: found {value!r:.60}")
        return [leaf for key in like for leaf in matched(like[key], value[key])]
    if isinstance(like, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(like):
            raise ValueError(
                f"gradient of {len(like)} arrays in a {type(like).__name__}: not as many"
            )
        return [leaf for a, b in zip(like, value, strict=True) for leaf in matched(a, b)]
    return [value]
