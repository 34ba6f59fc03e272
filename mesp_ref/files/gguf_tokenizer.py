"""The tokenizer inside a GGUF file as tokenizer.json and tokenizer_config.json."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.gguf import Gguf
from mesp_ref.files.tokenizer import reasons

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Values of token_type in GGUF: <|im_start|> is a control token, <tool_call> a user-defined one, and
# an unused one is a row of the embedding that no text reaches.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_AS_QWEN2 = ("qwen2", "deepseek-r1-qwen")  # two names in llama.cpp, one way to cut

# How Qwen2 cuts text before BPE (tokenizer.json of Qwen2.5).
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def filler(index: int) -> str:
    """What llama.cpp calls a row of the embedding that has no token."""
    return f"[PAD{index}]"


def build_tokenizer(file: Gguf) -> "Tokenizer":
    """The tokenizer a file describes: vocabulary, merges, and the pre-tokeniser it names.

    llama     of SentencePiece's kind, without a blank before a text: see spm_tokenizer
    gpt-2     GPT-2's regular expression
    smollm    single digits, then GPT-2's regular expression
    qwen2     NFC, then Qwen2's regular expression, in which digits are single too
    Raises    MespRefError for another tokenizer model or pre-tokeniser, by name
    """
    from tokenizers import Tokenizer, decoders, models

    if file.expect("tokenizer.ggml.model", "gpt2", "llama") == "llama":
        return spm_tokenizer(file)
    cut = file.expect("tokenizer.ggml.pre", "gpt-2", "smollm", *_AS_QWEN2)
    tokens: list[str] = file.list_of("tokenizer.ggml.tokens", str)
    merges = [tuple(merge.split(" ")) for merge in file.list_of("tokenizer.ggml.merges", str)]
    kinds = _kinds(file, tokens)
    unused = {i for i, (t, k) in enumerate(kinds) if k == UNUSED and t == filler(i)}
    vocabulary = {token: i for i, token in enumerate(tokens) if i not in unused}
    with reasons(f"{file.path}: tokenizer.ggml.merges"):
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    _set_cut(tokenizer, cut)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, file, kinds)
    return tokenizer


def _kinds(file: Gguf, tokens: list[str]) -> list[tuple[str, int]]:
    """Every token with its kind."""
    types = file.list_of("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise MespRefError(
            f"{file.path}: tokenizer.ggml.token_type: found {len(types)}, expected {len(tokens)}"
        )
    return list(zip(tokens, types, strict=True))


def _add_tokens(tokenizer: "Tokenizer", file: Gguf, kinds: list[tuple[str, int]]) -> None:
    """The tokens that are found before text is cut, and those that frame a text."""
    from tokenizers import AddedToken

    special = [AddedToken(t, special=True, normalized=False) for t, k in kinds if k == CONTROL]
    plain = [AddedToken(t, special=False, normalized=False) for t, k in kinds if k == USER_DEFINED]
    with reasons(f"{file.path}: tokenizer.ggml.tokens"):
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens(plain)
        _set_frame(tokenizer, file, [token for token, _ in kinds])


def spm_tokenizer(file: Gguf) -> "Tokenizer":
    """BPE whose merges are said by scores: of two pieces side by side those are joined first whose
    whole has the highest score; what has no piece falls back to its bytes; blanks are written ▁.

    Raises MespRefError for a file that puts a blank before every text, and for scores that are none.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens: list[str] = file.list_of("tokenizer.ggml.tokens", str)
    scores: list[float] = file.list_of("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise MespRefError(
            f"{file.path}: tokenizer.ggml.scores: found {len(scores)}, expected {len(tokens)}"
        )
    if file.get("tokenizer.ggml.add_space_prefix", True) is not False:
        raise MespRefError(
            f"{file.path}: tokenizer.ggml.add_space_prefix: found no false, expected one: a blank "
            "before every text is not added here"
        )
    kinds = _kinds(file, tokens)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pieces = [i for i, (_, kind) in enumerate(kinds) if kind == NORMAL]
    unknown = file.get("tokenizer.ggml.unknown_token_id")
    model = models.BPE(
        vocab=vocabulary, merges=_merges(pieces, tokens, scores, vocabulary), byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown is None else tokens[
            _token_id(file, "tokenizer.ggml.unknown_token_id", unknown, tokens)],
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_tokens(tokenizer, file, kinds)
    return tokenizer


def _merges(
    pieces: list[int], tokens: list[str], scores: list[float], vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the highest score first."""
    ordered = sorted(pieces, key=lambda i: -scores[i])
    return [
        (tokens[i][:at], tokens[i][at:])
        for i in ordered
        for at in range(1, len(tokens[i]))
        if tokens[i][:at] in vocabulary and tokens[i][at:] in vocabulary
    ]


def _set_cut(tokenizer: "Tokenizer", cut: str) -> None:
    """How text is cut before BPE, by llama.cpp's name for it."""
    from tokenizers import Regex, normalizers
    from tokenizers import pre_tokenizers as pre

    gpt2 = pre.ByteLevel(add_prefix_space=False)
    if cut == "gpt-2":
        tokenizer.pre_tokenizer = gpt2
    elif cut == "smollm":
        tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), gpt2])
    else:
        tokenizer.normalizer = normalizers.NFC()
        split = pre.Split(Regex(QWEN2), behavior="isolated")
        plain = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre.Sequence([split, plain])


def _set_frame(tokenizer: "Tokenizer", file: Gguf, tokens: list[str]) -> None:
    """The tokens that the file wants before and behind every text."""
    from tokenizers import processors

    before, behind = (_framing_token(file, name, tokens) for name in ("bos", "eos"))
    frame = [*before, "$A", *behind]
    if len(frame) > 1:
        special = [(t, tokens.index(t)) for t in dict.fromkeys(before + behind)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(frame), special_tokens=special
        )


def _framing_token(file: Gguf, name: str, tokens: list[str]) -> list[str]:
    """The token that stands before (bos) or behind (eos) every text; none where the file wants none."""
    if file.get(f"tokenizer.ggml.add_{name}_token", False) is not True:
        return []
    index = file[f"tokenizer.ggml.{name}_token_id"]
    return [tokens[_token_id(file, f"tokenizer.ggml.{name}_token_id", index, tokens)]]


def _token_id(file: Gguf, key: str, index: object, tokens: list[str]) -> int:
    if type(index) is not int or not 0 <= index < len(tokens):
        raise MespRefError(
            f"{file.path}: {key}: found {shown(index)}, expected below {len(tokens)}"
        )
    return index


def tokenizer_config(file: Gguf) -> dict[str, Any]:
    """tokenizer_config.json: special tokens and the chat template, as far as the file has them."""
    tokens = file.list_of("tokenizer.ggml.tokens", str)
    # PreTrainedTokenizerFast takes tokenizer.json as it is; AutoTokenizer of transformers 5 prefers
    # Qwen2Tokenizer for every qwen2 directory, whose own regex splits numbers otherwise.
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = file.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            where = f"tokenizer.ggml.{key}_token_id"
            values[f"{name}_token"] = tokens[_token_id(file, where, index, tokens)]
    values["model_max_length"] = file[f"{file.architecture}.context_length"]
    values["clean_up_tokenization_spaces"] = False
    template = file.get("tokenizer.chat_template")
    return values if template is None else values | {"chat_template": template}


def write_tokenizer(file: Gguf, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    build_tokenizer(file).save(str(directory / "tokenizer.json"))
    text = json.dumps(tokenizer_config(file), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
