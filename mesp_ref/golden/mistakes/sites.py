"""A known mistake at one place of a block only: one projection, one norm, the rotation of q or k."""

from typing import Any

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.golden.mistakes import lora, norm, rope
from mesp_ref.golden.plain import Plain

PROJECTIONS = tuple(f"self_attn.{c}_proj" for c in "qkvo") + tuple(
    f"mlp.{c}_proj" for c in ("gate", "up", "down")
)
ROTATIONS = ("self_attn.q_rope", "self_attn.k_rope")


def only(mistake: type[Plain], sites: tuple[str, ...], layer: int | None = None) -> type[Plain]:
    """The mistake where one of the sites is worked on; the right step elsewhere."""

    def step(name: str) -> Any:
        def chosen(self: Plain, *args: Any) -> Any:
            here = self.at in sites and layer in (None, self.number)
            return getattr(mistake if here else Plain, name)(self, *args)

        return chosen

    steps = {
        name
        for kind in mistake.__mro__
        if kind not in (Plain, object)
        for name in vars(kind)
        if callable(getattr(Plain, name, None)) and name[0] != "_"
    }
    where = " and ".join(site.split(".")[-1] for site in sites)
    text = f"{(mistake.__doc__ or '').strip()}, at {where} only"
    made = {name: step(name) for name in steps}
    return type("Only", (mistake,), {"__doc__": text, "__module__": __name__, **made})


def norms_of(config: Qwen2Config) -> tuple[str, ...]:
    """The norms of a block, in order."""
    heads = ("self_attn.q_norm", "self_attn.k_norm") if config.traits.head_norms else ()
    return (*(name for pair in config.traits.norms for name in pair if name), *heads)


def at_one_site(kind: str, config: Qwen2Config) -> list[type[Plain]]:
    """Mistakes of layers, norms and rotations, each at each of its places."""
    turned = [m for m in rope.KNOWN if "__init__" not in vars(m)]
    rows: tuple[type[Plain], ...] = (
        lora.NoFrozenWeight,
        lora.NoLoraPath,
        lora.NoScaleInBackward,
        lora.ScaledTwice,
        lora.UnscaledA,
        lora.NoBranch,
        lora.NoBranchForward,
        *lora.SCALES,
        *lora.BACKWARDS,
        *lora.TRANSPOSED,
        *lora.BASE,
    )
    rows += tuple(lora.of_rows(w, mask, "") for w, mask in lora.ROWS[:6])
    found = [only(m, (site,)) for m in rows for site in PROJECTIONS]
    norms = (*norms_of(config), *(("model.norm",) if kind == "e2e" else ()))
    found += [only(m, (site,)) for m in norm.KNOWN for site in norms]
    return found + [only(m, (site,)) for m in turned for site in ROTATIONS]
