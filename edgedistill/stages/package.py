"""package: what ships, if it is good enough: the model, its manifest and card, and how to run it.

In: the quantized entry, its evaluation and measurement, those of teacher and student. Out: the folder that becomes
``dist/<recipe>/<target>/``. The gates are a pure function over what was measured (edgedistill/gates.py): a new
threshold re-packages and measures nothing. A missed gate writes no package; ``--ship-anyway`` does and records it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from edgedistill.artifact import Manifest, write_files
from edgedistill.errors import GateMissed
from edgedistill.fingerprint import Key
from edgedistill.gates import check_gates, draft_refused, miss_hint
from edgedistill.step import Context, Stage, later, unkeyed


@dataclass(frozen=True, kw_only=True)
class Package(Stage):
    """Check the gates of one target and write its package."""

    name: ClassVar[str] = "package"
    version: ClassVar[int] = 3  # 3: the manifest names what is upstream alone, the card what was noisy
    model: Key
    file: str
    evaluation: Key
    measurement: Key
    teacher: Key  # evaluation of the teacher
    student: Key | None  # evaluation of the merged full-precision student
    reference: Key | None  # the teacher's f16 GGUF: size and speed are against it
    recipe: str
    target: Mapping[str, Any]  # the profile, its name and limits included
    unproved: str  # why a limit measured here says nothing of the target, or ""
    gates: Mapping[str, Any]
    sources: tuple[Mapping[str, Any], ...]
    generation: Mapping[str, Any]
    grammar: str | None
    ship_anyway: bool
    kv_cache: Key | None = later(None)  # the types of the KV cache that are not f16 alone, and what they cost
    example: tuple[Mapping[str, Any], ...]  # one prompt's messages, for the command lines on the card
    upstream: Mapping[str, str] = unkeyed()  # step -> key, for the manifest: they follow from the fields above

    @property
    def anyway(self) -> Key:
        """The key that this package has where a build with ``--ship-anyway`` wrote it."""
        return replace(self, ship_anyway=True).key()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Decide, then write."""
        artifact = ctx.path(self.model, self.file)
        size = sum(p.stat().st_size for p in ([artifact] if artifact.is_file() else artifact.rglob("*")) if p.is_file())
        kv_cache = dict(ctx.facts(self.kv_cache)["kv_cache"]) if self.kv_cache else {}
        reference_size = ctx.path(self.reference, "model.gguf").stat().st_size if self.reference else None
        verdict = check_gates(
            gates=self.gates,
            limits=self.target["limits"],
            size=size,
            reference_size=reference_size,
            evaluation=ctx.path(self.evaluation),
            measurement=ctx.facts(self.measurement),
            teacher=ctx.path(self.teacher),
            student=ctx.path(self.student) if self.student else None,
            unproved=self.unproved,
            kv_cache=kv_cache,
        )
        if verdict.missed and not self.ship_anyway:
            raise GateMissed(
                f"{self.recipe}/{self.target['name']}: " + "; ".join(line.text() for line in verdict.missed),
                miss_hint(verdict.missed, ctx.facts(self.measurement)),
            )
        if artifact.is_file():
            _link(artifact, ctx.out / "model.gguf")
        else:
            for file in sorted(p for p in artifact.rglob("*") if p.is_file()):
                _link(file, ctx.out / "onnx" / file.relative_to(artifact))
        manifest = Manifest(
            recipe=self.recipe,
            target=dict(self.target),
            format="gguf" if artifact.is_file() else "onnx",
            keys=dict(self.upstream),
            digests={key: entry.digest for key, entry in ctx.entries.items()},
            sources=[dict(source) for source in self.sources],
            evaluation=dict(ctx.facts(self.evaluation)),
            teacher=dict(ctx.facts(self.teacher)),
            measurement=dict(ctx.facts(self.measurement)),
            gates=verdict.to_json(),
            generation=dict(self.generation),
            size=size,
            example=[dict(message) for message in self.example],
            tools=dict(ctx.entries[self.model].versions),
            draft=self.add_draft(ctx, size),
            kv_cache=kv_cache,
        )
        write_files(ctx.out, manifest, grammar=self.grammar)
        shipped = {"draft": manifest.draft} if manifest.draft else {}
        return {"gates": verdict.to_json(), "size": size, **shipped}

    def add_draft(self, ctx: Context, size: int) -> dict[str, Any]:
        """Put a draft beside the model of ``size`` bytes, where there is one that brings something; return what it brings."""
        return {}


@dataclass(frozen=True, kw_only=True)
class DraftedPackage(Package):
    """Write the package of a target that has a draft."""

    draft: Key
    drafting: Key  # what it brings, measured

    def add_draft(self, ctx: Context, size: int) -> dict[str, Any]:
        """Put the draft beside the model, unless it brings nothing."""
        file, found = ctx.path(self.draft, "model.gguf"), ctx.facts(self.drafting)
        own = file.stat().st_size
        refused = draft_refused(found["drafting"], self.target["limits"], size + own)
        if not refused:
            _link(file, ctx.out / "draft.gguf")
        digest = ctx.entries[self.draft].files["model.gguf"].sha256
        return {**found, "size": own, "digest": digest, "refused": refused, "unproved": self.unproved}


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copyfile(source, target)
