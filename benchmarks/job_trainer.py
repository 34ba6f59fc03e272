"""The peer of job.py: peft and transformers' Trainer on given rows, from a given adapter.

    python job_trainer.py MODEL ADAPTER ROWS.npy BATCH RATE OUT [checkpointed]

Writes OUT/adapter and OUT/losses.json. AdamW at a constant rate, the norm of the gradient bounded by 1.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


class Rows(torch.utils.data.Dataset):
    """Rows of tokens, all of them learned."""

    def __init__(self, rows: np.ndarray):
        self.rows = torch.from_numpy(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {"input_ids": self.rows[at], "labels": self.rows[at]}


class InOrder(Trainer):
    """A Trainer that takes the rows as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = train_dataset or self.train_dataset
        return torch.utils.data.SequentialSampler(rows)


def main() -> None:
    model_path, adapter, rows_path, batch, rate, out, *more = sys.argv[1:]
    rows = np.load(rows_path)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    checkpointed = "checkpointed" in more
    settings = TrainingArguments(
        output_dir=out, per_device_train_batch_size=int(batch), max_steps=len(rows) // int(batch),
        learning_rate=float(rate), lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0,
        optim="adamw_torch", logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, gradient_checkpointing=checkpointed,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointed else None,
    )  # fmt: skip
    trainer = InOrder(model=model, args=settings, train_dataset=Rows(rows))
    trainer.train()
    model.save_pretrained(str(Path(out) / "adapter"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (Path(out) / "losses.json").write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main()
