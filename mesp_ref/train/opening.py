"""From a model and a data file to rows of tokens."""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import numpy as np

from mesp_ref.engine.model import Model
from mesp_ref.files.tokenizer import load_tokenizer
from mesp_ref.train.chat import load_chat_template
from mesp_ref.train.data import open_data
from mesp_ref.train.rows import Encoder, RowStream


def open_encoder(
    model: Model, kinds: Iterable[str], now: datetime, special_in_text: bool = False
) -> Encoder:
    """The encoder of a model directory for these kinds of record; token ids need no tokenizer."""
    assert model.path is not None
    kinds, tokenizer = set(kinds), None
    if kinds - {"tokens", "input_ids"} or (model.path / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(model.path)
    asked = kinds & {"messages", "conversations", "instruction", "prompt"}  # which may be of turns
    template = load_chat_template(model.path, now) if asked else None
    ends = model.config.eos_token_ids
    return Encoder(tokenizer, template, ends, model.config.vocab_size, special_in_text)


def open_stream(
    model: Model,
    path: Path,
    *,
    seq_len: int,
    form: str = "auto",
    packing: str = "auto",
    seed: int | None = None,
    special_in_text: bool = False,
) -> RowStream:
    """The rows of a whole file, in its own order or, with a seed, shuffled.

    Raises MespRefError for whatever is wrong with the file, or with the model's tokenizer for it
    """
    data = open_data(path, seq_len=seq_len, form=form, vocab_size=model.config.vocab_size)
    encoder = open_encoder(model, data.kinds, datetime.now(), special_in_text)
    return RowStream(
        data, encoder, np.arange(data.pages), seq_len=seq_len, packing=packing,
        seed=seed or 0, shuffle=seed is not None,
    )  # fmt: skip
