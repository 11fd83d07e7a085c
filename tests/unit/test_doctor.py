"""The doctor reports what is missing with the command that mends it, and never fails itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgedistill import doctor
from edgedistill.devices.host import fingerprint


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_healthy_machine(tmp_path: Path) -> None:
    checks = by_name(doctor.diagnose(tmp_path / "store"))
    assert {"Python", "processor", "load", "memory", "store", "packages", "llama.cpp", "compiler", "sandbox"} <= set(
        checks
    )
    assert checks["Python"].ok
    assert checks["packages"].ok
    assert checks["llama.cpp"].ok is not False
    assert "ggml" in checks["llama.cpp"].detail
    for check in checks.values():
        assert check.ok or check.remedy or check.name in ("processor", "bf16")
        assert set(check.to_json()) == {"name", "ok", "detail", "remedy"}


def test_missing_package_has_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name in ("peft", "llama-cpp-python") else real(name))
    packages = by_name(doctor._packages())["packages"]
    assert packages.ok is False
    assert "peft (LoRA)" in packages.detail
    assert packages.remedy == "pip install edgedistill"
    engine = doctor._llama_cpp(fingerprint())
    assert engine.ok is False
    assert engine.remedy.startswith("pip install llama-cpp-python")


def test_library_for_another_processor_is_a_line_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    check = doctor._llama_cpp(fingerprint())
    assert check.ok is False
    assert "signal 4" in check.detail
    assert "--force-reinstall" in check.remedy


@pytest.mark.parametrize(
    ("system", "gcc", "ok"), [("AMX_INT8 = 1", 12, False), ("AMX_INT8 = 1", 14, True), ("F16C = 1", 12, True)]
)
def test_a_build_whose_amx_faults_is_found(monkeypatch: pytest.MonkeyPatch, system: str, gcc: int, ok: bool) -> None:
    reply = json.dumps({"version": "1", "ggml": "2", "system": f"CPU : {system} | ", "gcc": gcc})
    monkeypatch.setattr(doctor, "_PROBE", f"print({reply!r})")
    monkeypatch.setattr(doctor, "_BUILD_FEATURES", {})
    check = doctor._llama_cpp(fingerprint())
    assert check.ok is ok
    assert ok or check.remedy.startswith('CFLAGS="-mno-amx-tile')


def test_build_without_the_processors_instructions_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = '{"version": "1", "ggml": "2", "system": "CPU : SSE3 = 1 | REPACK = 1 | ", "gcc": 12}'
    monkeypatch.setattr(doctor, "_PROBE", f"print('''{reply}''')")
    host = fingerprint()
    check = doctor._llama_cpp(host)
    known = set(doctor._BUILD_FEATURES.values()) & set(host.features)
    assert check.ok is (None if known else True)


def test_full_disk_and_unwritable_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    check = doctor._disk(tmp_path / "a" / "b")
    assert check.ok is None
    assert "1 MiB free" in check.detail
    assert "store gc" in check.remedy
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert doctor._disk(tmp_path).ok is False


def test_importing_the_doctor_imports_no_engine() -> None:
    heavy = "torch", "numpy", "llama_cpp", "onnxruntime", "transformers"
    code = f"import sys, edgedistill.doctor, edgedistill.target; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
