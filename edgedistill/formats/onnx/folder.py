"""Find the matrices of a folder that the builder wrote in a checkpoint, and put other codes into the graph.

The builder's names say layer and place (``/model/layers.3/attn/qkv_proj/MatMul_Q4``); what it holds there is compared with the
checkpoint before anything is replaced, so that a family whose rows it turns or folds is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf.checkpoint import Entry, open_checkpoint, read_entry
from edgedistill.formats.onnx.types import Kind

if TYPE_CHECKING:
    import numpy as np

    from edgedistill.formats.onnx.nbits import Coded

HEAD = "lm_head"
_TOGETHER = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_NOTES = 512  # bytes that the graph may need to name zero points
_FAR = 0.5  # of the norm of a matrix: 4 bits move weights by about 0.1, another matrix lies 1.4 away


@dataclass(frozen=True)
class Matrix:
    """One product of the graph: ``name`` (``blk.3.qkv_proj``, ``lm_head``), its node, [rows, columns], how it is stored, and the
    tensors of the checkpoint whose rows follow each other in it.
    """

    name: str
    node: str
    shape: tuple[int, int]
    kind: Kind
    parts: tuple[str, ...]
    looked_up: bool  # an embedding shares its codes


@dataclass
class Folder:
    """A built folder, its weights in memory, beside the checkpoint that it was built from."""

    path: Path
    checkpoint: Path
    matrices: dict[str, Matrix] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        import onnx

        try:
            decoder = json.loads((self.path / "genai_config.json").read_text())["model"]["decoder"]
            self.file = self.path / decoder["filename"]
            self.model: Any = onnx.load(str(self.file))
        except Exception as error:  # a protobuf decoder raises types of its own
            raise UsageError(f"{self.path}: no readable ONNX model: {error}", "Build the ONNX folder again.") from None
        self.nodes: dict[str, Any] = {node.name: node for node in self.model.graph.node}
        self.weights: dict[str, Any] = {one.name: one for one in self.model.graph.initializer}
        self.tensors: dict[str, Entry] = open_checkpoint(self.checkpoint)
        self.shared = {node.input[0]: node for node in self.model.graph.node if node.op_type == "Reshape"}
        for node in self.model.graph.node:
            if node.op_type == "MatMulNBits":
                one = self._matrix(node)
                self.matrices[one.name] = one

    def weights_of(self, part: str) -> np.ndarray:
        """Return a tensor of the checkpoint as float32 [rows, columns]."""
        return read_entry(self.tensors[part]).astype("float32", copy=False)

    def read(self, matrix: Matrix) -> Coded:
        """Return what the graph holds of a matrix."""
        from onnx import numpy_helper

        from edgedistill.formats.onnx.nbits import Coded

        found = [numpy_helper.to_array(self.weights[name]) for name in self.nodes[matrix.node].input[1:4] if name]
        codes, scales, *zeros = found
        rows = matrix.shape[0]
        return Coded.of(matrix.kind, matrix.shape[1], codes.reshape(rows, -1), scales, zeros[0] if zeros else None)

    def check(self, matrix: Matrix) -> None:
        """Raise StepFailed where the graph does not hold the rows of the checkpoint in order."""
        import numpy as np

        own = np.concatenate([self.weights_of(part) for part in matrix.parts])
        far = float(np.linalg.norm(self.read(matrix).values() - own) / max(float(np.linalg.norm(own)), 1e-30))
        if not far < _FAR:
            raise StepFailed(
                f"{matrix.node}: the builder's weights are not those of {', '.join(matrix.parts)} in the checkpoint "
                f"({far:.2f} of their norm away): this family's matrices cannot be rounded here",
                'leave rounding out and take type = "int4" or "int8"',
            )

    def beside(self) -> int:
        """Return the bytes of the folder that are not in a matrix of ``matrices``; more where these get zero points."""
        whole = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()) + _NOTES * len(
            self.matrices
        )
        return whole - sum(one.kind.nbytes(*one.shape) for one in self.matrices.values())

    def replace(self, matrix: Matrix, coded: Coded) -> None:
        """Put other codes into the graph, and into the embedding where it shares them. What is looked up keeps its width."""
        import numpy as np

        node = self.nodes[matrix.node]
        codes, scales, zeros = coded.packed()
        old = list(node.input)
        new = [old[0], old[1], old[2], *([] if zeros is None else [f"{old[1]}_zero_points"])]
        for name, values in zip(new[1:], (codes, scales, zeros), strict=False):
            self._put(name, values)
        for name in set(old[3:]) - set(new) - {""}:
            self._drop(name)
        del node.input[:]
        node.input.extend(new)
        set_attributes(node, bits=coded.kind.bits, block_size=coded.kind.block)
        if matrix.looked_up:
            shape = self.shared[old[1]]
            self._put(
                f"{shape.name}/shape", np.array([matrix.shape[0], codes.shape[1] * codes.shape[2]], dtype=np.int64)
            )
            shape.input[1] = f"{shape.name}/shape"
            look_up = next(one for one in self.model.graph.node if shape.output[0] in one.input)
            found = [shape.output[0], look_up.input[1], *new[2:]]
            del look_up.input[:]
            look_up.input.extend(found)
            set_attributes(look_up, bits=coded.kind.bits, block_size=coded.kind.block)
            # The builder noted the shape of what it reshaped, which may be another one now.
            for one in [one for one in self.model.graph.value_info if one.name == shape.output[0]]:
                self.model.graph.value_info.remove(one)

    def save(self) -> None:
        """Write graph and weights in place of the old ones."""
        import onnx

        data = self.file.with_name(f"{self.file.name}.data")
        data.unlink(missing_ok=True)
        self.file.unlink()
        onnx.save_model(
            self.model,
            str(self.file),
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=data.name,
            size_threshold=256,
        )
        data.chmod(self.file.stat().st_mode)  # onnx writes it for its owner's eyes

    def _put(self, name: str, values: Any) -> None:
        import numpy as np
        from onnx import numpy_helper

        made = numpy_helper.from_array(np.ascontiguousarray(values), name)
        if name in self.weights:
            self.weights[name].CopyFrom(made)
        else:
            self.model.graph.initializer.append(made)
            self.weights[name] = self.model.graph.initializer[-1]

    def _drop(self, name: str) -> None:
        one = self.weights.pop(name, None)
        if one is not None:
            self.model.graph.initializer.remove(one)

    def _matrix(self, node: Any) -> Matrix:
        about = {one.name: one.i for one in node.attribute}
        kind = Kind(bits=about["bits"], block=about["block_size"], zeros=len(node.input) > 3 and bool(node.input[3]))
        shape = about["N"], about["K"]
        name, parts = self._place(node.name)
        rows = [self.tensors[part].shape for part in parts]
        if not parts or sum(one[0] for one in rows) != shape[0] or any(one[1:] != shape[1:] for one in rows):
            raise StepFailed(
                f"{node.name}: no tensors of the checkpoint make up its {shape[0]} rows of {shape[1]}",
                'leave rounding out and take type = "int4" or "int8"',
            )
        return Matrix(name, node.name, shape, kind, parts, node.input[1] in self.shared)

    def _place(self, node: str) -> tuple[str, tuple[str, ...]]:
        """Return a name for a node, and the tensors of the checkpoint that it holds; none where they are not found."""
        if node.startswith("/lm_head/"):
            ends = ("lm_head.weight", "embed_tokens.weight")
            found = next((name for end in ends for name in self.tensors if name.endswith(end)), None)
            return HEAD, (found,) if found else ()
        place = re.fullmatch(r"/model/layers\.(\d+)/.*?(\w+)/MatMul\w*", node)
        if place is None:
            return node, ()
        layer, what = place.groups()
        inside = [name for name in self.tensors if re.search(rf"\blayers\.{layer}\.", name)]

        def named(part: str) -> list[str]:
            return [name for name in inside if name.endswith(f".{part}.weight")]

        parts = named(what) or [name for part in _TOGETHER.get(what, ()) for name in named(part)]
        return f"blk.{layer}.{what}", tuple(parts) if len(parts) in (1, len(_TOGETHER.get(what, ()))) else ()


def set_attributes(node: Any, **values: int) -> None:
    """Set whole-number attributes that a node has."""
    for one in node.attribute:
        if one.name in values:
            one.i = values[one.name]
