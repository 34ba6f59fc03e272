"""The tokenizer of a checkpoint directory as keys of a GGUF file, as llama.cpp understands them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.gguf_pieces import check_pieces, is_pieces, kind_of, scores_of
from mesp_ref.files.gguf_tokenizer import CONTROL, NORMAL, QWEN2, UNUSED, USER_DEFINED, filler
from mesp_ref.files.tokenizer import load_tokenizer, read_chat_template, read_tokenizer_config

# How a tokenizer.json cuts text before BPE -> llama.cpp's name for it. It has some sixty names for
# some twenty ways; DeepSeek's distilled Qwen2 models, which have a name of their own, cut as qwen2.
_GPT2, _BYTES = ("ByteLevel", False, True), ("ByteLevel", False, False)
_SPELLED_OUT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CUTS: dict[tuple[Any, ...], str] = {
    (_GPT2,): "gpt-2",
    (("Split", _SPELLED_OUT, "Isolated", False), _BYTES): "gpt-2",
    (("Digits", True), _GPT2): "smollm",
    (("Split", QWEN2, "Isolated", False), _BYTES): "qwen2",
}
_PLAIN = {  # what llama.cpp's BPE does; other values change the tokens
    "type": ("BPE",), "dropout": (None, 0, 0.0), "unk_token": (None,),
    "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,), "ignore_merges": (False,),
}  # fmt: skip
_ENDS = ("eos", "eot", "eom")  # as many as llama.cpp has keys for; each ends a text


class Vocabulary(NamedTuple):
    """What a GGUF file says of a tokenizer, one token a row of the embedding."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    cut: str  # llama.cpp's name of the pre-tokeniser
    ends: tuple[int, ...]
    begin: int
    padding: int | None
    adds_begin: bool
    adds_end: bool
    template: str | None
    scores: list[float] | None = None  # of pieces, which have no merges
    unknown: int | None = None

    def text(self, token: int) -> str:
        """The token as text: special tokens stand in the list as they are written."""
        return self.tokens[token]


def read_vocabulary(directory: Path, config: Qwen2Config, ends: tuple[int, ...]) -> Vocabulary:
    """The vocabulary of a checkpoint directory whose texts end with `ends`.

    Raises MespRefError, naming file and field, for a tokenizer that llama.cpp would run otherwise:
    another model than byte-level BPE or pieces with scores, a pre-tokeniser it has no name for, added
    tokens that take in the blanks beside them, more end tokens than it has keys for
    """
    tokenizer, file = load_tokenizer(directory), f"{directory / 'tokenizer.json'}"
    parts = json.loads(tokenizer.to_str())
    pieces = is_pieces(parts)
    (check_pieces if pieces else _check_model)(parts, file)
    settings = read_tokenizer_config(directory)
    tokens, kinds = _tokens(tokenizer.get_vocab(), parts["added_tokens"], config, file)
    before, behind = _framing(tokenizer)
    named = {
        name: tokenizer.token_to_id(_content(settings.get(f"{name}_token")))
        for name in ("bos", "eos", "pad")
    }
    final = _ends(ends, named["eos"], str(directory))
    begin = next(
        (i for i in (*before, config.bos_token_id, named["bos"]) if i is not None), final[0]
    )
    if before not in ([], [begin]) or behind not in ([], [final[0]]):
        raise MespRefError(
            f"{file}: post_processor: found tokens {before} before and {behind} behind a text, "
            f"expected none, or {begin} before and {final[0]} behind; llama.cpp adds no others"
        )
    template, _ = read_chat_template(directory)
    merges, unknown = parts["model"]["merges"], parts["model"].get("unk_token")
    found = Vocabulary(
        tokens, kinds, [] if pieces else [" ".join(pair) for pair in merges],
        "default" if pieces else _cut(parts, file),
        final, begin, named["pad"], bool(before), bool(behind), template,
    )  # fmt: skip
    if not pieces:
        return found
    kinds = [kind_of(token, kind, unknown) for token, kind in zip(tokens, kinds, strict=True)]
    index = None if unknown is None else tokenizer.token_to_id(unknown)
    return found._replace(kinds=kinds, scores=scores_of(tokens, merges, file), unknown=index)


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Put a vocabulary into the metadata of a GGUFWriter."""
    writer.add_tokenizer_model("gpt2" if vocabulary.scores is None else "llama")
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is None:
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(False)
    if vocabulary.unknown is not None:
        writer.add_unk_token_id(vocabulary.unknown)
    writer.add_bos_token_id(vocabulary.begin)
    for name, token in zip(_ENDS, vocabulary.ends, strict=False):
        getattr(writer, f"add_{name}_token_id")(token)
    if vocabulary.padding is not None:
        writer.add_pad_token_id(vocabulary.padding)
    writer.add_add_bos_token(vocabulary.adds_begin)
    writer.add_add_eos_token(vocabulary.adds_end)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def _check_model(parts: Mapping[str, Any], file: str) -> None:
    """Refuse what llama.cpp's byte-level BPE does otherwise."""
    model = parts["model"]
    for field, allowed in _PLAIN.items():
        if (found := model.get(field, allowed[0])) not in allowed:
            raise MespRefError(
                f"{file}: model.{field}: found {shown(found)}, expected {shown(allowed[0])}, as "
                "llama.cpp's byte-level BPE has it"
            )
    if not model["merges"]:
        raise MespRefError(f"{file}: model.merges: found none, expected some; llama.cpp needs them")
    for token in parts["added_tokens"]:
        for field in ("lstrip", "rstrip", "single_word"):
            if token[field]:
                raise MespRefError(
                    f"{file}: added_tokens: {shown(token['content'])}: {field}: found True, expected "
                    "False; llama.cpp finds added tokens wherever they stand"
                )


def _cut(parts: Mapping[str, Any], file: str) -> str:
    """llama.cpp's name of the pre-tokeniser, by what it does."""
    given, normalizer = parts["pre_tokenizer"], parts["normalizer"]
    steps = given["pretokenizers"] if given and given["type"] == "Sequence" else [given]
    name = _CUTS.get(tuple(map(_step, steps)))
    if name is None:
        raise MespRefError(
            f"{file}: pre_tokenizer: found {shown(given)}, expected the one of "
            f"{', '.join(dict.fromkeys(_CUTS.values()))}; llama.cpp would cut text otherwise"
        )
    allowed = ("NFC",) if name == "qwen2" else ()
    if normalizer is not None and normalizer["type"] not in allowed:
        raise MespRefError(
            f"{file}: normalizer: found {shown(normalizer['type'])}, expected none beside the "
            f"pre-tokeniser of {name}; llama.cpp normalises nothing"
        )
    return name


def _step(step: Mapping[str, Any] | None) -> tuple[Any, ...]:
    """A step of a pre-tokeniser, without what does not change where it cuts."""
    kind = step["type"] if step else None
    if step and kind == "ByteLevel":
        return kind, step["add_prefix_space"], step.get("use_regex", True)
    if step and kind == "Digits":
        return kind, step["individual_digits"]
    if step and kind == "Split":
        return kind, step["pattern"].get("Regex"), step["behavior"], step["invert"]
    return (kind,)


def _tokens(
    vocabulary: Mapping[str, int],
    added: Sequence[Mapping[str, Any]],
    config: Qwen2Config,
    file: str,
) -> tuple[list[str], list[int]]:
    """Text and kind of every token; rows of the embedding without a token get a name of their own."""
    size = config.vocab_size
    tokens, kinds = [filler(i) for i in range(size)], [UNUSED] * size
    for token, index in vocabulary.items():
        if index >= size:
            raise MespRefError(
                f"{file}: {shown(token)}: found id {index}, expected below {size}, the vocab_size "
                "of config.json; the model has no row for it"
            )
        tokens[index], kinds[index] = token, NORMAL
    for entry in added:
        kinds[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    return tokens, kinds


def _framing(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text."""
    bare, framed = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    at = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return framed[:at], framed[at + len(bare) :]


def _content(token: Any) -> str:
    """The text of a special token of tokenizer_config.json, which may be an object; "" for none."""
    content: str = token.get("content", "") if isinstance(token, dict) else token or ""
    return content


def _ends(ends: tuple[int, ...], eos: int | None, where: str) -> tuple[int, ...]:
    """The end tokens, the tokenizer's own first: it is the one that chat templates name."""
    if eos is not None and (eos in ends or not ends):
        ends = (eos, *(end for end in ends if end != eos))
    if not ends:
        raise MespRefError(
            f"{where}: found no end token, expected eos_token_id in config.json or "
            "generation_config.json; llama.cpp would take token 11 for it"
        )
    if len(ends) > len(_ENDS):
        raise MespRefError(
            f"{where}: eos_token_id: found {len(ends)} end tokens, expected at most {len(_ENDS)}, "
            "for which llama.cpp has keys; take some out of config.json or generation_config.json"
        )
    return ends
