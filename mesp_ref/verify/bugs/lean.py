"""Tiles, parts, workers and offloaded residuals gone wrong: what stands around the engine."""

from mesp_ref.verify.bugs.bug import one

_KEPT = "gate = keep(z) if keep else z"
_SILU = "activation(z, up, view(spare, *z.shape))"

BUGS = [
    *one(
        "lean.attention:attention_bwd", "backward", "tiled_attention",
        ("tiles: dk of the last query tile only", "dk[t.keys] += ds.T", "dk[t.keys] = ds.T"),
        ("tiles: dv of the last query tile only", "dv[t.keys] += p.T", "dv[t.keys] = p.T"),
        ("tiles: Σ do·o of one head for all", "dot, ot)[:, None]", "dot, ot).mean()"),
    ),
    *one(
        "lean.attention:_tiles", "forward", "tiled_attention tiles/several",
        ("tiles: keys of a cache hidden", "hidden = b + tk - tq", "hidden = b"),
    ),
    *one(
        "lean.mlp:mlp_bwd", "backward", "tiled_mlp",
        ("tiles: dx of the last tile only", "dx += np.matmul(t.dgate, t.wg, out=t.spare)",
         "dx = np.matmul(t.dgate, t.wg)"),
        ("tiles: dBd from the last tile's z", "hd += t.z", "hd = t.z"),
        ("tiles: dAg from the last tile's gate", "dhg += t.dgate", "dhg = t.dgate"),
        ("tiles: columns of Bu from the tile's beginning", "dhu += t.dup @ Bu[at]",
         "dhu += t.dup @ Bu[: t.b - t.a]"),
    ),
    *one(
        "lean._mlp_tiles:backward_tiles", "backward", "tiled_mlp",
        ("tiles: down's adapter left out of dz",
         "product(dy, wd[:, a:b], dhd, Ad[:, a:b], dz, other)", "np.matmul(dy, wd[:, a:b], out=dz)"),
    ),
    *one(
        "lean.tiled_weight:TiledWeight.__rmatmul__", "backward", "tiled_lora_linear",
        ("tiles: the first tile of a weight for all", "self._tile(a, b)", "self._tile(0, b - a)"),
    ),
    *one(
        "lean.mlp:mlp", "method", "mesp_tiled/offload",
        ("offload: gate kept after its silu", f"{_KEPT}\n        {_SILU}",
         f"{_SILU}\n        {_KEPT}"),
    ),
    *one(
        "lean.activations:DiskCheckpoints.keep", "method", "mesp_tiled/offload",
        ("offload: scratch kept instead of a copy", "return np.ndarray(x.shape, x.dtype, room, offset)",
         "return x"),
    ),
    *one(
        "lean.activations:DiskCheckpoints._reserve", "method", "mesp_tiled/disk",
        ("disk: written over the one before", "self._used = offset + size", "self._used = offset"),
    ),
    *one(
        "lean.mesp_tiled:mesp_tiled", "method", "mesp_tiled mesp_tiled/offload",
        ("halves: MLP from the block's input",
         "mlp.x, again = sublayer(x, layer, ATTENTION_NORM, halves.attention, drop=_BUT_Y)",
         "again = SublayerRes()"),
        ("halves: residuals of the wrong block", "kept.pop()", "kept.pop(0)"),
    ),
    *one(
        "lean.mesp_tiled:mesp_tiled", "method", "mesp_tiled/disk",
        ("halves: attention from the MLP's input", "= stack.pop() if stack.halves else x", "= x"),
    ),
    *one(
        "lean.streamed_attention:streamed_attention_bwd", "backward", "streamed_attention",
        ("chunks: dq of the last piece of keys only",
         "found if a >= before else np.add(dq[t.at], found, out=found)", "found"),
    ),
    *one(
        "lean.streamed_attention:streamed_attention_bwd", "backward", "streamed_attention_in_chunks",
        ("chunks: dk and dv of later chunks forgotten", "= dk[i, a:b], dv[i, a:b]", "= 0, 0"),
    ),
    *one(
        "lean.streamed_attention:streamed_attention", "forward", "streamed_attention",
        ("chunks: mix not rescaled", "mixed *= rescale", "pass"),
        ("chunks: running sum not rescaled", "total *= rescale", "pass"),
    ),
    *one(
        "lean.mesp_streamed:add", "method", "mesp_streamed/chunks",
        ("chunks: gradients of the first only", "sums[name] += found[name]", "sums[name] = found[name]"),
    ),
    *one(
        "lean.mesp_streamed:_head_and_loss", "method", "mesp_streamed/chunks",
        ("chunks: mean of the chunks' means", "_counted(stream, at) / max(1, counted)",
         "1 / len(stream.chunks)"),
    ),
    *one(
        "lean.chunks:_layer", "method", "mesp_streamed/chunks",
        ("chunks: angles from position 0 on", "angles(model, kind, tokens.start, tokens.stop)",
         "angles(model, kind, 0, tokens.stop - tokens.start)"),
    ),
    *one(
        "lean.shards:total", "method", "mesp/two_workers",
        ("parts: the first summed twice", "for other in others", "for other in [+first, *others]"),
    ),
    *one(
        "lean.shards:_by_cuts_bwd", "backward", "mesp/two_workers",
        ("parts: gradient of n from the first only", "total([dn for dn, _ in found])", "found[0][0]"),
        ("parts: a gradient of n summed twice", "total([dn for dn, _ in found])",
         "total([+found[0][0], *(dn for dn, _ in found)])"),
    ),
    *one(
        "lean.shards:_joined", "backward", "mesp/two_workers",
        ("parts: shared LoRA matrix of the first only", "return total(arrays)", "return arrays[0]"),
        ("parts: shared LoRA matrix averaged", "return total(arrays)",
         "return total(arrays) / len(arrays)"),
        ("parts: shared LoRA matrix side by side", "return total(arrays)",
         "return np.concatenate(arrays, axis=axis)"),
        ("parts: readers joined by rows", "int(any(reader in name for reader in READERS))", "0"),
        ("parts: joined in reverse order", "np.concatenate(arrays,", "np.concatenate(arrays[::-1],"),
    ),
    *one(
        "lean.shards:_by_rows_bwd", "backward", "rows/mesp_tiled",
        ("rows: parameters from the first only", "total([g[k] for g in grads])", "grads[0][k]"),
        ("rows: parameters averaged", "total([g[k] for g in grads])",
         "total([g[k] for g in grads]) / len(grads)"),
    ),
    *one(
        "lean.shards:_loss_by_rows", "backward", "rows/mesp",
        ("rows: dx of a part not weighted", "np.multiply(res.dx, weight,", "np.multiply(res.dx, 1,"),
    ),
    *one(
        "lean.shards:_loss_by_rows", "method", "rows/mesp",
        ("rows: mean of the parts' means", "(b - a) / len(counted)", "1 / len(cuts)"),
    ),
    *one(
        "lean.shards:joined", "backward", "mesp/two_workers",
        ("head parts: the other's mix not rescaled",
         "np.multiply(other.mix, theirs[:, None], out=other.mix)", "other.mix"),
        ("head parts: our mix not rescaled", "mix *= ours[:, None]", "pass"),
    ),
    *one(
        "lean.shards:joined", "forward", "mesp/two_workers",
        ("head parts: the other's sum not rescaled", "theirs * other.total", "other.total"),
        ("head parts: label's logit of the first only", "z_label += other.z_label", "pass"),
    ),
    *one(
        "lean.shards:part_adapter", "method", "mesp/two_workers",
        ("parts: LoRA scale by the part's share", "Adapter(adapter.rank, adapter.alpha,",
         "Adapter(adapter.rank, adapter.alpha / 2,"),
    ),
]  # fmt: skip
