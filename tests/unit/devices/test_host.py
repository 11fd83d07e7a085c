"""What a machine is read from /proc/cpuinfo, and what makes two machines the same one."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import time
from typing import Any

import pytest

from edgedistill.devices.bandwidth import bandwidth
from edgedistill.devices.host import (
    HostFingerprint,
    busy_seconds,
    fingerprint,
    load_average,
    parse_cpuinfo,
    physical_cores,
    usable_cores,
)

ZEN4 = """processor\t: 0
model name\t: AMD EPYC
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu sse4_2 avx f16c fma avx2 avx512f avx512dq avx512cd avx512bw avx512vl avx512_bf16 avx512_vnni avx512vbmi

processor\t: 1
model name\t: AMD EPYC
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu sse4_2 avx f16c fma avx2 avx512f avx512dq avx512cd avx512bw avx512vl avx512_bf16 avx512_vnni avx512vbmi
"""
PHONE = """processor\t: 0
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd05

processor\t: 1
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd41
"""
PI = PHONE.replace("0xd05", "0xd0b").replace("0xd41", "0xd0b") + "\nModel\t: Raspberry Pi 5 Model B Rev 1.0\n"


def test_server_with_avx512() -> None:
    cpu, features = parse_cpuinfo(ZEN4, "x86_64")
    assert cpu == "AMD EPYC"
    assert features == ("sse4.2", "avx", "f16c", "fma", "avx2", "avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16")


def test_avx512_needs_all_its_parts() -> None:
    _, features = parse_cpuinfo(ZEN4.replace("avx512vl", "x"), "x86_64")
    assert "avx512" not in features


def test_phone_with_unlike_cores_has_what_all_of_them_have() -> None:
    assert parse_cpuinfo(PHONE, "aarch64") == ("Cortex-A55 + Cortex-A78", ("neon", "fp16", "dotprod"))


def test_board_names_itself() -> None:
    cpu, features = parse_cpuinfo(PI, "aarch64")
    assert cpu == "Raspberry Pi 5 Model B Rev 1.0 (Cortex-A76)"
    assert "dotprod" in features


def test_unknown_architecture_has_no_features() -> None:
    assert parse_cpuinfo("processor : 0\nisa : rv64imafdc\n", "riscv64") == ("unknown processor", ())


def test_hyper_threads_are_not_cores() -> None:
    assert physical_cores(ZEN4) == 1
    assert physical_cores(PHONE) == 0  # it does not tell
    second = ZEN4.replace("processor\t: 1", "processor\t: 3").replace("processor\t: 0", "processor\t: 2")
    four = ZEN4 + "\n" + second.replace("core id\t\t: 0", "core id\t\t: 1")
    assert physical_cores(four) == 2
    assert physical_cores(four, {2, 3}) == 1  # both threads of one core
    assert physical_cores(four, {1, 2}) == 2
    assert usable_cores() == fingerprint().cores <= (os.cpu_count() or 1)


def test_digest_is_stable_and_ignores_what_kernels_keep_back() -> None:
    host = HostFingerprint(arch="x86_64", cpu="a", features=("avx2",), cores=4, memory_bytes=8 << 30, system="Linux")
    assert len(host.digest) == 16
    assert dataclasses.replace(host, memory_bytes=(8 << 30) - (50 << 20)).digest == host.digest
    assert dataclasses.replace(host, cores=2).digest != host.digest
    assert dataclasses.replace(host, features=("avx",)).digest != host.digest
    assert HostFingerprint.from_json(host.to_json()) == host


def test_this_host() -> None:
    host = fingerprint()
    assert host.arch
    assert host.cores >= 1
    assert host.memory_bytes > 1 << 28
    assert load_average() is None or load_average() >= 0  # type: ignore[operator]


def test_busy_seconds_see_our_own_work() -> None:
    before = busy_seconds()
    if before is None:
        pytest.skip("no /proc/stat on this system")
    end = time.process_time() + 0.15
    while time.process_time() < end:
        pass
    after = busy_seconds()
    assert after is not None
    assert after - before >= 0.1


def test_bandwidth_is_that_of_memory_not_of_a_cache() -> None:
    assert 0.5e9 < bandwidth(1) < 400e9


@pytest.mark.parametrize("memory", [0, 512 << 20])
def test_bandwidth_is_read_in_little_memory_and_where_it_is_not_known(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def buffer(size: int) -> Any:
        asked.append(size)
        return (ctypes.c_char * size)()

    host = dataclasses.replace(fingerprint(), memory_bytes=memory)
    monkeypatch.setattr("edgedistill.devices.bandwidth.fingerprint", lambda: host)
    monkeypatch.setattr("ctypes.create_string_buffer", buffer)
    assert bandwidth.__wrapped__(2, 1) > 0.5e9
    assert len(asked) == 2 and sum(asked) <= (memory // 8 or 1 << 30)
