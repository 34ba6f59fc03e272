"""Mutants that no check of a gradient can reject, each with the reason why it computes the same."""

import re
from collections.abc import Iterator
from typing import NamedTuple


class Equivalent(NamedTuple):
    """Mutants that compute the same: of which function, what was changed, and why that is nothing."""

    path: str  # patterns, which must match as a whole
    change: str
    reason: str


_REBUILT = "computes again what was kept: the same value, only slower"
_KEPT = "keeps what nobody asks for: only memory"
_WIDTH = "another width of tiles: the same sums in another order"
_SCRATCH = "scratch larger than its tiles: what is used of it is the same"
_CUTS = "other cuts of the same rows or columns: the same sums in another order"
_ROWS_OR_NOT = "rows for columns, or columns for rows, of workers: the same sums in another order"
_PLACE = "other threads do the same work, and results come in the order of the items"
_NAMES = "all parts have gradients of the same names and dtype: which one is asked is all one"
_CHUNKS = "other chunks of the same rows: the same sums in another order"
_ROOM = "how much room is asked for before the step; what is written is the same"
_LAST = "a matrix has two axes: its last is its second"

EQUIVALENTS = tuple(
    Equivalent(*row) for row in (
        # Residuals
        (r".*_bwd(_params)?", r".* if res\.\w+ is None else .* -> .* if True else .*", _REBUILT),
        (r"engine\.half:project_bwd", r"h\.pop.* if h else None -> .* if False .*", _REBUILT),
        (r"engine\.half:project", r".* and .* -> .* or .* in: if h is not None and .*",
         "lora_linear drops r.h exactly where there is no h: both are None or neither is"),
        (r"engine\.half:project", r"_H if h is None else NOTHING -> _H if False .*", _KEPT),
        (r"lean\.mlp:mlp", r"kept\.append.* -> None in: .*", _REBUILT),
        (r"lean\.mlp:mlp", r"kept if keep else None -> kept if False else None in: .*", _REBUILT),
        (r"lean\.mlp:mlp", r"kept if keep else None -> kept if True else None in: .*",
         "an empty list for None: nothing was kept"),
        (r"lean\.halves_tiled:attention_half", r".* (and|if keep) .* -> .*", _REBUILT),
        (r"lean\.halves_tiled:attention_half", r"raw is not None -> raw is None in: .*", _REBUILT),
        (r"lean\.halves_tiled:attention_half_bwd", r"kept\.attention if .* -> .* if False .*",
         _REBUILT),
        (r"engine\.attention_half:attention_half", r"None if 'q' in drop .* -> None if False .*", _KEPT),
        (r"engine\.attention_half:qkv_bwd", r"raw and letter in raw -> raw or letter in raw in: .*",
         "q and k are taken out before v comes: then it is empty"),
        (r"lean\.mesp_tiled:mesp_tiled", r"_BUT_Y if stack\.halves .* -> _BUT_Y if True .*", _KEPT),
        (r"ops\.rope:rope_tables", r"np\.clip\(.*, 0, 1\) -> np\.clip\(0, .*, 1\) in: .*",
         "0 held between x and 1 is x held between 0 and 1"),
        (r"ops\.rope:rope_tables", r"0 if original is None .* -> 1 if original is None .*",
         "a turn or none: as few as low, so the whole factor holds"),
        (r"engine\.positions:layers", r"positions is not None -> positions is None in: .*",
         "scores know differences of positions alone, and documents do not see each other"),
        (r"lean\._mlp_tiles:gelu", r"np\.minimum\(a, 0, .* -> np\.minimum\(a, 1, .*",
         "any bound cancels in the quotient: it keeps exp from overflow"),
        (r"lean\.shards:mlp_cuts", r"parts \* _GROUP -> 1 \* _GROUP in: .*", _CUTS),
        (r"lean\.pread:write_at",
         r"(if hasattr\(os, 'pwrite'\) -> if not .*|os\.(lseek|write)\(handle, .* -> .*)",
         "the way of systems without pwrite, which tests/test_without_posix.py takes"),
        # Tiles
        (r"lean\.attention:attention(_bwd)?",
         r"(query_tile\(.*|[qk]\.shape\[\d\]) -> .* in: tile = tile or .*", _WIDTH),
        (r"lean\.attention:_scratch",
         r"(.* -> k\.shape\[1\] if (True|False) .*|first is None -> .*) in: keys = .*", _SCRATCH),
        (r"lean\.widths:mlp_width", r".* -> .*(257,|641 if|else 385).*",
         "rounded down to whole groups: the same width"),
        (r"ops\._tiles:fit", r"max\(1, length\) -> max\(2, length\) in: .*",
         "columns of one or two elements never fill the scratch: the range decides"),
        (r"ops\._vocabulary_tiles:one_pass", r"stop - start -> stop (\+ start|- 0) in: logits = .*",
         _SCRATCH),
        (r"ops\._vocabulary_tiles:one_pass",
         r"(\(2, 0, 0\) -> \(2, (0, 1|1, 0)\)|.* if True .*) in: mix, product = .*", _KEPT),
        (r"lean\._mlp_tiles:backward_tiles", r"2 \* size -> 3 \* size in: spare = .*",
         _SCRATCH),
        (r"lean\.tiled_weight:TiledWeight\.__getitem__", r".*",
         "of a projection nothing but its whole is asked for; rows of a table are, of a tiled model"),
        (r"lean\.tiled_weight:in_tiles", r".*",
         "weights of a sample are below LARGEST, and one that is a single tile is multiplied as it is"),
        # Chunks
        (r"lean\.streamed_attention:streamed_attention", r"0 -> 1 in: mixed.*",
         "multiplied by exp(−∞) = 0 before the first piece of keys is added"),
        (r"lean\.streamed_attention:_sizes", r"query_tile\(.*in: tile = tile or .*", _WIDTH),
        (r"lean\.streamed_attention:_sizes",
         r"(min\(keys.*|k\.shape\[1\] - q.* -> k\.shape\[1\] (\+ q.*|- 0)) in: most = .*", _SCRATCH),
        (r"lean\.streamed_attention:(_queries|streamed_attention_bwd)", r"0 if .* -> 0 if True .*",
         "keys that are hidden from all are looked at, too: their probabilities are 0"),
        (r"lean\.streamed_attention:streamed_attention_bwd",
         r"(\(2, stacked.* -> \(3, stacked.*|k\.shape\[2\] -> k\.shape\[3\] in: room = .*)", _SCRATCH),
        (r"lean\.streamed_attention:_scores", r"-1 -> \+1 in: s \*= .*", _LAST),
        (r"lean\.chunks:chunk_rows", r".*", _CHUNKS),
        (r"lean\.steps:new_step", r".* in: rows = min.*", _CHUNKS),
        (r"lean\.(chunks:file_size|activations:(DiskCheckpoints\.need|check_room))",
         r"(?!check_room\(.* -> check_room\(self|size > free -> size <= free).*", _ROOM),
        (r"lean\.chunks:_layer", r"np\.diff.* != 1 -> .* != 2 in: runs = .*",
         "positions in more runs than there are: the same angles"),
        (r"lean\.chunks:_targets", r"tokens\.stop - .* -> tokens\.stop (\+ .*|- 0) in: moved = .*",
         "a chunk that does not begin at 0 is of one sequence: behind its end nothing counts"),
        (r"lean\.mesp_streamed:_chunk_bwd", r"inside\[0\] -> inside\[1\] in: .*",
         "neither half leaves an array behind, and both as many empty places as there are workers"),
        (r"lean\.mesp_streamed:mesp_streamed", r"stream\.stack\.need.* -> None in: .*", _ROOM),
        (r"lean\.steps:new_step", r"(?!layers\(model, .* -> layers\(adapter).* in: blocks = layers.*",
         "each chunk has angles of its own: these are not read"),
        # Parts and workers
        (r"lean\.shards:ranges", r"round\(.*\) \* unit -> round\(.*\) \* 1 in: .*", _CUTS),
        (r"lean\.shards:mlp_cuts", r".* -> _GROUP if False else 1 in: unit = .*", _CUTS),
        (r"lean\.shards:share_rows", r".*", _ROWS_OR_NOT),
        (r"lean\.shards:shared_lm_loss", r".*share_rows.* -> .*", _ROWS_OR_NOT),
        (r"lean\.shards:shared_lm_loss", r"vocabulary_tile.* -> .*", _WIDTH),
        (r"lean\.shards:shared_lm_loss", r".* -> (max\(.*|w\.shape\[1\]) in: x_counted, parts = .*",
         _CUTS),
        (r"lean\.shards:shared", r".* in: if workers\.size == 1:",
         "one worker with all of it, or several who share it: the same sums in another order"),
        (r"lean\.shards:shared", r"Summands if rows else total -> .*",
         "parts added to the input in their turn, or their sum: the same sums in another order"),
        (r"lean\.shards:_by_cuts", r"gather is Summands and .* -> gather is Summands or .*",
         "parts added to the input in their turn, or their sum: the same sums in another order"),
        (r"lean\.shards:_by_rows_bwd", r"grads\[0\] -> grads\[1\] in: .*", _NAMES),
        (r"lean\.shards:_loss_by_rows", r"found\[0\] -> found\[1\] in: .*", _NAMES),
        (r"lean\.shards:_loss_by_rows", r".* and .* -> .* or .* in: if dx is not None.*",
         "all parts of the rows drop dx, or none does"),
        (r"lean\.workers:hire", r"(count - 1 -> count (\+ 1|- 0)|wait\(futures\) -> None) in: .*",
         _PLACE),
        (r"lean\.activations:DiskCheckpoints\._reserve", r".*, 0\) -> .*, 1\) in: start, offset = .*",
         "each array one byte further in the file: only slower to read"),
        (r"lean\.steps:new_step",
         r"(stack\.keep if .*if False .*|stack is not None -> .*) in: keep = .*", _REBUILT),
        (r"lean\.steps:new_step", r"ops\.lm_loss if .* -> ops\.lm_loss if True .* in: lm_loss = .*",
         "the head shared by workers, or one's alone: the same sums in another order"),
        (r"lean\.steps:new_step", r"mlp_width\(.*\) -> .* in: halves = .*", _WIDTH),
        (r"lean\.steps:new_step", r"PLAIN if .* -> PLAIN if True .* in: halves = .*",
         "documents kept apart by a mask, or by tiles that are not formed: the same scores"),
        (r"lean\.steps:_number",
         r"('\.layers\.' in name|-1 if name.*|name == EMBEDDING|-1) -> .* in: .*",
         "the number under which a part of mezo's estimate is handed over: the estimate is the same"),
        (r"lean\.workers:_(OneThread\..*|take_control)",
         r"(self\._inside [+-]= 1|1|_take_control\(\)|limits=1|getattr\(.*|clear.*|self\._give_back\(\)"
         r"|self\._limit is not None|self\._limit\.restore.*) -> .*",
         "how many threads BLAS may use meanwhile and afterwards: the same sums"),
        # Numbers
        (r"engine\.half:copied", r".* -> .* if False else res in: .*",
         "the residuals of parts die sooner: only memory"),
        (r"ops\.rope:rope_tables", r"np\.empty\(0.* -> np\.empty\(1.* in: real = .*",
         "only its dtype is asked for"),
        (r"ops\.rmsnorm:_inverse_rms_of_far", r".* -> (3\.0 \*\* .*|.* // 9) in: unit = .*",
         "another unit, in which the squares of such rows are finite, too: it cancels"),
        (r"ops\.rmsnorm:_inverse_rms_of_far", r"-1 -> \+1 in: return .*", _LAST),
        (r"lean\.attention:_scores", r"-1 -> \+1 in: s \*= .*", _LAST),
        (r"lean\._mlp_tiles:silu", r"np\.minimum\(x, 0.* -> np\.minimum\(x, 1.*",
         "both exponents larger by one at most: their quotient is the same, and nothing overflows"),
        (r"engine\.layer:Layer\.scale", r".* else 1\.0 -> .* else 2\.0 in: .*",
         "without an adapter nothing is scaled"),
        (r"engine\.attention_half:attention_half", r".*past\.extend.* -> .*",
         "a cache of keys is for generation: no gradient passes through it"),
        (r"engine\.mezo:perturbation_seeds", r"return .* -> .*", "a mean does not know an order"),
        (r"engine\.mezo:_add_noise", r".* -> w -= .*", "−z for z: the estimate is even in its noise"),
    )
)  # fmt: skip


def reasons(path: str, change: str) -> Iterator[Equivalent]:
    """The rows that speak of a mutant."""
    for row in EQUIVALENTS:
        if re.fullmatch(row.path, path) and re.fullmatch(row.change, change, re.DOTALL):
            yield row
