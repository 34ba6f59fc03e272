"""The tokenizer of a checkpoint directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.fields import (
    Reader,
    boolean,
    either,
    empty,
    harmless,
    list_of,
    read_fields,
    record,
    rows,
    text,
)
from mesp_ref.files.strict import inside, read_bytes, read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# tokenizer_config.json: the chat template and special tokens are read from it; what it says beside
# that is for another program's tokenizer class, and tokenizer.json is the tokenizer here.
_SPECIAL = either("a token's text, or an object with it as content", text, record({
    "content": text, "__type": text, "lstrip": boolean, "rstrip": boolean, "normalized": boolean,
    "single_word": boolean, "special": boolean,
}))  # fmt: skip
_FIELDS: dict[str, Reader] = {
    "chat_template": either(
        "a text, or a list of named ones",
        text, list_of(record({"name": text, "template": text})),
    ),
    "auto_map": empty,  # names Python code of the checkpoint's own, which is never run
} | rows(
    _SPECIAL,
    """
    bos_token eos_token pad_token unk_token sep_token cls_token mask_token image_token audio_token
    video_token vision_bos_token vision_eos_token
    """,
) | harmless(
    """
    added_tokens_decoder additional_special_tokens extra_special_tokens add_bos_token add_eos_token
    add_prefix_space backend chat_template_kwargs clean_up_tokenization_spaces device errors
    fix_mistral_regex from_slow is_local legacy local_files_only max_length
    max_pixels min_pixels model_input_names model_max_length model_specific_special_tokens
    name_or_path pad_to_multiple_of pad_token_type_id padding padding_side processor_class
    response_schema return_token_type_ids revision sp_model_kwargs spaces_between_special_tokens
    special_tokens special_tokens_map_file split_special_tokens stride tokenizer_class
    tokenizer_file tokenizer_type tool_parser_type truncation truncation_side truncation_strategy
    trust_remote_code unsloth_version use_default_system_prompt use_fast vocab_file merges_file
    vocab_size
    """
)  # fmt: skip

_LIMIT = 1 << 28  # bytes; Qwen2.5's has 7 MB


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The tokenizer.json of a checkpoint directory, without truncation or padding of its own.

    Raises MespRefError when the file is missing or is not a tokenizer.
    """
    from tokenizers import Tokenizer

    file = inside(path, "tokenizer.json")
    if not file.is_file():
        raise MespRefError(
            f"{file}: not found, expected the model's tokenizer; copy it beside config.json"
        )
    with reasons(f"{file}: not a tokenizer"):
        tokenizer = Tokenizer.from_buffer(read_bytes(file, _LIMIT))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def read_tokenizer_config(path: str | Path) -> dict[str, Any]:
    """The fields of a checkpoint directory's tokenizer_config.json; none where it has no such file.

    Raises MespRefError naming the field for one that is unknown or of another type.
    """
    file = inside(path, "tokenizer_config.json")
    if not file.exists():
        return {}
    return read_fields(read_object(file, "a tokenizer's settings"), _FIELDS, file)


@contextmanager
def reasons(what: str) -> Iterator[None]:
    """Whatever goes wrong inside the tokenizers package, as a MespRefError that begins with `what`.

    The package raises bare Exception for what it cannot parse, and its panics are no Exception.
    """
    try:
        yield
    except (MespRefError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise MespRefError(f"{what}: {shown(' '.join(str(error).split()))}") from None
