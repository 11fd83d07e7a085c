"""A target: one class of hardware, what runs a model there, the types it wants and the limits it sets."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from edgedistill.errors import UsageError
from edgedistill.kv_cache import F16, KvType, Pair
from edgedistill.toml_source import did_you_mean, key_error, load_toml

if TYPE_CHECKING:
    from edgedistill.devices.host import HostFingerprint

# Instruction sets that decide which kernels of llama.cpp and ONNX Runtime run, by architecture, in our own words;
# `devices.host` maps what Linux and macOS call them to these.
FEATURES: dict[str, tuple[str, ...]] = {
    "x86_64": (
        "sse4.2", "avx", "f16c", "fma", "avx2", "avx_vnni",
        "avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_int8",
    ),
    "aarch64": ("neon", "fp16", "dotprod", "i8mm", "bf16", "sve", "sve2", "sme"),
}  # fmt: skip
# Their kernels are so much faster that a machine which has them proves nothing of one without.
FASTER = {"x86_64": ("avx512", "amx_int8"), "aarch64": ("i8mm", "sve", "sme")}
ENGINES = {"gguf": "llama.cpp", "onnx": "onnxruntime-genai"}
# What [quantize] may say of each type of ONNX, beside it; fp16 builds on a CPU and then fails at run time.
ONNX_TYPES: dict[str, tuple[str, ...]] = {
    "fp32": (), "int8": ("block", "accuracy"), "int4": ("block", "symmetric", "accuracy", "rounding"),
    "mixed": ("block", "accuracy"), "auto": ("size", "accuracy"),
}  # fmt: skip
_ONNX_KEYS = ("size", "rounding", "block", "symmetric", "accuracy")
_ONNX_ALONE = ("block", "symmetric", "accuracy")  # and not of GGUF

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(value: str | int) -> int:
    """Return the bytes that ``"600 MiB"``, ``"1.2 GiB"``, ``"90 MB"`` or a plain number of bytes stand for."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f'expected a size such as "600 MiB"; found {value}')
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if not found or found.group(2).upper() not in _UNITS:
        raise ValueError(f'expected a size such as "600 MiB" or "1.2 GiB"; found "{value}"')
    size = round(float(found.group(1)) * _UNITS[found.group(2).upper()])
    if size <= 0:
        raise ValueError(f'expected a size above zero; found "{value}"')
    return size


def format_size(size: int | float) -> str:
    """Write bytes as people read them, in binary units: ``600 MiB``, ``1.2 GiB``, ``512 B``."""
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= step:
            return f"{size / step:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size:.0f} B"


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"type": ["string", "integer"], "examples": ["600 MiB", "1.2 GiB"]}),
]


AUTO = "auto"
"""The type of a file whose matrices each have the type that costs least (``formats.gguf.allocate``)."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class KvCache(_Table):
    """The types of the KV cache, where keys and values have different ones."""

    k: KvType = Field(default="f16", description="of the keys, llama.cpp's -ctk")
    v: KvType = Field(default="f16", description="of the values, llama.cpp's -ctv")


class Runtime(_Table):
    """What runs the model on the target."""

    format: Literal["gguf", "onnx"]
    engine: Literal["llama.cpp", "onnxruntime-genai"]
    threads: int = Field(ge=1, le=1024, description="threads that decode and prefill run on")
    context: int = Field(ge=128, le=1_048_576, description="tokens of context that memory is provided for")
    kernels: str | None = Field(
        default=None,
        min_length=1,
        description='GGUF: what `targets kernels` measured on the device, so that "auto" keeps to speeds; a path from this file',
    )
    kv_cache: KvType | Literal["auto"] | KvCache = Field(
        default="f16",
        description='GGUF: type of the KV cache, { k = "q8_0", v = "q4_0" } where they differ, or "auto": f16, or as much less as '
        "limits.peak_rss asks for at this context; what it costs is measured there",
    )


class Types(_Table):
    """What the weights become. Type names are llama.cpp's (GGUF) or the ONNX builder's, verbatim."""

    type: str = Field(
        description='GGUF: Q4_0, Q4_K_M, Q8_0, ..., or "auto": for each matrix the type with which the file loses least; '
        'ONNX: fp32, int8, int4, mixed (int4 with the head and some matrices in int8, as the builder chooses them) or "auto"'
    )
    size: Size | None = Field(
        default=None, description='"auto": most bytes of the file, where that is less than limits.file_size'
    )
    imatrix: bool = Field(
        default=False, description="GGUF: weigh errors by an importance matrix of the calibration set"
    )
    embedding_type: str | None = Field(
        default=None, description="GGUF: tensor type of the token embedding, if not the type's own"
    )
    output_type: str | None = Field(
        default=None, description="GGUF: tensor type of the output matrix, if not the type's own"
    )
    rounding: Literal["nearest", "gptq"] = Field(
        default="nearest",
        description="GGUF, ONNX int4: gptq rounds each weight so that it makes good the errors of the others",
    )
    block: Literal[32, 64, 128] = Field(
        default=32,
        description="ONNX int8, int4, mixed: weights of a row that share a scale; more of them make smaller files",
    )
    symmetric: bool = Field(
        default=True,
        description="ONNX int4: codes around 0; false gives each block a zero point, and without gptq a tied embedding float32",
    )
    accuracy: Literal[1, 4] = Field(
        default=4, description="ONNX: 4 rounds what a matrix is given to 8 bits, 1 keeps it in float32 and is slower"
    )


class Limits(_Table):
    """What an artifact must keep to on the target. A limit that is not given is not checked."""

    file_size: Size | None = Field(default=None, description="most bytes of the model's files")
    peak_rss: Size | None = Field(default=None, description="most resident bytes of the process that runs it")
    pp512: float | None = Field(default=None, gt=0, description="least tokens/s of prompt processing, 512 tokens")
    tg128: float | None = Field(default=None, gt=0, description="least tokens/s of generation, 128 tokens")
    ttft_p95_ms: float | None = Field(
        default=None, gt=0, description="most milliseconds to the first token, 95th percentile"
    )


class Target(_Table):
    """One class of hardware, never one person's device. ``name`` and ``path`` come from its file."""

    summary: str = Field(min_length=1, description="the class of hardware in one line")
    arch: Literal["x86_64", "aarch64"]
    features: tuple[str, ...] = Field(default=(), description="instruction sets that the class is sure to have")
    runtime: Runtime
    quantize: Types
    limits: Limits = Field(default_factory=Limits)

    _name: str = PrivateAttr(default="")
    _path: Path | None = PrivateAttr(default=None)

    @property
    def name(self) -> str:
        """Return the name that recipes call it by: the file's, without ``.toml``."""
        return self._name

    @property
    def path(self) -> Path | None:
        """Return the file that it was read from."""
        return self._path

    @model_validator(mode="after")
    def _agrees(self) -> Target:
        known = FEATURES[self.arch]
        for index, feature in enumerate(self.features):
            if feature not in known:
                raise key_error(
                    f"features.{index}",
                    f'"{feature}" is no feature of {self.arch}{did_you_mean(feature, known) or "."}'
                    f" It has {', '.join(known)}",
                )
        engine, format_ = self.runtime.engine, self.runtime.format
        if engine != ENGINES[format_]:
            raise key_error("runtime.engine", f'"{engine}" runs no {format_} files; write "{ENGINES[format_]}"')
        if self.runtime.kernels is not None and format_ != "gguf":
            raise key_error("runtime.kernels", f"kernels are measured for gguf files, not for {format_}")
        if self.kv != F16 and format_ != "gguf":
            raise key_error("runtime.kv_cache", f"types are chosen for the KV cache of llama.cpp, not for {format_}")
        if self.kv == AUTO and self.limits.peak_rss is None:
            raise key_error("runtime.kv_cache", '"auto" needs memory to keep to: write limits.peak_rss')
        check_types(self.quantize, format_, "quantize")
        if self.quantize.type == AUTO and self.auto_size is None:
            raise key_error("quantize.type", '"auto" needs a size to keep to: write limits.file_size, or quantize.size')
        return self

    @property
    def auto_size(self) -> int | None:
        """Return the most bytes that a file of type "auto" may have; None where nothing limits it."""
        return min((size for size in (self.quantize.size, self.limits.file_size) if size is not None), default=None)

    @property
    def kv(self) -> Pair | Literal["auto"]:
        """Return the types of keys and values in the KV cache, or "auto"."""
        given = self.runtime.kv_cache
        if given == AUTO:
            return "auto"
        return (given.k, given.v) if isinstance(given, KvCache) else (given, given)

    @property
    def kernels_path(self) -> Path | None:
        """Return the file of the kernels' costs; None where the profile names none."""
        if self.runtime.kernels is None:
            return None
        return (self.path.parent if self.path else Path()) / self.runtime.kernels

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as a package's key and manifest have them: without a size that is not given, and without the path
        of the kernels' costs, whose figures are in the key of ``allocate``. Types of the KV cache other than f16 are always two.
        """
        value = self.model_dump(mode="json")
        del value["runtime"]["kernels"], value["runtime"]["kv_cache"]
        if self.kv != F16:
            value["runtime"]["kv_cache"] = AUTO if self.kv == AUTO else dict(zip("kv", self.kv, strict=True))
        if self.quantize.size is None:
            del value["quantize"]["size"]
        for name in _ONNX_ALONE:  # came later: at their default they are no part of a package's key
            if getattr(self.quantize, name) == Types.model_fields[name].default:
                del value["quantize"][name]
        return value

    def with_types(self, changes: dict[str, Any]) -> Target:
        """Return the same target with keys of ``[quantize]`` replaced, as a recipe's ``[quantize.NAME]`` asks for.

        A changed ``type`` starts from that type's own defaults for the embedding and output matrices. Raises
        `UsageError` for a type or key that the target's format lacks.
        """
        kept = self.quantize.model_dump(exclude_unset=True)
        if "type" in changes:
            same = changes["type"] == self.quantize.type == AUTO
            kept = {key: value for key, value in kept.items() if key == "imatrix" or (same and key == "size")}
        try:
            types = Types.model_validate({**kept, **changes}, strict=True)
            check_types(types, self.runtime.format, f"quantize.{self.name}")
            if types.type == AUTO and types.size is None and self.limits.file_size is None:
                raise key_error(f"quantize.{self.name}.size", '"auto" needs a size to keep to: size = "60 MiB"')
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in ("quantize", self.name, *first["loc"]))
            said = f"unknown key{did_you_mean(first['loc'][-1], Types.model_fields)}"
            said = said if first["type"] == "extra_forbidden" else first["msg"]
            raise UsageError(f"{where}: {said}", f"edgedistill targets show {self.name}") from None
        except PydanticCustomError as error:
            context = error.context or {}
            raise UsageError(f"{context['key']}: {context['text']}", "edgedistill targets show " + self.name) from None
        return self.model_copy(update={"quantize": types})


def check_types(types: Types, format_: str, key: str = "quantize") -> None:
    """Raise a `key_error` below ``key`` unless all of ``types`` exists in ``format_`` ("gguf" or "onnx")."""
    if format_ == "onnx":
        _check_onnx(types, key)
        return
    for name in _ONNX_ALONE:
        if name in types.model_fields_set:
            raise key_error(f"{key}.{name}", f'unknown key: format = "{format_}" has none, only "onnx" does')
    from edgedistill.formats.gguf.types import FILE_TYPES, FINELY_ROUNDED, GGML_TYPES, rounded_in

    if types.type == AUTO:
        _check_auto(types, key)
        return
    _check_type(types.type, FILE_TYPES, f"{key}.type", format_)
    if types.size is not None:
        raise key_error(f"{key}.size", f'only type = "{AUTO}" keeps to a size: {types.type} has the size that it has')
    for name in ("embedding_type", "output_type"):
        if (tensor_type := getattr(types, name)) is not None:
            _check_type(tensor_type, GGML_TYPES, f"{key}.{name}", format_)
    if FILE_TYPES[types.type].imatrix == "required" and not types.imatrix:
        raise key_error(f"{key}.type", f"{types.type} needs an importance matrix: add imatrix = true")
    if types.rounding == "gptq":
        if not rounded_in(types.type):
            why = ", whose codes stand for several weights each" if types.type.startswith("IQ") else ""
            raise key_error(f"{key}.rounding", f'"gptq" rounds {", ".join(FINELY_ROUNDED)}, not {types.type}{why}')
        if not types.imatrix:
            raise key_error(f"{key}.rounding", '"gptq" needs the calibration set: add imatrix = true')


def _check_onnx(types: Types, key: str) -> None:
    for name in ("imatrix", "embedding_type", "output_type"):
        if name in types.model_fields_set:
            raise key_error(f"{key}.{name}", f'unknown key: format = "onnx" has type, {", ".join(_ONNX_KEYS)}')
    _check_type(types.type, ONNX_TYPES, f"{key}.type", "onnx")
    for name in _ONNX_KEYS:
        if name in types.model_fields_set and name not in ONNX_TYPES[types.type]:
            having = " or ".join(kind for kind, keys in ONNX_TYPES.items() if name in keys)
            raise key_error(f"{key}.{name}", f"{types.type} of onnx has none: leave it out, or take type {having}")


def _check_auto(types: Types, key: str) -> None:
    if not types.imatrix:
        raise key_error(f"{key}.type", f'"{AUTO}" needs the calibration set: add imatrix = true')
    for name in ("embedding_type", "output_type"):
        if getattr(types, name) is not None:
            raise key_error(f"{key}.{name}", f'type = "{AUTO}" chooses it: leave it out')


def _check_type(given: str, known: Any, key: str, format_: str) -> None:
    if given not in known:
        near = did_you_mean(given, known) or "."
        raise key_error(key, f'"{given}" is no type of {format_}{near} It has {", ".join(sorted(known))}')


# --------------------------------------------------------------------------------------------------------- look-up


def packaged_folder() -> Path:
    """Return the folder of the profiles that come with edgedistill: inside the wheel, or ``targets/`` of a checkout."""
    inside = Path(__file__).parent / "_targets"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "targets"


def find_target(name_or_path: str, recipe_dir: Path | None = None) -> Target:
    """Return the target called ``name_or_path``: a ``.toml`` file, else from the recipe's ``targets/``, else packaged.

    Raises `UsageError` with the nearest name and the list if there is none, `RecipeError` if its file is wrong.
    """
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        path = Path(name_or_path)
        if not path.is_absolute() and recipe_dir is not None and (recipe_dir / path).exists():
            path = recipe_dir / path
        return check_target(path)
    files = _files(recipe_dir)
    if name_or_path not in files:
        raise UsageError(
            f'no target is called "{name_or_path}"{did_you_mean(name_or_path, files)}\nTargets: {", ".join(files)}',
            "edgedistill targets list",
        )
    return check_target(files[name_or_path])


def list_targets(recipe_dir: Path | None = None, wrong: Callable[[UsageError], None] | None = None) -> list[Target]:
    """Return every target that `find_target` finds by name, sorted by name; a wrong file is told to ``wrong`` and left out, or
    raises its `RecipeError`.
    """
    found = []
    for path in _files(recipe_dir).values():
        try:
            found.append(check_target(path))
        except UsageError as error:
            if wrong is None:
                raise
            wrong(error)
    return found


def check_target(path: Path) -> Target:
    """Read one target file; raise `RecipeError` with file, line and key for everything that is wrong in it."""
    target = load_toml(path, Target)
    target._name, target._path = path.stem, path
    return target


def _files(recipe_dir: Path | None) -> dict[str, Path]:
    folders = [packaged_folder(), *([recipe_dir / "targets"] if recipe_dir else [])]
    found = {path.stem: path for folder in folders if folder.is_dir() for path in folder.glob("*.toml")}
    return dict(sorted(found.items()))


# ------------------------------------------------------------------------------------------------------ this machine


def matches_host(target: Target, host: HostFingerprint) -> tuple[bool, str]:
    """Say whether what ``host`` measures proves ``target``'s limits; the reason is empty when it does."""
    if host.arch != target.arch:
        return False, f"measured on {host.arch}, the target is {target.arch}"
    missing = [feature for feature in target.features if feature not in host.features]
    if missing:
        return False, f"measured without {', '.join(missing)}, which the target has"
    beyond = [feature for feature in FASTER[target.arch] if feature in host.features and feature not in target.features]
    if target.features and beyond:  # a profile that names none says nothing of them
        return False, f"measured with {', '.join(beyond)}, which the target lacks"
    if host.cores < target.runtime.threads:
        return False, f"measured on {host.cores} cores, the target runs {target.runtime.threads} threads"
    return True, ""


def detect() -> Target:
    """Describe this machine as a target, without limits: nothing has been measured here yet."""
    from edgedistill.devices.host import fingerprint

    host = fingerprint()
    if host.arch not in FEATURES:
        raise UsageError(f"this machine is {host.arch}; targets are {' or '.join(FEATURES)}")
    return Target(
        summary=f"{host.cpu}, {host.cores} cores, {format_size(host.memory_bytes)} memory, {host.system}",
        arch=host.arch,  # pyright: ignore[reportArgumentType]  # checked above
        features=tuple(feature for feature in FEATURES[host.arch] if feature in host.features),
        # llama.cpp decodes slower when its threads share cores, so no more threads than physical cores.
        runtime=Runtime(format="gguf", engine="llama.cpp", threads=host.cores, context=2048),
        quantize=Types.model_validate({"type": "Q4_0" if host.arch == "aarch64" else "Q4_K_M", "imatrix": True}),
    )


def to_toml(target: Target) -> str:
    """Write ``target`` as a file that `check_target` reads back to an equal one."""

    def value(item: Any) -> str:
        if isinstance(item, bool):
            return str(item).lower()
        if isinstance(item, str):
            escaped = item.replace("\\", "\\\\").replace('"', '\\"')
            return f'"{escaped}"'
        if isinstance(item, tuple | list):
            return f"[{', '.join(value(one) for one in item)}]"
        if isinstance(item, dict):
            return f"{{ {', '.join(f'{name} = {value(one)}' for name, one in item.items())} }}"
        return str(item)

    data = target.model_dump(exclude_none=True)
    if target.kv == F16:
        del data["runtime"]["kv_cache"]
    if target.runtime.format == "onnx":
        given = {"type", *(target.quantize.model_fields_set & set(_ONNX_KEYS))}
        data["quantize"] = {key: item for key, item in data["quantize"].items() if key in given}
    else:
        data["quantize"] = {key: item for key, item in data["quantize"].items() if key not in _ONNX_ALONE}
    lines = [f"{key} = {value(data.pop(key))}" for key in ("summary", "arch", "features")]
    for table, keys in data.items():
        if keys:
            lines += ["", f"[{table}]"]
            for key, item in keys.items():
                exact = format_size(item) if key in ("size", "file_size", "peak_rss") else ""
                size = exact if exact and parse_size(exact) == item else item
                lines.append(f"{key} = {value(size)}")
    return "\n".join(lines) + "\n"
