"""How wide the tiles of the MLP and of attention are."""

from mesp_ref.ops._tiles import GROUP, fit


def mlp_width(rows: int, workers: int = 1) -> int:
    """Columns of the MLP at once: GEMMs get slow below 250 and no faster above 600.

    Workers that share the columns make do with 384 each: below that they hand the GIL over too often.
    """
    return fit(rows, 256, 640 if workers == 1 else 384) // GROUP * GROUP


def query_tile(share: int, keys: int) -> int:
    """Queries at once, whose scores stand in `share` rows each of up to `keys` columns."""
    return fit(share * keys, 16, 64)
