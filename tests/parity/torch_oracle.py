"""The oracle of this folder: transformers and peft, made to compute in true float64.

transformers keeps float32 islands inside a float64 model: RMSNorm, the RoPE tables, the softmax of
eager attention and its own loss. `true_float64` replaces the first two where the input is float64
(float32 models stay as shipped), attention is torch's scaled_dot_product_attention, and the loss is
torch's cross_entropy on shifted logits.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2

import mesp_ref as mr

Arrays = dict[str, np.ndarray]
TOLERANCE = 1e-10  # of a tensor's largest entry in float64; measured: logits 7e-15, gradients 4e-14


def true_float64(patch: Any) -> None:
    """Give Qwen2's RMSNorm and rotary embedding float64 arithmetic when the model is float64."""
    shipped_norm = modeling_qwen2.Qwen2RMSNorm.forward
    shipped_rope = modeling_qwen2.Qwen2RotaryEmbedding.forward

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float64:
            return shipped_norm(self, x)
        n = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x / n)

    @torch.no_grad()
    def rope(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        if x.dtype != torch.float64:
            return shipped_rope(self, x, position_ids)
        config, theta = self.config, self.config.rope_parameters["rope_theta"]
        size = getattr(config, "head_dim", None)
        size = size or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
        angles = position_ids[..., None].double() / theta**exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    patch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", norm)
    patch.setattr(modeling_qwen2.Qwen2RotaryEmbedding, "forward", rope)


class Batch(NamedTuple):
    """Token ids, labels with some −100, and the mask that marks right padding."""

    ids: np.ndarray  # [N, T]
    labels: np.ndarray  # [N, T]
    mask: np.ndarray  # [N, T]


@dataclass(frozen=True)
class Layout:
    """One way to size a model; every axis length differs from the others where it can."""

    heads: int
    groups: int
    hidden: int
    head_dim: int | None = None  # None: hidden / heads, and no such field in config.json
    inner: int = 22
    layers: int = 2
    vocabulary: int = 101
    tied: bool = True
    fields: dict[str, Any] = field(default_factory=dict)


LAYOUTS = {
    "H=G": Layout(heads=3, groups=3, hidden=18),
    "G=1": Layout(heads=4, groups=1, hidden=24),
    "H=G=1": Layout(heads=1, groups=1, hidden=6),
    "H/G=2": Layout(heads=4, groups=2, hidden=16, layers=3),
    "H/G=3": Layout(heads=6, groups=2, hidden=24),
    "wide heads": Layout(heads=2, groups=1, hidden=14, head_dim=12),
    "narrow heads": Layout(heads=4, groups=2, hidden=40, head_dim=2, inner=34),
    "one layer": Layout(heads=2, groups=1, hidden=8, layers=1, inner=1),
    "Qwen2.5 heads": Layout(heads=14, groups=2, hidden=56),
}


def build(layout: Layout, seed: int = 0) -> Qwen2ForCausalLM:
    """A float32 model in which nothing is trivially 0 or 1: biases, norms and eps all matter."""
    sizes = {} if layout.head_dim is None else {"head_dim": layout.head_dim}
    config = Qwen2Config(
        vocab_size=layout.vocabulary,
        hidden_size=layout.hidden,
        intermediate_size=layout.inner,
        num_hidden_layers=layout.layers,
        num_attention_heads=layout.heads,
        num_key_value_heads=layout.groups,
        rms_norm_eps=3e-3,
        rope_theta=4321.0,
        max_position_embeddings=256,
        tie_word_embeddings=layout.tied,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
        **sizes,
        **layout.fields,
    )
    model = Qwen2ForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            if "norm" in name:
                p.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                p.copy_(0.5 * noise)
            else:
                p.copy_(1.5 * noise * p.shape[1] ** -0.5)
    return model


def load(path: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A checkpoint directory as transformers reads it, of whatever family it is; 16-bit and float32
    weights widen exactly."""
    options = {"attn_implementation": "sdpa"} | options
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval()


def with_adapter(model: Any, adapter: mr.Adapter) -> PeftModel:
    """The model wrapped by peft, holding the matrices of our adapter in the model's dtype."""
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.targets),
        use_rslora=adapter.use_rslora,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).to(model.dtype).eval()
    state = {name: torch.tensor(w, dtype=model.dtype) for name, w in adapter.weights.items()}
    found = set_peft_model_state_dict(wrapped, state)
    assert not found.unexpected_keys
    return wrapped


def logits(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits [N,T,V] as a NumPy array."""
    with torch.no_grad():
        return forward(model, ids, mask).numpy()


def forward(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> torch.Tensor:
    """Logits [N,T,V] with their graph."""
    attention = None if mask is None else torch.tensor(mask)
    return model(input_ids=torch.tensor(ids), attention_mask=attention, use_cache=False).logits


def loss_and_grads(
    model: Any, ids: np.ndarray, labels: np.ndarray, mask: np.ndarray | None = None
) -> tuple[float, Arrays]:
    """Mean cross entropy of shifted labels and the gradient of every parameter.

    Names are those of the files: PEFT's for LoRA matrices, Hugging Face's for base weights.
    """
    for p in model.parameters():
        p.requires_grad_(True)
    z = forward(model, ids, mask)[:, :-1]
    target = torch.tensor(labels)[:, 1:]
    loss = torch.nn.functional.cross_entropy(z.flatten(0, 1), target.flatten(), ignore_index=-100)
    loss.backward()
    grads = {file_name(name): p.grad.numpy() for name, p in model.named_parameters()}
    return loss.item(), grads


def file_name(parameter: str) -> str:
    """Name in a checkpoint or adapter file of a (perhaps peft-wrapped) parameter."""
    if ".lora_" in parameter:
        return parameter.replace(".default", "")
    return parameter.removeprefix("base_model.model.").replace(".base_layer", "")


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float, what: str) -> None:
    """|got − want| ≤ tolerance·max|want|, same shape, nothing non-finite."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert np.isfinite(got).all(), f"{what}: not finite"
    size, error = np.abs(want).max(), np.abs(got - want).max()
    assert size > 0, f"{what}: the oracle is 0 everywhere, so the check would be empty"
    assert error <= tolerance * size, f"{what}: error {error:.2e}, allowed {tolerance * size:.2e}"


def assert_all_close(got: Arrays, want: Arrays, tolerance: float) -> None:
    """The same tensors, each within `tolerance` of its largest entry."""
    assert set(got) == set(want), f"differing names: {sorted(set(got) ^ set(want))[:6]}"
    for name in want:
        assert_close(got[name], want[name], tolerance, name)


def assert_names_its_file(error: mr.MespRefError, folder: Path) -> None:
    """The message is one line that says which file is meant."""
    assert str(folder) in str(error)
    assert "\n" not in str(error)
