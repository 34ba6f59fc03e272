"""Models of the suite in transformers with PEFT: its directories as they are, float64."""

import numpy as np
import pytest
import torch_oracle
from peft import PeftModel
from torch_oracle import TOLERANCE, assert_close

from mesp_ref.golden import Suite


@pytest.mark.parametrize("name", ["tied", "unequal", "qwen3", "llama", "gemma3"])
def test_a_model_and_its_adapter(name: str) -> None:
    suite = Suite()
    case = suite.cases[f"e2e/{name}"]
    vectors = suite.read(case)
    # Gemma's usual padding, token 0, would be a row of the table without a gradient
    base = torch_oracle.load(suite.root / case.attributes["model"], pad_token_id=None)
    adapter = suite.root / case.attributes["adapter"]
    model = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).double().eval()
    batch = (vectors.inputs[n].astype(np.int64) for n in ("input_ids", "labels"))
    loss, grads = torch_oracle.loss_and_grads(model, *batch)
    assert abs(loss - float(vectors.want["loss"])) <= TOLERANCE * loss
    wanted = [t.name for t in case.tensors if t.role in ("result", "base") and t.name != "loss"]
    assert {f"{n}.grad" for n in grads} == set(wanted)
    for tensor in wanted:
        assert_close(grads[tensor.removesuffix(".grad")], vectors.want[tensor], TOLERANCE, tensor)
