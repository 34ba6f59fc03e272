"""Adapters and merged checkpoints cross to peft and transformers and back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_oracle
from peft import LoraConfig, PeftModel, get_peft_model
from torch_oracle import TOLERANCE, Batch, assert_close, assert_names_its_file

import mesp_ref as mr

ADAPTERS = {
    "all": {"rank": 3, "alpha": 5.0},
    "rslora": {"rank": 3, "alpha": 5.0, "use_rslora": True},
    "q and v": {"rank": 4, "alpha": 4.0, "targets": ["q_proj", "v_proj"]},
    "down alone": {"rank": 1, "alpha": 0.3, "targets": ["down_proj"]},
}


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest, plain: Path) -> mr.Adapter:
    options = ADAPTERS[request.param]
    return mr.init_lora(mr.load_model(plain).config, seed=3, b_std=0.3, **options)


def random_b(wrapped: PeftModel) -> PeftModel:
    """peft starts with B = 0; draw it, so that the adapter does something."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    return wrapped.eval()


def test_written_here_read_by_peft(
    plain: Path, batch: Batch, adapter: mr.Adapter, tmp_path: Path
) -> None:
    mr.save_adapter(adapter, tmp_path)
    base = torch_oracle.load(plain)
    wrapped = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    model = mr.load_model(plain, dtype="float64")
    # float32 matrices widen exactly, so both sides compute with the same numbers
    ours = mr.load_adapter(tmp_path, dtype="float64", config=model.config)
    want = torch_oracle.logits(wrapped.double().eval(), batch.ids)
    assert_close(mr.logits(model, batch.ids, adapter=ours), want, TOLERANCE, "logits")
    for name, w in adapter.weights.items():
        assert np.array_equal(ours.weights[name], w), name


def test_written_here_reads_as_peft_writes(
    plain: Path, adapter: mr.Adapter, tmp_path: Path
) -> None:
    """Read by peft and saved again, the tensors and the fields that matter are as they were."""
    mr.save_adapter(adapter, tmp_path / "ours")
    wrapped = PeftModel.from_pretrained(torch_oracle.load(plain, torch.float32), tmp_path / "ours")
    wrapped.save_pretrained(tmp_path / "theirs")
    files = (tmp_path / who / "adapter_config.json" for who in ("ours", "theirs"))
    ours, theirs = (json.loads(file.read_text()) for file in files)
    assert sorted(ours.pop("target_modules")) == sorted(theirs["target_modules"])
    for field in ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "bias"):
        assert ours[field] == theirs[field], field
    assert set(ours) <= set(theirs), "a field that peft does not know"
    again = mr.load_adapter(tmp_path / "theirs")
    assert set(again.weights) == set(adapter.weights)
    for name, w in adapter.weights.items():
        assert np.array_equal(again.weights[name], w), name


def hold_against_peft(
    plain: Path, batch: Batch, tmp_path: Path, options: dict[str, object], rank: int
) -> None:
    """What peft writes with these options is read here and gives peft's logits."""
    config = LoraConfig(r=rank, lora_alpha=5, task_type="CAUSAL_LM", **options)
    wrapped = random_b(get_peft_model(torch_oracle.load(plain, torch.float32), config))
    wrapped.save_pretrained(tmp_path)
    model = mr.load_model(plain, dtype="float64")
    adapter = mr.load_adapter(tmp_path, dtype="float64", config=model.config)
    want = torch_oracle.logits(wrapped.double(), batch.ids)
    assert_close(mr.logits(model, batch.ids, adapter=adapter), want, TOLERANCE, "logits")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        {"target_modules": "all-linear", "lora_dropout": 0.1},
        {"target_modules": r".*\.mlp\.(gate|down)_proj", "use_rslora": True},
        {"target_modules": ["gate_proj", "up_proj"], "use_rslora": True},
    ],
    ids=str,
)
def test_written_by_peft_read_here(
    plain: Path, batch: Batch, tmp_path: Path, options: dict[str, object]
) -> None:
    hold_against_peft(plain, batch, tmp_path, options, rank=3)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"layers_to_transform": [1]},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"alora_invocation_tokens": [5, 6]},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"use_qalora": True, "qalora_group_size": 2},
        {"init_lora_weights": "pissa"},
        {"exclude_modules": ["v_proj"]},
    ],
    ids=str,
)
def test_what_peft_can_write_is_read_right_or_refused(
    plain: Path, batch: Batch, tmp_path: Path, options: dict[str, object]
) -> None:
    """Never a silently different model: equal logits, or a MespRefError of one line."""
    options = {"target_modules": ["q_proj", "v_proj"]} | options
    try:
        config = LoraConfig(r=4, lora_alpha=5, task_type="CAUSAL_LM", **options)
        wrapped = random_b(get_peft_model(torch_oracle.load(plain, torch.float32), config))
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        pytest.skip(f"peft does not make such an adapter of this model: {error!r:.100}")
    wrapped.save_pretrained(tmp_path)
    model = mr.load_model(plain, dtype="float64")
    try:
        adapter = mr.load_adapter(tmp_path, dtype="float64", config=model.config)
    except mr.MespRefError as error:
        assert_names_its_file(error, tmp_path)
    else:
        want = torch_oracle.logits(wrapped.double(), batch.ids)
        assert_close(mr.logits(model, batch.ids, adapter=adapter), want, TOLERANCE, "logits")


def test_merged_weights_are_rounded_once(plain: Path, adapter: mr.Adapter, tmp_path: Path) -> None:
    """W + s·B·A of the merged float64 model is peft's; in float32 and bfloat16 it is that, rounded.

    Bound: the sum is formed in float64 (error ≪ u) and rounded once, so |err| ≤ u·|W + s·B·A|,
    u = 2^-24, 2^-8; 1e-10 of the largest entry covers the float64 part.
    """
    wide = mr.load_model(plain, dtype="float64")
    merged = torch_oracle.with_adapter(torch_oracle.load(plain), adapter).merge_and_unload()
    want = {name: p.detach().numpy() for name, p in merged.named_parameters()}
    for dtype, u in {"float64": 0.0, "float32": 2.0**-24, "bfloat16": 2.0**-8}.items():
        mr.merge(wide, adapter.astype("float64"), tmp_path / dtype, dtype=dtype)
        got = mr.load_model(tmp_path / dtype, dtype="float64").weights
        assert set(got) == set(want)
        for name, w in want.items():
            error = np.abs(got[name][...] - w) - u * np.abs(w)
            assert np.isfinite(error).all(), name
            assert error.max() <= TOLERANCE * np.abs(w).max(), name


def test_merged_directory_in_transformers(
    plain: Path, batch: Batch, adapter: mr.Adapter, tmp_path: Path
) -> None:
    """The merged directory loads in transformers with the logits of base and adapter together."""
    wide, double = mr.load_model(plain, dtype="float64"), adapter.astype("float64")
    mr.merge(wide, double, tmp_path / "merged", dtype="float64")
    got = torch_oracle.logits(torch_oracle.load(tmp_path / "merged"), batch.ids)
    assert_close(got, mr.logits(wide, batch.ids, adapter=double), TOLERANCE, "logits")


def test_merged_in_the_models_own_dtype(
    plain: Path, batch: Batch, adapter: mr.Adapter, tmp_path: Path
) -> None:
    """float32 all the way: the merged logits err no more than 4 times those of peft's own merge.

    4 as for float32 gradients: the same roundings, summed in another order. Logits without the
    merge's rounding stand for "exact".
    """
    mr.merge(mr.load_model(plain), adapter, tmp_path / "merged")
    exact = torch_oracle.logits(
        torch_oracle.with_adapter(torch_oracle.load(plain), adapter), batch.ids
    )
    base = torch_oracle.load(plain, torch.float32)
    theirs = torch_oracle.with_adapter(base, adapter).merge_and_unload().double()
    allowed = 4 * np.abs(torch_oracle.logits(theirs, batch.ids) - exact).max()
    merged = torch_oracle.load(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.float64}
    assert 0 < np.abs(torch_oracle.logits(merged, batch.ids) - exact).max() <= allowed


# One field each of a right adapter on q_proj and v_proj, changed: a stranger's, a slip's, a future's.
EDITS: list[dict[str, object]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "v_proj", "k_proj"]},
    {"target_modules": ["self_attn.q_proj", "self_attn.v_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": []},
    {"target_modules": "q_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": r".*_proj"},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"model\.layers\.0\..*"},
    {"target_modules": "("},
    {"target_modules": None},
    {"target_modules": 3},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]},
    {"exclude_modules": ["v_proj"]},
    {"exclude_modules": ["k_proj"]},
    {"exclude_modules": r".*layers\.1.*"},
    {"exclude_modules": []},
    {"exclude_modules": "v_proj"},
    {"layers_to_transform": [0]},
    {"layers_to_transform": 1},
    {"layers_to_transform": [0, 1, 2, 3]},
    {"layers_to_transform": [], "layers_pattern": "layers"},
    {"layers_to_transform": [0, 1, 2, 3], "layers_pattern": ["layers"]},
    {"layers_to_transform": [0, 1, 2, 3], "layers_pattern": "blocks"},
    {"layer_replication": [[0, 1], [0, 1]]},
    {"layer_replication": []},
    {"use_dora": "false"},
    {"use_rslora": "false"},
    {"use_rslora": 1},
    {"use_rslora": True},
    {"fan_in_fan_out": "false"},
    {"fan_in_fan_out": 0},
    {"lora_bias": "false"},
    {"init_lora_weights": False},
    {"init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "k_proj"]},
    {"init_lora_weights": "orthogonal", "target_modules": ["q_proj", "v_proj", "k_proj"]},
    {"init_lora_weights": "gaussian", "target_modules": ["q_proj", "v_proj", "k_proj"]},
    {"rank_pattern": {"q_proj": 4}},
    {"alpha_pattern": {"q_proj": 9}},
    {"alpha_pattern": {"k_proj": 9}},
    {"lora_alpha": 7},
    {"lora_alpha": "5"},
    {"r": 4.0},
    {"lora_dropout": 0.5},
    {"inference_mode": False},
    {"megatron_core": None},
    {"runtime_config": {"ephemeral_gpu_offload": False}},
    {"modules_to_save": []},
    {"bias": "lora_only"},
    {"use_qalora": True},
    {"task_type": None},
    {"a_future_field": True},
    {"a_future_field": None},
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_an_edited_adapter_is_read_right_or_refused(
    plain: Path, batch: Batch, tmp_path: Path, edit: dict[str, object]
) -> None:
    """Equal logits, or a MespRefError of one line, whatever peft makes of it."""
    config = LoraConfig(
        r=4, lora_alpha=5, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]
    )
    wrapped = random_b(get_peft_model(torch_oracle.load(plain, torch.float32), config))
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    model = mr.load_model(plain, dtype="float64")
    try:
        adapter = mr.load_adapter(tmp_path, dtype="float64", config=model.config)
    except mr.MespRefError as error:
        assert_names_its_file(error, tmp_path)
        return
    base = torch_oracle.load(plain)
    theirs = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    want = torch_oracle.logits(theirs.double().eval(), batch.ids)
    assert_close(mr.logits(model, batch.ids, adapter=adapter), want, TOLERANCE, "logits")


# What an adapter on some modules only may be, and must not be refused.
READ = [
    {"layers_to_transform": [0]},
    {"layers_to_transform": 1},
    {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"},
    {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    {"exclude_modules": ["v_proj"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "up_proj"]},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
]


@pytest.mark.parametrize("options", READ, ids=str)
def test_an_adapter_of_some_modules_is_read(
    plain: Path, batch: Batch, tmp_path: Path, options: dict[str, object]
) -> None:
    options = {"target_modules": ["q_proj", "v_proj"]} | options
    hold_against_peft(plain, batch, tmp_path, options, rank=4)
