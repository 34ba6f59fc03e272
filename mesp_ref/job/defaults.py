"""What a run takes where nothing is said: conversations about stories, and how to train on them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mesp_ref.errors import MespRefError
from mesp_ref.files.hub import data_path
from mesp_ref.stories import write_questions

CONVERSATIONS = 2000
# The default checkpoint is a thousandth of the usual size: larger steps, larger batches.
RECIPE: dict[str, Any] = {"steps": 250, "lr": 1e-2, "batch_size": 8, "accumulate": 1}
EVAL_EVERY = 50  # steps


@contextmanager
def data_file(path: str | Path | None, count: int = CONVERSATIONS, seed: int = 0) -> Iterator[Path]:
    """The file named, here or on the hub, or `count` questions about stories while this lasts.

    The stories of two seeds are different ones: what is trained on is not what is evaluated on.
    """
    if path is not None:
        yield data_path(path)
        return
    with tempfile.TemporaryDirectory(prefix="mesp-ref-") as folder:
        file = Path(folder) / "questions.jsonl"
        write_questions(file, count, seed)
        try:
            yield file
        except MespRefError as error:
            if str(file) not in str(error):
                raise
            # a file that nobody named says nothing to anybody
            text = str(error).replace(str(file), "questions about stories, taken without --data")
            raise MespRefError(text) from None
