"""The Dockerfile: clean under hadolint, and an image that runs as a user without rights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.unit.formats.gguf.conftest import make_model

ROOT = Path(__file__).parents[2]
BASE = "docker.io/library/debian:bookworm-slim"
LLAMA_CPP = "llama_cpp_python"
USER = 4321  # nobody's, in the image and here


def run(*command: str | Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], text=True, capture_output=True, check=False, **kwargs)  # type: ignore[call-overload]


def test_hadolint_is_silent() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    found = run(hadolint, "--no-color", ROOT / "Dockerfile")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_build_context_holds_what_is_copied_and_nothing_of_git_or_tests() -> None:
    copied = [
        part
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for part in line.split()[1:-1]
    ]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == kept
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.container
@pytest.mark.gating
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_image_builds_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_gguf: Path) -> None:
    """Build it with buildah and run it: no daemon, no registry; its base is made of Debian packages."""
    if os.getuid() != 0:
        pytest.fail("buildah's chroot isolation needs root: run this test as root", pytrace=False)
    monkeypatch.setenv("BUILDAH_ISOLATION", "chroot")  # works where user namespaces do not: inside other containers
    storage = ["--root", tmp_path / "storage", "--runroot", tmp_path / "run"]

    def buildah(*arguments: str | Path) -> str:
        done = run("buildah", *storage, *arguments)
        assert done.returncode == 0, f"buildah {arguments[0]}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout.strip()

    try:
        made = run("mmdebstrap", "--variant=minbase", "bookworm", tmp_path / "base.tar")
        assert made.returncode == 0, made.stderr[-2000:]
        (tmp_path / "Dockerfile.base").write_text("FROM scratch\nADD base.tar /\n")
        buildah("build", "-t", BASE, "-f", tmp_path / "Dockerfile.base", tmp_path)
        buildah("build", "--pull-never", "-t", "edgedistill", *_index_of_this_machine(tmp_path), ROOT)
        make_model(tmp_path / "mounted" / "tiny")
        for path in (tmp_path / "mounted", *(tmp_path / "mounted").rglob("*")):
            os.chown(path, USER, USER)
        container = buildah("from", "--pull-never", "edgedistill")

        def inside(*command: str) -> str:
            return buildah("run", container, "--", *command)

        version = run(sys.executable, "-m", "edgedistill", "--version").stdout.strip()
        assert inside("edgedistill", "--version") == version
        assert inside("id", "-u") == "10001"
        assert "laptop" in inside("edgedistill", "targets", "list")
        inside("edgedistill", "init", "quickstart")
        inside("edgedistill", "store", "list")
        inside("python", "-c", "import torch, llama_cpp, onnxruntime_genai; llama_cpp.llama_backend_init()")
        entry = buildah("inspect", "--format", "{{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.User}}", "edgedistill")
        assert entry == "[edgedistill] 10001"
        compilers = inside("sh", "-c", "command -v g++ || echo none")
        assert compilers == "none", "the compiler stays in the builder"

        # A user whom the image does not know, and a folder of theirs mounted over one of the image's. A container of its own: the
        # store of the other one has its owner.
        other = buildah("from", "--pull-never", "edgedistill")

        def mounted(*command: str) -> str:
            volumes = [f"{tmp_path / 'mounted'}:/work", f"{smollm2_gguf.parent}:/models:ro"]
            flags = [f"--volume={volume}" for volume in volumes]
            return buildah("run", f"--user={USER}:{USER}", *flags, other, "--", *command)

        assert mounted("id", "-u") == str(USER)
        mounted("sh", "-c", 'touch "$HOME/file"')
        mounted("python", "-c", "import getpass, torch._inductor.config; getpass.getuser()")
        mounted("edgedistill", "init", "quickstart")
        mounted("edgedistill", "plan", "quickstart", "--set", f"teacher.model=gguf:/models/{smollm2_gguf.name}")
        mounted("edgedistill", "quantize", "tiny", "--types", "Q8_0", "-o", "quantized")
        assert (tmp_path / "mounted" / "quickstart" / "quickstart.lock").stat().st_uid == USER
        assert list((tmp_path / "mounted" / "quantized").rglob("*.gguf"))
    finally:
        run("buildah", *storage, "rm", "--all")
        shutil.rmtree(tmp_path / "storage", ignore_errors=True)


def _index_of_this_machine(tmp_path: Path) -> list[str]:
    """Return the flags that give pip in the build this machine's package index, certificates and wheels.

    Also the compiled llama-cpp-python of this environment's pip cache, where it is: compiling it takes minutes, and
    what is tested here is the Dockerfile. EDGEDISTILL_CONTAINER_COMPILE=1 compiles.
    """
    certificates = "/etc/ssl/certs/ca-certificates.crt"  # mounted elsewhere: the build installs a file of this name
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    found = {"find-links": [str(wheels)]}
    for line in run(sys.executable, "-m", "pip", "config", "list").stdout.splitlines():
        name, _, value = line.partition("=")
        value = value.strip("'\"").replace("\\n", " ")
        found.setdefault(name.rpartition(".")[2].replace("_", "-").lower(), []).extend(value.split())
    if not os.environ.get("EDGEDISTILL_CONTAINER_COMPILE"):
        cached = run(sys.executable, "-m", "pip", "cache", "list", "--format=abspath", LLAMA_CPP).stdout.split()
        for wheel in cached:
            shutil.copy2(wheel, wheels)
    keys = ("index-url", "find-links", "timeout", "default-timeout", "trusted-host")
    lines = ["[global]", *(f"{key} = {' '.join(dict.fromkeys(found[key]))}" for key in keys if key in found)]
    if Path(certificates).is_file():
        lines.append("cert = /certificates.crt")
    (tmp_path / "pip.conf").write_text("\n".join(lines) + "\n")
    flags = ["--volume", f"{tmp_path / 'pip.conf'}:/etc/pip.conf:ro"]
    if more := found.get("extra-index-url"):
        flags += ["--build-arg", f"PIP_EXTRA_INDEX_URL={' '.join(more)}"]
    if Path(certificates).is_file():
        flags += ["--volume", f"{certificates}:/certificates.crt:ro"]
    for place in dict.fromkeys(found["find-links"] + found.get("extra-index-url", []) + found.get("index-url", [])):
        path = Path(urllib.request.url2pathname(place.removeprefix("file://")))
        if path.is_absolute() and path.exists():
            folder = path.parent if path.name == "simple" else path  # a simple index points to files beside it
            flags += ["--volume", f"{folder}:{folder}:ro"]
    return flags
