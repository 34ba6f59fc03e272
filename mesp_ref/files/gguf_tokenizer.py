"""The byte-level BPE tokenizer inside a GGUF file as tokenizer.json and tokenizer_config.json."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.gguf import Gguf
from mesp_ref.files.tokenizer import reasons

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # values of token_type in GGUF: <|im_start|>; <tool_call>

# How Qwen2 cuts text before BPE (tokenizer.json of Qwen2.5).
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(file: Gguf) -> "Tokenizer":
    """The tokenizer a file describes: vocabulary, merges, and the pre-tokeniser it names.

    smollm    single digits, then GPT-2's regular expression
    qwen2     NFC, then Qwen2's regular expression, in which digits are single too
    Raises    MespRefError for another tokenizer model or pre-tokeniser, by name
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    file.expect("tokenizer.ggml.model", "gpt2")
    cut = file.expect("tokenizer.ggml.pre", "smollm", "qwen2")
    tokens: list[str] = file.list_of("tokenizer.ggml.tokens", str)
    merges = [tuple(merge.split(" ")) for merge in file.list_of("tokenizer.ggml.merges", str)]
    types = file.list_of("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise MespRefError(
            f"{file.path}: tokenizer.ggml.token_type: found {len(types)}, expected {len(tokens)}"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    with reasons(f"{file.path}: tokenizer.ggml.merges"):
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        split = pre.Split(Regex(_QWEN2), behavior="isolated")
        steps = [split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, types, strict=True))
    special = [AddedToken(t, special=True, normalized=False) for t, k in kinds if k == _CONTROL]
    plain = [AddedToken(t, special=False, normalized=False) for t, k in kinds if k == _USER_DEFINED]
    with reasons(f"{file.path}: tokenizer.ggml.tokens"):
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens(plain)
    return tokenizer


def tokenizer_config(file: Gguf) -> dict[str, Any]:
    """tokenizer_config.json: special tokens and the chat template, as far as the file has them."""
    tokens = file.list_of("tokenizer.ggml.tokens", str)
    # PreTrainedTokenizerFast takes tokenizer.json as it is; AutoTokenizer of transformers 5 prefers
    # Qwen2Tokenizer for every qwen2 directory, whose own regex splits numbers otherwise.
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = file.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            if type(index) is not int or not 0 <= index < len(tokens):
                raise MespRefError(
                    f"{file.path}: tokenizer.ggml.{key}_token_id: found {shown(index)}, expected "
                    f"below {len(tokens)}"
                )
            values[f"{name}_token"] = tokens[index]
    values["model_max_length"] = file[f"{file.architecture}.context_length"]
    values["clean_up_tokenization_spaces"] = False
    template = file.get("tokenizer.chat_template")
    return values if template is None else values | {"chat_template": template}


def write_tokenizer(file: Gguf, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    build_tokenizer(file).save(str(directory / "tokenizer.json"))
    text = json.dumps(tokenizer_config(file), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
