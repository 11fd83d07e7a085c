"""Codes of MatMulNBits: their bytes are what ONNX Runtime multiplies by and looks up, and feedback makes products nearer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgedistill.formats.onnx.nbits import Coded, Feedback, cost, nearest, pack, unpack
from edgedistill.formats.onnx.types import KINDS, Kind, kinds_for

pytestmark = pytest.mark.onnx


def weights_of(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def moments_of(columns: int, seed: int = 1) -> np.ndarray:
    """Return second moments of inputs of which some are large and most go together."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(4 * columns, columns // 2)) @ rng.normal(size=(columns // 2, columns))
    inputs = (inputs + rng.normal(size=inputs.shape)) * np.exp(rng.normal(size=columns))
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def session(
    op: str, initializers: dict[str, np.ndarray], inputs: list[str], asked: tuple[str, Any], **about: int
) -> Any:
    """Return a session of a model of one node."""
    import onnxruntime
    from onnx import helper, numpy_helper

    about_it: dict[str, Any] = dict(about)
    node = helper.make_node(op, inputs, ["y"], domain="com.microsoft", **about_it)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(*asked, None)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(values, name) for name, values in initializers.items()],
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("columns", [1, 2, 7, 32])
def test_packed_codes_come_back(columns: int) -> None:
    rng = np.random.default_rng(columns)
    for bits in (4, 8):
        codes = rng.integers(0, 2**bits, (5, columns), dtype=np.uint8)
        raw = pack(codes, bits)
        assert raw.shape == (5, -(-columns * bits // 8))
        assert (unpack(raw, bits, columns) == codes).all()
    assert pack(np.array([[1, 2, 3]], dtype=np.uint8), 4).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize("kind", [*KINDS.values(), Kind(bits=8, block=64, zeros=True)], ids=lambda kind: kind.name)
@pytest.mark.parametrize("columns", [96, 192])  # an odd and an even number of blocks, and rows that are padded
def test_onnxruntime_multiplies_by_what_the_codes_stand_for(kind: Kind, columns: int) -> None:
    from onnx import TensorProto

    rows = 24
    coded = nearest(weights_of(rows, columns), kind)
    if kind.zeros:  # any that a builder may write
        zeros = np.random.default_rng(2).integers(0, 2**kind.bits, coded.zeros.shape, dtype=np.uint8)
        coded = Coded(kind, columns, coded.codes, coded.scales, zeros)
    codes, scales, zeros = coded.packed()
    assert sum(some.nbytes for some in (codes, scales, *([] if zeros is None else [zeros]))) == kind.nbytes(
        rows, columns
    )
    back = Coded.of(kind, columns, codes, scales, zeros)
    assert (back.codes == coded.codes).all() and (back.zeros == coded.zeros).all()
    held = {"b": codes, "s": scales} | ({} if zeros is None else {"z": zeros})
    x = weights_of(5, columns, seed=3)
    about = {"K": columns, "N": rows, "bits": kind.bits, "block_size": kind.block, "accuracy_level": 1}
    product = session("MatMulNBits", held, ["x", *held], ("x", TensorProto.FLOAT), **about).run(None, {"x": x})[0]
    wanted = x.astype(np.float64) @ coded.values().T.astype(np.float64)
    assert np.abs(product - wanted).max() < 1e-5 * np.abs(wanted).max()
    held["b"] = codes.reshape(rows, -1)
    about = {"bits": kind.bits, "block_size": kind.block, "gather_axis": 0, "quantize_axis": 1}
    look_up = session("GatherBlockQuantized", held, ["b", "i", *list(held)[1:]], ("i", TensorProto.INT64), **about)
    found = look_up.run(None, {"i": np.arange(rows)})[0]
    assert (found[:, :columns] == coded.values()).all()


def test_nearest_is_not_worse_than_the_widest_scale() -> None:
    weights = weights_of(40, 64)
    blocks = weights.reshape(40, 2, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / 7
    plain = (np.clip(np.rint(blocks / scale), -8, 7) * scale).reshape(weights.shape)
    for name in ("int4/32", "uint4/32"):
        assert np.square(nearest(weights, KINDS[name]).values() - weights).sum() < np.square(plain - weights).sum()
    # what counts is what the columns count
    importance = np.ones(64, dtype=np.float32)
    importance[5] = 1000
    heeded, not_heeded = (nearest(weights, KINDS["int4/32"], one).values() for one in (importance, None))
    assert np.abs(heeded - weights)[:, 5].mean() < 0.5 * np.abs(not_heeded - weights)[:, 5].mean()
    assert (nearest(np.zeros((3, 64), dtype=np.float32), KINDS["uint4/64"]).values() == 0).all()


@pytest.mark.parametrize("name", ["int4/32", "uint4/64", "int4/128", "int8/64"])
def test_feedback_makes_products_nearer(name: str) -> None:
    weights, second = weights_of(64, 96), moments_of(96)
    coded, before, after = Feedback(second).round(weights, KINDS[name])
    off = weights.astype(np.float64) - coded.values()
    assert after == pytest.approx(np.einsum("rc,cd,rd->", off, second, off), rel=1e-3)
    assert before == pytest.approx(cost(weights, nearest(weights, KINDS[name], second.diagonal()), second))
    assert after < 0.7 * before
    # inputs that are never there, and weights of 0, change nothing
    assert Feedback(np.zeros((96, 96), dtype=np.float32)).round(weights, KINDS[name])[2] == 0
    assert (Feedback(second).round(np.zeros((4, 96), dtype=np.float32), KINDS[name])[0].values() == 0).all()


def test_a_head_that_is_looked_up_keeps_its_width() -> None:
    assert "int4/128" not in kinds_for(576, looked_up=True) and "int4/64" in kinds_for(576, looked_up=True)
    assert set(kinds_for(576, looked_up=False)) == set(KINDS)
    assert {kind.block for kind in kinds_for(96, looked_up=True).values()} == {32}
