"""Masks, softmax, attention and shared heads gone wrong."""

from mesp_ref.verify.bugs.bug import bug, one

BUGS = [
    *one(
        "ops.softmax:causal_mask", "forward", "causal_softmax attention model",
        ("mask: one key too many", "k=tk - tq", "k=tk - tq + 1"),
        ("mask: blind to its own token", "k=tk - tq", "k=tk - tq - 1"),
    ),
    *one(
        "ops.softmax:causal_mask", "forward", "causal_softmax attention",
        ("mask: aligned top left", "k=tk - tq", "k=0"),
    ),
    *one(
        "ops.softmax:causal_softmax", "forward", "causal_softmax attention model",
        ("softmax: over queries", "p.sum(axis=-1", "p.sum(axis=-2"),
        ("softmax: no mask", "s.dtype.type(-np.inf)", "s"),
        ("softmax: masked with 0 for −∞", "s.dtype.type(-np.inf)", "s.dtype.type(0)"),
    ),
    *one(
        "ops.softmax:causal_softmax_bwd", "backward", "causal_softmax attention model",
        ("softmax: row sum missing", '- np.einsum("...k,...k->...", dp, res.p)[..., None]', "+ 0"),
        ("softmax: row sum of dp alone", '"...k,...k->...", dp, res.p)', '"...k->...", dp)'),
        ("softmax: sum over queries", '"...k,...k->...", dp, res.p)[..., None]',
         '"...ik,...ik->...k", dp, res.p)[..., None, :]'),
        ("softmax: p missing", "ds *= res.p", "pass"),
        ("softmax: p twice", "ds *= res.p", "ds *= res.p**2"),
    ),
    *one(
        "ops.attention:attention", "forward", "attention model",
        ("attention: scores not scaled", "scores *= scale or d**-0.5", "pass"),
        ("attention: scores over D", "d**-0.5", "d**-1.0"),
    ),
    *one(
        "ops.attention:attention_bwd", "backward", "attention model",
        ("attention: ds not scaled", "ds *= scale or d**-0.5", "pass"),
        ("attention: scale twice", "ds *= scale or d**-0.5", "ds *= d**-1.0"),
        ("attention: dk not scaled", "dk = ds.", "dk = d**0.5 * ds."),
        ("attention: dk and dv exchanged", "dk.swapaxes(1, 2), dv.swapaxes(1, 2)",
         "dv.swapaxes(1, 2), dk.swapaxes(1, 2)"),
        ("attention: dq from v", "ds @ k.transpose", "ds @ v.transpose"),
        ("attention: dv from ds", "dv = p.reshape(stacked)",
         "dv = causal_softmax_bwd((do @ v.transpose(0, 2, 3, 1)).reshape(p.shape), "
         "CausalSoftmaxRes(p)).reshape(stacked)"),
        ("gqa: mean for sum", "return dq, dk.swapaxes(1, 2), dv.swapaxes(1, 2)",
         "return dq, *(x.swapaxes(1, 2) / (heads // groups) for x in (dk, dv))"),
        ("gqa: first head only", "dk = ds.swapaxes(2, 3) @ _stack_group(q, groups)",
         "t = do.shape[2] * groups // heads; "
         "dk = ds[:, :, :t].swapaxes(2, 3) @ _stack_group(q, groups)[:, :, :t]"),
    ),
    bug(
        "gqa: heads in tile order", "forward", "attention model",
        ("ops.attention:_stack_group",
         "groups, heads // groups, d).transpose(0, 2, 3, 1, 4)",
         "heads // groups, groups, d).transpose(0, 3, 2, 1, 4)"),
        ("ops.attention:_unstack_group",
         "groups, heads // groups, -1, d).transpose(0, 3, 1, 2, 4)",
         "groups, heads // groups, -1, d).transpose(0, 3, 2, 1, 4)"),
    ),
]  # fmt: skip
