"""Which CPUs compute in bf16: the instruction alone does not tell."""

from __future__ import annotations

import pytest

from edgedistill.errors import UsageError
from edgedistill.training.precision import computes_bf16, cpu_computes_bf16, resolve_dtype


@pytest.mark.parametrize(
    ("cpuinfo", "faster"),
    [
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16\n", True),  # Zen 4
        ("vendor_id : AuthenticAMD\nflags : avx2\n", False),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16\n", False),  # a Xeon whose AMX is hidden
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 amx_tile amx_bf16\n", True),
        ("Features : asimd i8mm bf16\n", True),  # Arm
        ("Features : asimd\n", False),
        ("", False),
    ],
)
def test_bf16_only_where_it_is_faster_than_fp32(cpuinfo: str, faster: bool) -> None:
    assert computes_bf16(cpuinfo) is faster


def test_auto_follows_the_processor_and_other_names_stay() -> None:
    assert resolve_dtype("auto") == ("bfloat16" if cpu_computes_bf16() else "float32")
    assert resolve_dtype("bf16") == "bfloat16"
    with pytest.raises(UsageError, match="float16"):
        resolve_dtype("float16")
