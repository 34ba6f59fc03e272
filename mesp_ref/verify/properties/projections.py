"""Linear layers and LoRA: bilinear forms, the gauge freedom of A and B, the merged weight."""

from collections.abc import Iterator

import numpy as np

from mesp_ref.ops import linear, linear_bwd
from mesp_ref.verify.properties.claim import agree, drawn, exactly, holds
from mesp_ref.verify.result import Finding


@holds("linear")
def linear_is_bilinear(rng: np.random.Generator) -> Iterator[Finding]:
    """Σ x·dx = Σ w·dw = Σ dy·(y − b), and db = Σ dy."""
    spec, args, dy = drawn("linear", rng)
    g, y = spec.vjp(dy, args), spec.forward(**args)[0]
    mag = (np.abs(args["w"]) * spec.magnitudes(dy, args)["w"]).sum()
    value = (dy * (y - args["b"])).sum()
    yield agree("linear", "Σ x·dx", (args["x"] * g["x"]).sum(), value, 2 * mag)
    yield agree("linear", "Σ w·dw", (args["w"] * g["w"]).sum(), value, 2 * mag)
    yield agree("linear", "db", g["b"], dy.sum(axis=(0, 1)), np.abs(dy).sum(axis=(0, 1)))


@holds("linear")
def linear_rows_are_independent(rng: np.random.Generator) -> Iterator[Finding]:
    """dw and db of a batch are the sums of those of its rows; dx is row by row."""
    spec, args, dy = drawn("linear", rng)
    g, mag = spec.vjp(dy, args), spec.magnitudes(dy, args)
    parts = [spec.vjp(dy[i : i + 1], args | {"x": args["x"][i : i + 1]}) for i in range(len(dy))]
    dx = np.concatenate([part["x"] for part in parts])
    yield agree("linear", "dx", g["x"], dx, mag["x"])
    for name in ("w", "b"):
        yield agree("linear", f"d{name}", g[name], sum(part[name] for part in parts), mag[name])


@holds("lora_linear")
def lora_gradients_meet(rng: np.random.Generator) -> Iterator[Finding]:
    """Bᵀ·dB = dA·Aᵀ ([R, R]): both are s·Bᵀ·dyᵀ·x·Aᵀ."""
    spec, args, dy = drawn("lora_linear", rng)
    g, mag = spec.vjp(dy, args), spec.magnitudes(dy, args)
    size = np.abs(args["B"]).T @ mag["B"]
    yield agree("lora_linear", "Bᵀ·dB", args["B"].T @ g["B"], g["A"] @ args["A"].T, 2 * size)


@holds("lora_linear")
def lora_gradients_from_the_base(rng: np.random.Generator) -> Iterator[Finding]:
    """dA = s·Bᵀ·dW and dB = s·dW·Aᵀ: the adapter is a change of W by s·B·A."""
    spec, args, dy = drawn("lora_linear", rng)
    g, mag, s = spec.vjp(dy, args), spec.magnitudes(dy, args), args["s"]
    yield agree("lora_linear", "dA", g["A"], s * args["B"].T @ g["w"], 2 * mag["A"])
    yield agree("lora_linear", "dB", g["B"], s * g["w"] @ args["A"].T, 2 * mag["B"])


@holds("lora_linear")
def lora_gauge(rng: np.random.Generator) -> Iterator[Finding]:
    """(M·A, B·M⁻¹) is the same layer: y and dx stay, dA turns into M⁻ᵀ·dA, dB into dB·Mᵀ."""
    spec, args, dy = drawn("lora_linear", rng)
    M, _ = np.linalg.qr(rng.standard_normal((len(args["A"]),) * 2))  # M⁻¹ = Mᵀ
    turned = args | {"A": M @ args["A"], "B": args["B"] @ M.T}
    y, y_turned = (spec.forward(**a)[0] for a in (args, turned))
    g, g_turned = (spec.vjp(dy, a) for a in (args, turned))
    mag = spec.magnitudes(dy, turned)
    yield agree("lora_linear", "y", y_turned, y, 8 * np.abs(y).max())
    yield agree("lora_linear", "dx", g_turned["x"], g["x"], 2 * mag["x"])
    yield agree("lora_linear", "dA", g_turned["A"], M @ g["A"], 4 * mag["A"].max())
    yield agree("lora_linear", "dB", g_turned["B"], g["B"] @ M.T, 4 * mag["B"].max())


@holds("lora_linear")
def lora_at_zero(rng: np.random.Generator) -> Iterator[Finding]:
    """B = 0 gives dA exactly 0 and the base layer's y and dx to the bit."""
    spec, args, dy = drawn("lora_linear", rng)
    args["B"] = np.zeros_like(args["B"])
    base = {name: args[name] for name in ("x", "w", "b")}
    y, res = linear(**base)
    g = spec.vjp(dy, args)
    yield exactly("lora_linear", "y", spec.forward(**args)[0], y)
    yield exactly("lora_linear", "dx", g["x"], linear_bwd(dy, res, args["w"], args["b"]))
    yield exactly("lora_linear", "dA", g["A"], 0.0)
    yield exactly("lora_linear", "dB is alive", np.any(g["B"]), True)


@holds("lora_linear")
def lora_merged(rng: np.random.Generator) -> Iterator[Finding]:
    """The layer with weight W + s·B·A has the same y, dx, dW and db."""
    spec, args, dy = drawn("lora_linear", rng)
    merged = args["w"] + args["s"] * args["B"] @ args["A"]
    y, res = linear(args["x"], merged, args["b"])
    g, mag = spec.vjp(dy, args), spec.magnitudes(dy, args)
    size = (
        np.abs(args["x"])
        @ (np.abs(args["w"]) + args["s"] * np.abs(args["B"]) @ np.abs(args["A"])).T
    )
    yield agree("lora_linear", "y", spec.forward(**args)[0], y, size + np.abs(args["b"]))
    yield agree("lora_linear", "dx", g["x"], linear_bwd(dy, res, merged, args["b"]), mag["x"])
    rows = dy.reshape(-1, dy.shape[-1])
    dw = rows.T @ args["x"].reshape(len(rows), -1)
    yield agree("lora_linear", "dW", g["w"], dw, mag["w"])
    yield agree("lora_linear", "db", g["b"], rows.sum(axis=0), mag["b"])


@holds("tiled_mlp")
def mlp_reparametrised(rng: np.random.Generator) -> Iterator[Finding]:
    """up scaled by a and down by 1/a is the same function: Wu·dWu + Bu·dBu = Wd·dWd + Ad·dAd."""
    spec, args, dy = drawn("tiled_mlp", rng)
    g, mag = spec.vjp(dy, args), spec.magnitudes(dy, args)
    left = sum((args[k] * g[k]).sum() for k in ("wu", "Bu"))
    right = sum((args[k] * g[k]).sum() for k in ("wd", "Ad"))
    size = sum((np.abs(args[k]) * mag[k]).sum() for k in ("wu", "Bu", "wd", "Ad"))
    yield agree("tiled_mlp", "up and down", left, right, size)
    for letter in "gud":
        A, B = f"A{letter}", f"B{letter}"
        both = args[B].T @ g[B]
        size = np.abs(args[B]).T @ mag[B]
        yield agree("tiled_mlp", f"Bᵀ·dB = dA·Aᵀ of {letter}", both, g[A] @ args[A].T, 2 * size)
