"""Cross entropy, the head, labels and the embedding gone wrong."""

from mesp_ref.verify.bugs.bug import bug, one

BUGS = [
    *one(
        "ops.cross_entropy:softmax_minus_onehot", "backward", "cross_entropy",
        ("loss: one-hot missing", "logits[at_label] -= 1", "pass"),
        ("loss: one-hot added", "logits[at_label] -= 1", "logits[at_label] += 1"),
    ),
    *one(
        "ops.cross_entropy:cross_entropy_bwd", "backward", "cross_entropy",
        ("loss: gradient over all rows", "max(1, len(rows))", "len(res.labels)"),
        ("loss: gradient summed", "dloss / max(1, len(rows))", "dloss"),
        ("loss: ignored rows not zeroed", "np.zeros_like(res.logits)", "res.logits.copy()"),
        ("loss: cotangent forgotten", "rows *= dloss", "rows *= 1"),
    ),
    bug(
        "loss: divided by all tokens", "forward", "cross_entropy",
        ("ops.cross_entropy:cross_entropy", "max(1, len(losses))", "len(labels)"),
        ("ops.cross_entropy:cross_entropy_bwd", "max(1, len(rows))", "len(res.labels)"),
    ),
    *one(
        "ops.lm_loss:lm_loss", "forward", "lm_loss model",
        ("head: token id 0 ignored", "flat != IGNORED",
         "(flat != IGNORED) & (flat != 0)"),
    ),
    *one(
        "ops.lm_loss:loss_of", "forward", "lm_loss model",
        ("head: divided by all tokens", "1 / max(1, len(counted))", "1 / labels.size"),
    ),
    *one(
        "ops.lm_loss:loss_of", "backward", "lm_loss model",
        ("head: gradient not divided", "mix *= mean", "pass"),
        ("head: gradient over all tokens", "mix *= mean", "mix *= 1 / labels.size"),
        ("head: one-hot missing", "mix -= chosen", "pass"),
    ),
    *one(
        "ops._vocabulary_tiles:one_pass", "backward", "tiled_lm_loss",
        ("head: mix of earlier tiles not rescaled", "mix *= rescale[:, None]", "pass"),
    ),
    *one(
        "ops._vocabulary_tiles:one_pass", "forward", "tiled_lm_loss",
        ("head: sum of earlier tiles not rescaled", "total *= rescale", "pass"),
    ),
    *one(
        "ops.lm_loss:lm_loss_bwd", "backward", "lm_loss",
        ("head: cotangent forgotten in dx", "np.multiply(dx, dloss, dtype=dx.dtype)", "dx.copy()"),
    ),
    *one(
        "ops.lm_loss:lm_loss_bwd_params", "backward", "lm_loss",
        ("head: cotangent forgotten in dw", "dw *= dloss /", "dw /="),
        ("head: dw without one-hot", "z[here, labels[here] - a] -= 1", "pass"),
    ),
    *one(
        "engine.model:shift", "forward", "model",
        ("labels: shifted twice", "moved[:, :-1] = labels[:, 1:]", "moved[:, :-2] = labels[:, 2:]"),
        ("labels: not shifted", "moved[:, :-1] = labels[:, 1:]", "moved[...] = labels"),
        ("labels: shifted backwards", "moved[:, :-1] = labels[:, 1:]", "moved[:, 1:] = labels[:, :-1]"),
    ),
    *one(
        "ops.embedding:embedding_bwd_params", "backward", "embedding model",
        ("embedding: scatter overwrites", "np.add.at(dw, res.ids, dy)", "dw[res.ids] = dy"),
        ("embedding: repeated tokens once", "np.add.at(dw, res.ids, dy)", "dw[res.ids] += dy"),
    ),
]  # fmt: skip
