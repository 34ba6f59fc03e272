"""The loop: accumulation, updates per block, saved state, resume after any interruption."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
from helpers import words

import mesp_ref as mr
from mesp_ref.errors import MespRefError
from mesp_ref.job import finetune as finetune_module
from mesp_ref.job.directory import RunDirectory
from mesp_ref.job.finetune import FinetuneOptions, finetune
from mesp_ref.job.patience import Best
from mesp_ref.job.state import load_state, model_fingerprint, save_state
from mesp_ref.ops import IGNORED
from mesp_ref.train import rows as rows_module
from mesp_ref.train import trainer as trainer_module
from mesp_ref.train.data import open_data
from mesp_ref.train.optim import SGD, global_norm
from mesp_ref.train.rows import Cursor, Encoder, Row, RowStream
from mesp_ref.train.trainer import NonFinite, TrainConfig, Trainer, evaluate

PLAIN = TrainConfig(
    optimizer="sgd", lr=0.5, schedule="constant", steps=6, batch_size=2, accumulate=1, clip=0
)


def row(length, seed, ignored=0):
    ids = np.random.default_rng(seed).integers(3, 300, length).astype(np.int32)
    labels = ids.copy()
    labels[1 : 1 + ignored] = IGNORED
    return Row(ids, labels)


class Rows:
    """Stands in for a RowStream: the given rows, over and over."""

    def __init__(self, rows):
        self.rows, self.cursor = rows, Cursor()

    def take(self, count):
        start = self.cursor.row
        self.cursor = Cursor(0, 0, start + count)
        return [self.rows[(start + i) % len(self.rows)] for i in range(count)]


ROWS = [row(9, 1), row(5, 2, ignored=2), row(7, 3), row(12, 4, ignored=9), row(6, 5), row(4, 6)]


@pytest.fixture
def model(tiny_config):
    return mr.random_model(tiny_config, seed=3, dtype="float64", std=0.2)


@pytest.fixture
def adapter(tiny_config):
    return mr.init_lora(tiny_config, rank=3, alpha=6.0, seed=4, b_std=0.1, dtype="float64")


def copy(adapter):
    return adapter.astype("float64")


def batch(rows):
    length = max(len(r.ids) for r in rows)
    ids = [[*r.ids.tolist(), *[0] * (length - len(r.ids))] for r in rows]
    labels = [[*r.labels.tolist(), *[-100] * (length - len(r.labels))] for r in rows]
    return np.array(ids), np.array(labels)


# One step


def test_accumulated_batches_are_one_large_batch(model, adapter):
    """Rows of very different numbers of counted tokens: a mean of means would be far off."""
    expected = copy(adapter)
    loss, grads = mr.loss_and_grads(model, expected, *batch(ROWS), method="store_all")
    for name, grad in grads.items():
        expected.weights[name] -= 0.5 * grad
    config = dataclasses.replace(PLAIN, batch_size=1, accumulate=6)
    result = Trainer(model, adapter, Rows(ROWS), config).advance()
    assert result.loss == pytest.approx(loss, rel=1e-14)
    assert result.tokens == 8 + 2 + 6 + 2 + 5 + 3
    for name, want in expected.weights.items():
        np.testing.assert_allclose(adapter.weights[name], want, rtol=0, atol=1e-14)


def test_accumulation_weighs_tokens(model, adapter, monkeypatch):
    """Losses 1, 2 and 4 over 8, 2 and 6 tokens: (8 + 4 + 24)/16."""
    losses = iter([1.0, 2.0, 4.0])
    name = next(iter(adapter.weights))

    def fake(*args, **kwargs):
        value = next(losses)
        kwargs["on_gradients"](0, {name: np.full_like(adapter.weights[name], 2 * value)})
        return value, {}

    monkeypatch.setattr(trainer_module, "loss_and_grads", fake)
    before = adapter.weights[name].copy()
    config = dataclasses.replace(PLAIN, batch_size=1, accumulate=3)
    assert Trainer(model, adapter, Rows(ROWS), config).advance().loss == 2.25
    np.testing.assert_allclose(before - adapter.weights[name], 0.5 * 4.5, rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", ["store_all", "mebp", "mesp", "mezo"])
@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_updating_per_block_is_updating_at_once(tiny_config, adapter, method, trainable):
    """The update of a block comes after its dx was formed from the old parameters."""
    models = [mr.random_model(tiny_config, seed=3, dtype="float64", std=0.2) for _ in range(2)]
    config = dataclasses.replace(PLAIN, method=method)
    adapters = [adapter, copy(adapter)]
    trainers = [
        Trainer(m, a, Rows(ROWS), config, trainable) for m, a in zip(models, adapters, strict=True)
    ]
    assert config.per_block
    for _ in range(3):
        trainers[0].advance()
        held = trainers[1]
        rows = held.stream.take(2)
        _, grads = held._accumulate([rows])
        held.optimizer.step(held.params, grads, 0.5)
        held.step += 1
    for name, array in trainers[0].params.items():
        np.testing.assert_array_equal(array, trainers[1].params[name], err_msg=name)


def test_noise_is_new_in_every_batch_and_repeatable(model, adapter, monkeypatch):
    def seeds(seed):
        seen = []

        def fake(*args, seed, **kwargs):
            seen.append(seed)
            return 1.0, {}

        monkeypatch.setattr(trainer_module, "loss_and_grads", fake)
        config = dataclasses.replace(PLAIN, method="mezo", accumulate=2, seed=seed)
        trainer = Trainer(model, adapter, Rows(ROWS), config)
        for _ in range(3):
            trainer.advance()
        return seen

    assert seeds(0) == seeds(0)
    assert len({*seeds(0), *seeds(1)}) == 12


def test_only_one_blocks_gradients_live(model, adapter, monkeypatch):
    trainer = Trainer(model, adapter, Rows(ROWS), PLAIN)
    alive, most = [], 0

    class Watching(SGD):
        def step(self, params, grads, lr):
            nonlocal most
            alive.extend(weakref.ref(grad) for grad in grads.values())
            most = max(most, sum(ref() is not None for ref in alive))
            super().step(params, grads, lr)

    trainer.optimizer = Watching()
    trainer.advance()
    assert len(alive) == 2 * 14
    assert most == 14


def test_gradient_norm_is_reported_before_clipping(model, adapter):
    _, grads = mr.loss_and_grads(model, copy(adapter), *batch(ROWS[:2]))
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    before = copy(adapter)
    config = dataclasses.replace(PLAIN, clip=norm / 4)
    result = Trainer(model, adapter, Rows(ROWS), config).advance()
    assert result.grad_norm == pytest.approx(norm, rel=1e-12)
    moved = {n: before.weights[n] - w for n, w in adapter.weights.items()}
    assert global_norm(moved) == pytest.approx(0.5 * norm / 4, rel=1e-12)
    per_block = Trainer(model, before, Rows(ROWS), PLAIN).advance()
    assert per_block.grad_norm == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("clip", [0, 1.0], ids=["per block", "at once"])
def test_a_loss_that_is_not_finite_changes_nothing(tiny_config, adapter, clip):
    model = mr.random_model(tiny_config, dtype="float64")
    model.weights["model.layers.1.mlp.up_proj.weight"][0, 0] = np.inf
    before, stream = copy(adapter), Rows(ROWS)
    trainer = Trainer(model, adapter, stream, dataclasses.replace(PLAIN, clip=clip))
    with pytest.raises(NonFinite, match=r"step 1: .*found (nan|inf)") as error:
        trainer.advance()
    assert not error.value.torn
    assert (trainer.step, stream.cursor) == (0, Cursor())
    for name, array in before.weights.items():
        np.testing.assert_array_equal(array, adapter.weights[name])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_mezo_tells_the_step_of_a_loss_that_is_not_finite(tiny_config, adapter, accumulate):
    """The forward itself refuses the loss; the parameters are back within MeZO's own rounding."""
    model = mr.random_model(tiny_config, dtype="float64")
    model.weights["model.layers.1.mlp.up_proj.weight"][0, 0] = np.inf
    before, stream = copy(adapter), Rows(ROWS)
    config = dataclasses.replace(PLAIN, method="mezo", accumulate=accumulate)
    trainer = Trainer(model, adapter, stream, config)
    with pytest.raises(NonFinite, match=r"step 1: loss: found (nan|inf).*smaller --lr") as error:
        trainer.advance()
    assert not error.value.torn
    assert (trainer.step, stream.cursor) == (0, Cursor())
    for name, array in before.weights.items():
        np.testing.assert_allclose(array, adapter.weights[name], rtol=0, atol=1e-15)


def test_evaluation_is_a_mean_over_tokens(model, adapter, monkeypatch):
    assert evaluate(model, adapter, ROWS, batch_size=1)[1] == 26
    ids, labels = batch(ROWS)
    whole = mr.loss(model, adapter, ids, labels)
    right = (mr.logits(model, ids, adapter).argmax(-1)[:, :-1] == labels[:, 1:]).sum()
    for size in (1, 4, 9):
        got, tokens, accuracy = evaluate(model, adapter, ROWS, batch_size=size)
        assert tokens == 26
        assert got == pytest.approx(whole, rel=1e-13)
        assert accuracy == pytest.approx(right / 26)
    monkeypatch.setattr(
        trainer_module, "score", lambda m, a, ids, labels, _, chunk: (ids.shape[1], 0)
    )
    assert evaluate(model, adapter, ROWS[:2], 1)[0] == (8 * 9 + 2 * 5) / 10


@pytest.mark.parametrize(
    "change",
    [{"optimizer": "adamw"}, {"momentum": 0.9}, {"method": "mezo", "lr": 0.001}, {"clip": 0.1}],
    ids=["adamw", "momentum", "mezo", "clip"],
)
def test_restored_state_continues_bit_for_bit(model, adapter, tmp_path, change):
    config = dataclasses.replace(PLAIN, **change)
    start = copy(adapter)
    through = Trainer(model, adapter, Rows(ROWS), config)
    for _ in range(6):
        through.advance()
    first = Trainer(model, copy(start), Rows(ROWS), config)
    for _ in range(2):
        first.advance()
    save_state(tmp_path / "state.safetensors", *first.state())
    second = Trainer(model, copy(start), Rows(ROWS), config)
    second.restore(*load_state(tmp_path / "state.safetensors"))
    assert (second.step, second.tokens, second.stream.cursor.row) == (2, 18, 4)
    for _ in range(4):
        second.advance()
    for name, array in adapter.weights.items():
        np.testing.assert_array_equal(array, second.params[name])
        assert not np.array_equal(array, start.weights[name])


def test_all_weights_can_be_trained(tiny_config):
    model = mr.random_model(tiny_config, seed=1)
    before = {name: array.copy() for name, array in model.weights.items()}
    config = dataclasses.replace(PLAIN, optimizer="adamw", lr=0.01, steps=15, clip=1.0)
    trainer = Trainer(model, None, Rows(ROWS[:2]), config, trainable="all")
    losses = [trainer.advance().loss for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]
    for name, array in model.weights.items():
        assert not np.array_equal(array, before[name]), name


def test_mapped_weights_cannot_be_trained(tiny_model_dir):
    model = mr.load_model(tiny_model_dir)
    with pytest.raises(MespRefError, match="read_into_memory"):
        Trainer(model, None, Rows(ROWS), PLAIN, trainable="all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "adjoint"}, "method: found 'adjoint', expected one of store_all"),
        ({"optimizer": "lion"}, "optimizer: found 'lion'"),
        ({"schedule": "step"}, "schedule: found 'step'"),
        ({"checkpoints": "tape"}, "checkpoints: found 'tape'"),
        ({"steps": 0}, "steps: found 0, expected at least 1"),
        ({"seq_len": 1}, "seq_len: found 1, expected at least 2"),
        ({"seed": -1}, "seed: found -1"),
        ({"lr": 0.0}, "lr: found 0.0"),
        ({"lr": math.nan}, "lr: found nan"),
        ({"eps": -1.0}, "eps: found -1.0"),
        ({"clip": -1.0}, "clip: found -1.0"),
        ({"warmup": 9}, "warmup: found 9 steps, expected 0 to 6"),
        ({"weight_decay": -1.0}, "weight_decay: found -1.0"),
        ({"optimizer": "adamw", "momentum": 0.5}, "momentum: found 0.5 with adamw"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(MespRefError) as error:
        dataclasses.replace(PLAIN, **change)
    assert message in str(error.value)


# Saved state


def test_a_failed_save_leaves_the_old_state(tmp_path):
    """As on a full disk: no file may grow beyond 4 KiB."""
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": np.arange(3.0)}, {"step": 1})
    resource = pytest.importorskip("resource", reason="not on Windows")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(MespRefError, match=r"state.safetensors: cannot be written"):
            save_state(path, {"a": np.zeros(10_000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    arrays, facts = load_state(path)
    assert (arrays["a"].tolist(), facts) == ([0.0, 1.0, 2.0], {"step": 1})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_state_is_a_plain_safetensors_file(tmp_path):
    from safetensors.numpy import load_file

    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3).T, "count": np.array([7])}
    save_state(tmp_path / "s", arrays, {})
    got = load_file(tmp_path / "s")
    np.testing.assert_array_equal(got["x"], [[0, 3], [1, 4], [2, 5]])
    assert (got["x"].dtype, got["count"].tolist()) == (np.float32, [7])


def test_fingerprints_tell_models_apart(tiny_model_dir, tiny_config, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    same = model_fingerprint(mr.load_model(other))
    assert same == model_fingerprint(mr.load_model(tiny_model_dir))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert model_fingerprint(mr.load_model(other)) != same
    seeds = [model_fingerprint(mr.random_model(tiny_config, seed=seed)) for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


# Whole runs


@pytest.fixture
def options(tiny_model_dir, text_file, tmp_path):
    return FinetuneOptions(
        model=str(tiny_model_dir),
        data=str(text_file),
        out=str(tmp_path / "run"),
        train=TrainConfig(lr=0.01, steps=12, accumulate=2, seq_len=24),
        val_fraction=0.2,
        save_every=4,
        sample_tokens=6,
    )


def adapter_bytes(path):
    return (path / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_leaves_what_it_promises(options, tmp_path, tiny_config):
    events = []
    summary = finetune(options, events.append)
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        ".mesp-ref.json",
        "adapter",
        "loss.png",
        "metrics.csv",
        "metrics.jsonl",
        "run.json",
        "state.safetensors",
        "summary.json",
    }
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["after"]["perplexity"] == pytest.approx(math.exp(summary["after"]["loss"]))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in lines if e["event"] == "step"] == list(range(1, 13))
    assert [e["step"] for e in lines if e["event"] == "eval"] == [0, 12]
    assert [e["step"] for e in events if e["event"] == "saved"] == [0, 4, 8, 12]
    model = mr.load_model(options.model)
    adapter = mr.load_adapter(run / "adapter", config=tiny_config)
    assert adapter.base_model_name_or_path == Path(options.model).name
    content = (tmp_path / "text.txt").read_bytes()
    configuration = json.loads((run / "run.json").read_text())
    assert configuration["identity"]["data"] == hashlib.sha256(content).hexdigest()
    assert configuration["options"]["train"]["seq_len"] == 24
    [text] = mr.generate(
        model, [mr.load_tokenizer(options.model).encode(summary["prompt"]).ids], adapter, 6
    )
    tokenizer = mr.load_tokenizer(options.model)
    assert summary["after"]["sample"] == tokenizer.decode(text, skip_special_tokens=True)


def test_runs_repeat_bit_for_bit(options, tmp_path):
    again = dataclasses.replace(options, out=str(tmp_path / "again"))
    seeded = dataclasses.replace(
        options,
        out=str(tmp_path / "seeded"),
        train=dataclasses.replace(options.train, seed=1),
    )
    for one in (options, again, seeded):
        finetune(one)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "again")
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(tmp_path / "seeded")


class PowerCutError(BaseException):
    """The machine stops."""


def cut_off(options, when):
    """A run that the machine does not survive beyond an event."""
    kind, step = when.split()

    def cut(event):
        if (event["event"], event.get("step")) == (kind, int(step)):
            raise PowerCutError

    with pytest.raises(PowerCutError):
        finetune(options, cut)


@pytest.mark.parametrize("when", ["step 1", "step 6", "saved 8", "step 12", "eval 12"])
def test_resume_is_exact_wherever_the_run_stopped(options, tmp_path, when):
    whole = dataclasses.replace(options, out=str(tmp_path / "whole"))
    finetune(whole)
    cut_off(options, when)
    summary = finetune(dataclasses.replace(options, resume=True))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    want = json.loads((tmp_path / "whole" / "summary.json").read_text())
    for side in ("before", "after"):
        assert summary[side] == want[side]
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in lines if e["event"] == "step"] == list(range(1, 13))
    assert [e["step"] for e in lines if e["event"] == "eval"] == [0, 12]


@pytest.mark.parametrize("when", ["step 1", "saved 8", "step 11"])
def test_resume_draws_the_same_noise_for_every_perturbation(options, tmp_path, when):
    """MeZO over three seeds a batch, each of them made from the step's own."""
    noisy = dataclasses.replace(options.train, method="mezo", perturbations=3)
    options = dataclasses.replace(options, train=noisy)
    finetune(dataclasses.replace(options, out=str(tmp_path / "whole")))
    cut_off(options, when)
    finetune(dataclasses.replace(options, resume=True))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    fewer = dataclasses.replace(noisy, perturbations=2)
    with pytest.raises(MespRefError, match="--resume: perturbations: found 2, expected 3"):
        finetune(dataclasses.replace(options, train=fewer, resume=True))


def test_resume_completes_a_save_that_was_cut_in_two(options, tmp_path, monkeypatch):
    """The power goes after the last state was written and before its adapter was."""
    finetune(dataclasses.replace(options, out=str(tmp_path / "whole")))
    calls = []

    def cut(adapter, path, overwrite):
        calls.append(path)
        if len(calls) == 4:
            raise PowerCutError
        mr.save_adapter(adapter, path, overwrite)

    monkeypatch.setattr(finetune_module, "save_adapter", cut)
    with pytest.raises(PowerCutError):
        finetune(options)
    monkeypatch.undo()
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(tmp_path / "whole")
    finetune(dataclasses.replace(options, resume=True))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def change_train(options, **change):
    return dataclasses.replace(options, train=dataclasses.replace(options.train, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: change_train(o, seed=5), "--resume: seed: found 5, expected 0"),
        (lambda o: change_train(o, lr=0.5), "--resume: lr: found 0.5, expected 0.01"),
        (lambda o: change_train(o, steps=8), "--resume: steps: found 8, expected 12"),
        (lambda o: dataclasses.replace(o, rank=4), "--resume: rank: found 4, expected 8"),
        (lambda o: dataclasses.replace(o, targets="q_proj"), "--resume: targets: found"),
        (lambda o: dataclasses.replace(o, dtype="float64"), "--resume: dtype: found 'float64'"),
    ],
)
def test_resume_refuses_another_run(options, change, message):
    finetune(options)
    with pytest.raises(MespRefError) as error:
        finetune(change(dataclasses.replace(options, resume=True)))
    assert message in str(error.value)


def test_resume_refuses_other_data_and_models(options, tmp_path, tiny_config, tokenizer):
    from helpers import write_model

    finetune(options)
    resumed = dataclasses.replace(options, resume=True)
    (tmp_path / "other.txt").write_text(words(900, seed=9), encoding="utf-8")
    with pytest.raises(MespRefError, match="--resume: data: found another file"):
        finetune(dataclasses.replace(resumed, data=str(tmp_path / "other.txt")))
    other = write_model(tmp_path / "model", tiny_config, tokenizer, seed=8)
    with pytest.raises(MespRefError, match="--resume: model: found another file"):
        finetune(dataclasses.replace(resumed, model=str(other)))


def test_resume_refuses_another_environment(options, monkeypatch):
    finetune(options)
    resumed = dataclasses.replace(options, resume=True)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "77")
    with pytest.raises(MespRefError, match="--resume: threads: found 77, expected "):
        finetune(resumed)
    finetune(dataclasses.replace(resumed, inexact=True))


def test_a_constant_schedule_may_be_prolonged(options, tmp_path):
    constant = change_train(options, schedule="constant", warmup=0)
    finetune(dataclasses.replace(constant, out=str(tmp_path / "whole")))
    finetune(change_train(constant, steps=7))
    finetune(dataclasses.replace(constant, resume=True))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_a_broken_model_stops_the_run_before_it_writes(options, tmp_path, tiny_config, tokenizer):
    from mesp_ref.engine.init import random_arrays
    from mesp_ref.files.checkpoint import save_checkpoint

    broken = tmp_path / "broken"
    arrays = random_arrays(tiny_config)
    arrays["model.norm.weight"][3] = np.nan
    save_checkpoint(tiny_config, arrays, broken)
    tokenizer.save(str(broken / "tokenizer.json"))
    with pytest.raises(MespRefError, match="step 0: held-out loss: found nan"):
        finetune(dataclasses.replace(options, model=str(broken)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("clip", [0, 1.0], ids=["per block", "at once"])
def test_divergence_keeps_the_last_good_adapter(options, tmp_path, clip):
    """At some step the learning rate throws the adapter out of the range of float32."""
    train = dataclasses.replace(options.train, accumulate=1, clip=clip)
    options = dataclasses.replace(options, train=train)

    def poison(event):
        if event["event"] == "step" and event["step"] == 5:
            trainer.params[next(iter(trainer.params))][:] = 1e38

    from mesp_ref.job.finetune import Run

    run = Run(options, Path(options.data), poison, RunDirectory(options.out))
    trainer = run.trainer
    with pytest.raises(MespRefError, match=r"step 6: .*; the adapter as of step") as error:
        run.execute()
    adapter = mr.load_adapter(tmp_path / "run" / "adapter")
    assert all(np.isfinite(array).all() for array in adapter.weights.values())
    assert "\n" not in str(error.value)


def test_a_step_cut_by_a_bad_gradient_is_not_saved(options, tmp_path, monkeypatch):
    """Block 1 was updated when the gradient of block 0 came out NaN: the adapter is torn."""
    options = change_train(options, accumulate=1, clip=0)
    true, steps = trainer_module.loss_and_grads, []

    def failing(*args, on_gradients, **kwargs):
        steps.append(None)

        def spoil(layer, grads):
            if len(steps) == 7 and layer == 0:
                next(iter(grads.values()))[:] = np.nan
            on_gradients(layer, grads)

        return true(*args, on_gradients=spoil, **kwargs)

    monkeypatch.setattr(trainer_module, "loss_and_grads", failing)
    with pytest.raises(
        MespRefError, match=r"step 7: gradient norm: found nan.*as of step 4 is kept"
    ):
        finetune(options)
    arrays, facts = load_state(tmp_path / "run" / "state.safetensors")
    assert facts["step"] == 4
    for name, array in mr.load_adapter(tmp_path / "run" / "adapter").weights.items():
        np.testing.assert_array_equal(array, arrays[f"param/{name}"])


def test_chat_data_is_learnt_and_sampled_through_the_template(options, tmp_path):
    turns = [
        {"role": "user", "content": "Where is the ship?"},
        {"role": "assistant", "content": "over the sea"},
    ]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)))
    train = dataclasses.replace(options.train, steps=40, lr=0.03, seq_len=128)
    options = dataclasses.replace(
        options, data=str(data), train=train, rank=8, sample_tokens=30, save_every=100
    )
    summary = finetune(options)
    assert summary["prompt"].endswith("Where is the ship?<|im_end|>\n<|im_start|>assistant\n")
    assert summary["after"]["sample"] == "over the sea"
    asked = dataclasses.replace(options, prompt="Where is the ship?", overwrite=True)
    assert finetune(asked)["prompt"] == summary["prompt"]


def test_memory_does_not_depend_on_the_size_of_the_file(tmp_path, tokenizer, monkeypatch):
    """Peak of Python and NumPy memory while rows of several pools are drawn, from 1.5 and 13 MB."""
    monkeypatch.setattr(rows_module, "POOL_BYTES", 1 << 17)
    text = words(2000, seed=2)
    peaks = []
    for copies in (150, 1300):
        path = tmp_path / f"{copies}.txt"
        with path.open("w", encoding="utf-8") as file:
            for _ in range(copies):
                file.write(text)
        tracemalloc.start()
        data = open_data(path, seq_len=256)
        stream = RowStream(
            data, Encoder(tokenizer, None, (), 300), np.arange(data.pages), seq_len=256
        )
        while stream.cursor < (0, 1, 9):
            stream.take(4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 12e6
    assert peaks[1] <= 1.05 * peaks[0], peaks


# Early stopping


@pytest.fixture
def overfitting(options, tmp_path):
    """Steps so large that the held-out loss is lowest some way before the end."""
    train = dataclasses.replace(options.train, lr=0.08, steps=40, schedule="constant", accumulate=1)
    return dataclasses.replace(options, train=train, eval_every=2, patience=3, save_every=5)


def held_out(directory):
    lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
    return {e["step"]: e["loss"] for e in lines if e["event"] == "eval"}, lines


def test_early_stopping_keeps_the_best_adapter(overfitting, tmp_path, tiny_config):
    """Three evaluations in a row without a lower loss end the run; adapter/ is from before them."""
    summary = finetune(overfitting)
    losses, lines = held_out(tmp_path / "run")
    best = min(losses, key=losses.__getitem__)
    assert summary["stopped_early"]
    assert 0 < best == summary["adapter_step"]
    assert summary["steps"] == max(losses) == best + 3 * 2 < 40
    assert summary["after"]["loss"] == losses[best] == min(losses.values())
    told = [(e["best_step"], e["evaluations_since_best"]) for e in lines if e["event"] == "eval"]
    assert told[-4:] == [(best, 0), (best, 1), (best, 2), (best, 3)]
    whole = dataclasses.replace(overfitting, patience=0, out=str(tmp_path / "whole"))
    finetune(change_train(whole, steps=best))  # the same steps, and no more
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    adapter = mr.load_adapter(tmp_path / "run" / "adapter", config=tiny_config)
    tokenizer, model = mr.load_tokenizer(overfitting.model), mr.load_model(overfitting.model)
    [said] = mr.generate(model, [tokenizer.encode(summary["prompt"]).ids], adapter, 6)
    assert summary["after"]["sample"] == tokenizer.decode(said, skip_special_tokens=True)
    table = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert table[-1].endswith(f",{best}")
    assert finetune(dataclasses.replace(overfitting, resume=True))["steps"] == summary["steps"]


def test_patience_that_is_never_tried_changes_nothing(options, tmp_path):
    """Every evaluation lower than the last: all steps, the last adapter."""
    options = change_train(options, steps=6)
    finetune(dataclasses.replace(options, out=str(tmp_path / "whole")))
    summary = finetune(dataclasses.replace(options, eval_every=2, patience=1))
    assert (summary["steps"], summary["adapter_step"], summary["stopped_early"]) == (6, 6, False)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize("cut", ["step 5", "saved 6", "eval 12", "last eval"])
def test_resume_is_exact_with_early_stopping(overfitting, tmp_path, monkeypatch, cut):
    monkeypatch.setattr(finetune_module.Run, "_draw", lambda self: None)  # a picture takes its time
    whole = dataclasses.replace(overfitting, out=str(tmp_path / "whole"))
    want = finetune(whole)
    kind, _, step = cut.rpartition(" ")
    if kind == "last":
        kind, step = "eval", want["steps"]

    def stop(event):
        if (event["event"], event.get("step")) == (kind, int(step)):
            raise PowerCutError

    with pytest.raises(PowerCutError):
        finetune(overfitting, stop)
    got = finetune(dataclasses.replace(overfitting, resume=True))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    for name in ("steps", "adapter_step", "stopped_early", "before", "after"):
        assert got[name] == want[name]
    assert held_out(tmp_path / "run")[0] == held_out(tmp_path / "whole")[0]


def test_the_best_so_far():
    """A loss that is told twice counts once; an equal one is not better."""
    best = Best()
    seen = []
    for step, loss in ((0, 3.0), (2, 2.0), (2, 2.0), (4, 2.0), (6, 2.5), (8, 1.0)):
        best = best.after(step, loss)
        seen.append((best.step, best.loss, best.waited))
    assert seen == [(0, 3.0, 0), *[(2, 2.0, 0)] * 2, (2, 2.0, 1), (2, 2.0, 2), (8, 1.0, 0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_every": 0}, "patience: found 3 without evaluations"),
        ({"eval_rows": 0}, "patience: found 3 without evaluations"),
        ({"val_fraction": 0.0}, "patience: found 3 without held-out data"),
        ({"patience": -1}, "patience: found -1, expected at least 0"),
    ],
)
def test_patience_without_evaluations_is_refused(overfitting, tmp_path, change, message):
    with pytest.raises(MespRefError, match=message):
        finetune(dataclasses.replace(overfitting, **change))
    assert not (tmp_path / "run").exists()


def test_resume_refuses_another_patience(overfitting):
    finetune(overfitting)
    with pytest.raises(MespRefError, match="--resume: patience: found 5, expected 3"):
        finetune(dataclasses.replace(overfitting, patience=5, resume=True))


# A full disk


def test_a_disk_that_fills_up_at_any_write_loses_nothing(options, tmp_path, monkeypatch):
    """From the n-th file on every write fails, for every n of a run; then there is room again."""
    options = dataclasses.replace(change_train(options, steps=4), save_every=2)
    monkeypatch.setattr(finetune_module.Run, "_draw", lambda self: None)  # a picture takes its time
    whole, saves = dataclasses.replace(options, out=str(tmp_path / "whole")), {}

    def remember(event):
        if event["event"] == "saved":
            saves[event["step"]] = adapter_bytes(tmp_path / "whole")

    finetune(whole, remember)
    run, sync, kept = tmp_path / "run", os.fsync, []
    for first in range(1, 60, 2):
        left = iter(range(first - 1))

        def full(handle, left=left):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(handle)

        monkeypatch.setattr(os, "fsync", full)
        try:
            finetune(options)
            break
        except MespRefError as error:
            line = str(error)
        monkeypatch.setattr(os, "fsync", sync)
        assert "cannot be written: No space left on device" in line
        if not run.exists():  # taken back before the first adapter was there
            assert first <= 14  # manifest, run.json, state, and the adapter as a folder
            assert "kept" not in line
            continue
        kept.append(int(re.search(r"adapter as of step (\d+) is kept in", line)[1]))
        assert line.endswith("repeat the command with --resume to go on")
        assert {p.name for p in run.rglob(".*") if p.is_file()} == {".mesp-ref.json"}
        assert adapter_bytes(run) == saves[kept[-1]]  # what the line says it is
        assert mr.load_adapter(run / "adapter").rank == 8
        finetune(dataclasses.replace(options, resume=True))
        assert adapter_bytes(run) == saves[4]
        shutil.rmtree(run)
    assert kept == sorted(kept)
    assert set(kept) == {0, 2, 4}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(options, tmp_path, small_disk):
    """Somebody fills the disk after the save of step 4."""
    finetune(dataclasses.replace(options, out=str(tmp_path / "whole")))
    options = dataclasses.replace(options, out=str(small_disk / "run"))
    filler = small_disk / "filler"

    def fill(event):
        if (event["event"], event.get("step")) == ("saved", 4):
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1))

    with pytest.raises(MespRefError, match="No space left on device; the adapter as of step 4 is"):
        finetune(options, fill)
    assert mr.load_adapter(small_disk / "run" / "adapter").rank == 8
    filler.unlink()
    finetune(dataclasses.replace(options, resume=True))
    assert adapter_bytes(small_disk / "run") == adapter_bytes(tmp_path / "whole")


def test_a_disk_too_small_for_block_inputs(options, tmp_path, small_disk, monkeypatch):
    """--checkpoints disk with TMPDIR on it: it ends with a line, and nothing is left there."""
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    os.truncate(filler, filler.stat().st_size - (1 << 12))  # room for the first of two
    with pytest.raises(MespRefError, match=r"a checkpoint needs \d+ bytes: No space left") as error:
        finetune(change_train(options, checkpoints="disk", batch_size=3))
    assert "the adapter as of step 0 is kept in" in str(error.value)
    assert [p.name for p in small_disk.iterdir()] == ["filler"]
    assert mr.load_adapter(tmp_path / "run" / "adapter").rank == 8


# Signals, in a process of its own


def command(options, *more):
    train = options.train
    return [
        *(sys.executable, "-m", "mesp_ref", "finetune", "--model", options.model),
        *("--data", options.data, "--out", options.out, "--lr", "0.01", "--seq-len", "24"),
        *("--steps", str(train.steps), "--val-fraction", "0.2", "--save-every", "4"),
        *("--accumulate", "2", "--sample-tokens", "6", *more),
    ]


def wait_for_step(path, step, process):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if path.is_file() and f'"step": {step},' in path.read_text(encoding="utf-8"):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    pytest.fail("the run did not get there")


def test_sigkill_and_ctrl_c_and_resume_end_in_the_same_bytes(options, tmp_path):
    options = change_train(options, steps=300)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}

    def start(options, *more):
        return subprocess.Popen(
            command(options, *more), env=environment, text=True, stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    whole = start(dataclasses.replace(options, out=str(tmp_path / "whole")))
    assert whole.communicate()[1] is not None
    assert whole.returncode == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    killed = start(options)
    wait_for_step(metrics, 30, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    stopped = start(options, "--resume")
    wait_for_step(metrics, 70, stopped)
    stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate()
    assert stopped.returncode == 130
    assert "repeat the command with --resume to go on" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    finished = start(options, "--resume", "--json")
    output, _ = finished.communicate()
    assert finished.returncode == 0
    assert json.loads(output)["steps"] == 300
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
