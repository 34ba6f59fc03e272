"""What config.json says about MLX affine tensors, and their three parts in the file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.fields import read_fields
from mesp_ref.files.quantized import Quantized
from mesp_ref.files.safetensors import MappedFile
from mesp_ref.files.tables import quantization
from mesp_ref.files.writer import Spec, Writer
from mesp_ref.ops import Array

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Affine:
    """Bits per weight, and how many neighbours in a row share a scale and a bias.

    Raises MespRefError for what the engine does not decode, naming `source` and the field.
    """

    bits: int = 4
    group_size: int = 64
    source: str = field(default="quantization", compare=False)

    def __post_init__(self) -> None:
        for name, allowed in (("bits", BITS), ("group_size", GROUP_SIZES)):
            found = getattr(self, name)
            if type(found) is not int or found not in allowed:
                raise MespRefError(
                    f"{self.source}: {name}: found {shown(found)}, expected one of "
                    f"{', '.join(map(str, allowed))}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json has them."""
        values = asdict(self)
        del values["source"]
        return values | {"mode": "affine"}

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of the three parts of an [out, in] matrix.

        Raises MespRefError when groups do not fill its rows.
        """
        rows, columns = shape
        if columns % self.group_size:
            raise MespRefError(
                f"{self.source}: group_size: found {self.group_size}, expected a divisor of "
                f"{columns}, the length of a row"
            )
        groups = rows, columns // self.group_size
        return {"weight": (rows, columns * self.bits // 32), "scales": groups, "biases": groups}


class Quantization:
    """The `quantization` field of config.json: the default, and layers that differ from it.

    Raises MespRefError for other schemes (GPTQ, AWQ, mxfp4) and for values that are not decoded.
    Source    mlx-lm: {"group_size": 64, "bits": 4, "model.embed_tokens": {…} or false, …}
    """

    def __init__(self, config: Mapping[str, Any], source: str):
        self._source, self._given = source, config.get("quantization")
        other = config.get("quantization_config")
        if isinstance(other, Mapping) and "quant_method" in other:
            found = shown(other["quant_method"])
            raise MespRefError(
                f"{source}: quantization_config: found {found}, expected MLX "
                "affine (field quantization) or dense weights"
            )
        if other is not None and other != self._given:
            raise MespRefError(
                f"{source}: quantization_config: found {shown(other)}, expected what the field "
                f"quantization says, {shown(self._given)}"
            )
        if self._given is not None:
            read_fields({"quantization": self._given}, {"quantization": quantization}, source)

    def of(self, name: str) -> Affine:
        """How a packed tensor such as model.layers.0.mlp.up_proj.weight is stored.

        Raises MespRefError when the field is missing or calls the tensor dense.
        """
        where, given, module = f"{self._source}: quantization", self._given, name[: -len(".weight")]
        if isinstance(given, Mapping) and given.get(module, True) is not True:
            own = given[module]  # what a layer leaves out is MLX's default, not the file's
            usual: dict[str, Any] = {"bits": 4, "group_size": 64}
            where, given = f"{where}: {module}", usual | own if isinstance(own, dict) else own
        if not isinstance(given, Mapping) or given.get("mode", "affine") != "affine":
            found = given.get("mode") if isinstance(given, Mapping) else given
            raise MespRefError(
                f"{where}: found {shown(found)}, expected group_size, bits and mode affine for {name}, "
                "which is packed"
            )
        found = {name: given.get(name) for name in ("bits", "group_size")}
        return Affine(**found, source=where)


def part_names(name: str) -> dict[str, str]:
    """Names of the three parts of an affine tensor: of mlp.up_proj.weight, mlp.up_proj.scales …"""
    return {part: name.removesuffix("weight") + part for part in ("weight", "scales", "biases")}


def is_packed(name: str, held: Mapping[str, MappedFile]) -> bool:
    """Whether a tensor of a checkpoint lies there in affine form, complete or not."""
    if not name.endswith(".weight") or held[name].raw(name).ndim != 2:
        return False
    return part_names(name)["scales"] in held or held[name].raw(name).dtype == np.uint32


def open_quantized(
    name: str, shape: tuple[int, ...], affine: Affine, held: Mapping[str, MappedFile], dtype: Any
) -> Quantized:
    """The table of an affine tensor `name`, whose scales and biases stand beside it.

    Raises MespRefError naming file and part for a part that is missing, or of another type or size
    """
    parts: dict[str, Array] = {}
    for part, want in affine.shapes(shape).items():
        full = part_names(name)[part]
        if full not in held:
            raise MespRefError(f"{held[name].path}: {full}: missing, expected beside {name}")
        raw, where = held[full].raw(full), f"{held[full].path}: {full}"
        if raw.shape != want:
            raise MespRefError(
                f"{where}: shape: found {list(raw.shape)}, expected {list(want)} for "
                f"{affine.bits} bits in groups of {affine.group_size} and {list(shape)} weights"
            )
        allowed = ("uint32",) if part == "weight" else SCALE_DTYPES
        if raw.dtype.name not in allowed:
            raise MespRefError(
                f"{where}: dtype: found {raw.dtype}, expected one of {', '.join(allowed)}"
            )
        parts[part] = raw
    if parts["scales"].dtype != parts["biases"].dtype:
        raise MespRefError(
            f"{held[name].path}: {name}: found scales in {parts['scales'].dtype} and biases in "
            f"{parts['biases'].dtype}, expected one type"
        )
    packed, scales, biases = parts["weight"], parts["scales"], parts["biases"]
    files = {id(held[full]): held[full] for full in part_names(name).values()}.values()

    def guard() -> None:
        for file in files:
            file.check_unchanged()

    return Quantized(packed, scales, biases, affine.bits, np.dtype(dtype), guard)


def layout(
    shapes: Mapping[str, tuple[int, ...]],
    packed: Mapping[str, Affine],
    dense: np.dtype,
    scales: np.dtype,
) -> dict[str, Spec]:
    """Type and shape of everything in a checkpoint whose tensors named in `packed` are affine.

    Scales and biases are stored in `scales`, the other tensors in `dense`.
    """
    specs: dict[str, Spec] = {}
    for name, shape in shapes.items():
        if name not in packed:
            specs[name] = dense, shape
            continue
        for part, size in packed[name].shapes(shape).items():
            specs[part_names(name)[part]] = np.dtype("u4") if part == "weight" else scales, size
    return specs


def put_parts(writer: Writer, name: str, parts: tuple[Array, Array, Array], row: int) -> None:
    """Write packed integers, scales and biases of the rows of a tensor from `row` on."""
    for part, array in zip(part_names(name).values(), parts, strict=True):
        writer.put(part, array, row)
