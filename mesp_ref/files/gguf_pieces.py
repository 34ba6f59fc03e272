"""Tokenizers of SentencePiece's kind as keys of a GGUF file: pieces with scores in place of merges.

llama.cpp joins two neighbours whenever their whole is a piece, the highest score first. That is what
tokenizer.json says where every way to make a piece is a merge, and the merges of one piece stand
together; other lists of merges are refused.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mesp_ref.errors import MespRefError, shown

UNKNOWN, BYTE = 2, 6  # values of token_type in GGUF, beside those of gguf_tokenizer
_BLANK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_BY_WORD = {"type": "Split", "pattern": {"String": " "}}  # of blanks, which are none any more
_LEAST = -1e6  # of what no merge makes


def is_pieces(parts: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json falls back to bytes, as tokenizers of this kind do."""
    return bool(parts["model"].get("byte_fallback"))


def check_pieces(parts: Mapping[str, Any], file: str) -> None:
    """Raise MespRefError for what llama.cpp's tokenizer of pieces does otherwise."""
    cut = parts["pre_tokenizer"]
    by_word = cut is not None and {k: cut.get(k) for k in _BY_WORD} == _BY_WORD
    for field, found, fits, expected in (
        ("normalizer", parts["normalizer"], parts["normalizer"] == _BLANK, "blanks written ▁"),
        ("pre_tokenizer", cut, cut is None or by_word, "none, or a split at blanks"),
        ("model.type", parts["model"].get("type"), parts["model"].get("type") == "BPE", "BPE"),
    ):
        if not fits:
            raise MespRefError(
                f"{file}: {field}: found {shown(found)}, expected {expected}, as llama.cpp has it "
                "for pieces with scores"
            )


def scores_of(tokens: Sequence[str], merges: Sequence[Sequence[str]], file: str) -> list[float]:
    """A score of every token, from the place of its merges in the list.

    Raises MespRefError where no scores can say the list
    """
    vocabulary, ways = dict.fromkeys(tokens), dict[str, int]()
    scores, last = dict[str, float](), ""
    for left, right in merges:
        whole = left + right
        if whole != last and whole in scores:
            raise MespRefError(
                f"{file}: model.merges: found those of {shown(whole)} apart, expected them together; "
                "llama.cpp has one score for all"
            )
        scores.setdefault(whole, -float(len(scores)))
        ways[whole], last = ways.get(whole, 0) + 1, whole
    for whole, count in ways.items():
        expected = sum(
            whole[:at] in vocabulary and whole[at:] in vocabulary for at in range(1, len(whole))
        )
        if count != expected:
            raise MespRefError(
                f"{file}: model.merges: found {count} that make {shown(whole)}, expected {expected}; "
                "llama.cpp joins whatever makes a piece"
            )
    return [scores.get(token, _LEAST) for token in tokens]


def kind_of(token: str, kind: int, unknown: str | None) -> int:
    """token_type of a piece: bytes and the unknown token have their own."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return BYTE
    return UNKNOWN if token == unknown else kind
