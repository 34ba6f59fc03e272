"""The default checkpoint, from nothing: tokenizer, full-parameter training, proof, model card."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.models import random_model
from mesp_ref.files.output import new_directory, write_aside
from mesp_ref.job.card import model_card
from mesp_ref.job.directory import write_json
from mesp_ref.job.metrics import Event
from mesp_ref.job.report import Reporter
from mesp_ref.job.state import environment
from mesp_ref.job.storyteller import StoryRows, heldout_loss, openings, tell
from mesp_ref.memory import PeakResident
from mesp_ref.stories.tales import TALES
from mesp_ref.stories.tokenizer import END, tokenizer_config, train_tokenizer
from mesp_ref.train.bounds import check_bounds, option
from mesp_ref.train.optim import AdamW
from mesp_ref.train.rows import RowStream
from mesp_ref.train.trainer import TrainConfig, Trainer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Report = Callable[[Event], object]
# A mean square that remembers 50 steps: the gradients of the first hundred steps are ten times as
# large as later ones, and AdamW's usual 1000 steps would slow down a good part of a short run.
_BETAS = (0.9, 0.98)
_PARAMETERS = 10**9


@dataclass(frozen=True)
class PretrainOptions:
    """What `mesp-ref pretrain` is told: where to, how long, how large, from which seed.

    heldout, samples   stories to measure the loss on, and to write and check, at the end
    """

    out: str
    steps: int = option(8000, "optimiser steps")
    batch_size: int = option(8, "rows per step")
    seq_len: int = option(256, "tokens per row")
    lr: float = option(2.5e-3, "AdamW's learning rate after the warm-up")
    seed: int = option(0, "decides the stories, their order and the weights at the start")
    method: str = option(
        "store_all", "where gradients come from: all give the same bits",
        choices=("store_all", "mebp", "mesp"),
    )  # fmt: skip
    vocab_size: int = option(1280, "tokens of the byte-level BPE, at most")
    hidden_size: int = option(192, "width of the model")
    intermediate_size: int = option(512, "width of its MLPs")
    layers: int = option(4, "number of blocks")
    heads: int = option(6, "query heads")
    kv_heads: int = option(2, "key/value heads")
    head_dim: int = option(32, "size of a head")
    heldout: int = option(500, "stories to measure the loss on")
    samples: int = option(200, "stories to write, each way, for the grammar to check")
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_bounds(vars(self))
        size = self.layers * self.hidden_size * (3 * self.intermediate_size + 2 * self.hidden_size)
        if size > _PARAMETERS:
            raise MespRefError(
                f"layers: found some {size:,} parameters with hidden_size and intermediate_size, "
                f"expected at most {_PARAMETERS:,} of a model that is trained from nothing"
            )
        self.train_config()

    def command(self) -> str:
        """The command line of this run: what differs from the defaults."""
        given = [
            f" --{field.name.replace('_', '-')} {getattr(self, field.name)}"
            for field in fields(self)
            if field.name not in ("out", "overwrite") and getattr(self, field.name) != field.default
        ]
        return f"mesp-ref pretrain --out {Path(self.out).absolute().name}{''.join(given)}"

    def train_config(self) -> TrainConfig:
        """AdamW with 5% warm-up and a cosine down to 0, clipped at norm 1."""
        return TrainConfig(
            method=self.method,
            lr=self.lr,
            warmup=self.steps // 20,
            steps=self.steps,
            batch_size=self.batch_size,
            accumulate=1,
            seq_len=self.seq_len,
            seed=self.seed,
        )

    def model_config(self, tokenizer: "Tokenizer") -> Qwen2Config:
        """The Qwen2 model to train, with the ids of its tokenizer."""
        end = tokenizer.token_to_id(END)
        return Qwen2Config(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_theta=10000.0,
            max_position_embeddings=self.seq_len,
            bos_token_id=end,
            eos_token_id=end,
        )


def pretrain(options: PretrainOptions, report: Report = lambda event: None) -> Event:
    """Train a story model from random weights and write its checkpoint directory.

    Returns the facts that the model card states: losses, entropy bound, accepted stories, time.
    `report` receives the events ready, step and measured.

    Raises MespRefError for options out of range, a place that cannot be written and a loss that is
    not finite; then nothing is written.
    """
    report = Reporter(report)
    with new_directory(options.out, overwrite=options.overwrite) as aside:
        tokenizer = train_tokenizer(options.vocab_size, options.seed)
        config = options.model_config(tokenizer)
        std = config.hidden_size**-0.5  # 0.02 suits models ten times as wide
        model = random_model(config, seed=options.seed, std=std)
        rows = StoryRows(tokenizer, options.seq_len, options.seed)
        trainer = Trainer(model, None, cast(RowStream, rows), options.train_config(), "all")
        trainer.optimizer = AdamW(betas=_BETAS)
        parameters = sum(array.size for array in trainer.params.values())
        report({"event": "ready", "parameters": parameters, **asdict(options)})
        seconds = _train(trainer, report)
        facts = {"parameters": parameters, "tokens": trainer.tokens, "seconds": seconds}
        facts |= measure(model, tokenizer, options)
        report({"event": "measured", "step": options.steps, **facts})
        write_checkpoint(aside, model, tokenizer, options, facts)
    return facts


def _train(trainer: Trainer, report: Report) -> float:
    """All steps of a run; returns their seconds."""
    begin = time.perf_counter()
    with PeakResident() as memory:
        while trainer.step < trainer.config.steps:
            start = time.perf_counter()
            result = trainer.advance()
            speed = result.computed_tokens / (time.perf_counter() - start)
            facts = {"tokens_per_second": speed, "memory_mb": memory.take()}
            report({"event": "step", **result._asdict(), **facts})
    return time.perf_counter() - begin


def measure(model: Model, tokenizer: "Tokenizer", options: PretrainOptions) -> dict[str, Any]:
    """Held-out loss beside its bound, and what the grammar says to the model's own stories."""
    held = heldout_loss(model, tokenizer, options.heldout, options.seed)
    first_sentences = openings(tokenizer, options.samples, options.seed)
    nothing = [tokenizer.encode("").ids] * options.samples  # END alone
    greedy, greedy_accepted = tell(model, tokenizer, first_sentences, 0.0)
    sampled, sampled_accepted = tell(model, tokenizer, nothing, 1.0, options.seed)
    return {
        **held._asdict(),
        "entropy": TALES.entropy(),
        "greedy_accepted": greedy_accepted,
        "sampled_accepted": sampled_accepted,
        "greedy": greedy[0],
        "sampled": sampled[0],
    }


def write_checkpoint(
    directory: Path,
    model: Model,
    tokenizer: "Tokenizer",
    options: PretrainOptions,
    facts: Mapping[str, Any],
) -> None:
    """Weights, configuration, tokenizer, chat template and model card."""
    arrays = {name: model.weights[name][...] for name in model.weights}
    save_checkpoint(model.config, arrays, directory)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    write_json(directory / "tokenizer_config.json", tokenizer_config(options.seq_len))
    known = asdict(options) | asdict(options.train_config()) | asdict(model.config)
    card = model_card(known | environment(), facts, options.command())
    with write_aside(directory / "README.md") as aside:
        aside.write_text(card, encoding="utf-8")
