"""Damage that knows the format: the same bytes and seed always give the same hostile file.

An input is one file, or several joined by SEPARATOR. JSON is damaged as a tree and as text,
safetensors in its header and in the eight bytes before it, everything else byte by byte.
"""

import json
import random
from typing import Any

SEPARATOR = b"\x00\xff\x00"
LIMIT = 1 << 16
# What readers tend to trust: sizes, signs, types, paths, depths, characters that are none.
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**31 - 1, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**400, 0.0, -0.0, 0.5, 1e-320, 1e308, 1e-45, float("inf"), float("nan"), "", "\x00", "\ud800",
    "../x", "/etc/passwd", "a/../../b", "..\\x", "\n", "é" * 50, "a" * 5000, "F32", "BF16", "I64",
    "U32", "F8_E4M3", [], {}, [[]], [0], [-1], [2**62, 2**62], [0, 2**62], [0] * 100, [None],
    {"": {}}, {"a": 1}, "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
    "{% for i in x %}", "{{ 1/0 }}", "{{ messages[99].content }}", "{{ ''.__class__ }}",
)  # fmt: skip
_WORDS = (b"\0", b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\x80", b"{", b"[", b'"', b"NaN",
          b"\\ud800", b"1e999", b"\n", b"\xef\xbb\xbf", SEPARATOR)  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four pieces of damage to one part of the input."""
    parts = data.split(SEPARATOR)
    at = rng.randrange(len(parts))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        parts[at] = _damage(parts[at], rng)
    if rng.random() < 0.02:
        parts[at] = rng.choice(parts)
    return SEPARATOR.join(parts)[:LIMIT]


def _damage(part: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return _bytes(part, rng)
    if part[:1] in (b"{", b"["):
        return _json(part, rng)
    if part[8:9] == b"{":
        return _safetensors(part, rng)
    if b"\n{" in part:
        lines = part.split(b"\n")
        i = rng.randrange(len(lines))
        lines[i] = _json(lines[i], rng)
        return b"\n".join(lines)
    return _bytes(part, rng)


def _json(text: bytes, rng: random.Random) -> bytes:
    """Damage to the tree where it parses, else to the bytes."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _bytes(text, rng)
    kind = rng.random()
    if kind < 0.03:
        return b"[" * rng.choice((10, 900, 30_000)) + text
    if kind < 0.06:
        return text.replace(b"{", b'{"a":' * rng.choice((2, 2000)), 1)
    if kind < 0.12:  # a name given twice
        return text.replace(b"{", b"{" + text[1 : text.find(b",") + 1], 1)
    try:
        return json.dumps(_tree(value, rng)).encode()
    except (RecursionError, ValueError):
        return _bytes(text, rng)


def _tree(value: Any, rng: random.Random) -> Any:
    """A copy in which one node is replaced, removed, added or put elsewhere."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    if not isinstance(value, dict | list):
        return rng.choice(HOSTILE)
    walk(value)
    if not places:
        return rng.choice(HOSTILE)
    node, key = rng.choice(places)
    kind, (other, place) = rng.random(), rng.choice(places)
    if kind < 0.55:
        node[key] = rng.choice(HOSTILE)
    elif kind < 0.7:
        del node[key]
    elif kind < 0.85 and not isinstance(other[place], dict | list):
        node[key] = other[place]
    elif isinstance(node, dict):
        node[str(rng.choice(HOSTILE))[:200]] = node.pop(key) if kind < 0.93 else node[key]
    elif isinstance(node[key], int) and not isinstance(node[key], bool):
        node[key] += rng.choice((-1, 1, 4, -4, 2**32))
    return value


def _safetensors(part: bytes, rng: random.Random) -> bytes:
    """Damage to the header with its length put right, to the length, or to the data."""
    length = int.from_bytes(part[:8], "little")
    header, data = part[8 : 8 + length], part[8 + length :]
    kind = rng.random()
    if kind < 0.1:
        lie = rng.choice(
            (0, 1, length - 1, length + 1, length + len(data), 2**31, 2**63, 2**64 - 1)
        )
        return (lie % 2**64).to_bytes(8, "little") + header + data
    if kind < 0.2:
        return part[: rng.randrange(len(part) + 1)]
    if kind < 0.3:
        return part[: 8 + length] + _bytes(data, rng)
    header = _json(header, rng)
    return len(header).to_bytes(8, "little") + header + data


def _bytes(part: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, removed, repeated, inserted, or cut off."""
    at = rng.randrange(len(part) + 1)
    until = min(len(part), at + rng.choice((1, 2, 4, 8, 64)))
    match rng.randrange(5):
        case 0 if part:
            at = min(at, len(part) - 1)
            return part[:at] + bytes([part[at] ^ 1 << rng.randrange(8)]) + part[at + 1 :]
        case 1:
            return part[:at] + part[until:]
        case 2:
            return part[:until] + part[at:]
        case 3:
            return part[:at] + rng.choice(_WORDS) + part[rng.choice((at, until)) :]
        case _:
            return part[:at]
