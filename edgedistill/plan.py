"""The plan: steps with their names, keys and estimates, in an order in which each follows its inputs.

A plan imports no torch and runs nothing. Two steps with one key are one step with two names.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from edgedistill.devices.host import fingerprint
from edgedistill.errors import UsageError
from edgedistill.fingerprint import Key
from edgedistill.rates import Work
from edgedistill.step import Stage
from edgedistill.target import format_size


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage bound to its inputs. ``ids`` are the names it goes by; ``memory`` and ``disk`` are estimates in bytes."""

    ids: tuple[str, ...]
    stage: Stage
    key: Key
    work: Work
    memory: int
    disk: int

    @property
    def id(self) -> str:
        """The first of its names."""
        return self.ids[0]


@dataclass
class Plan:
    """The steps in an order in which each follows its inputs."""

    identity: str
    steps: list[Step]
    warnings: list[str] = field(default_factory=list)
    packages: dict[str, Key] = field(default_factory=dict)

    @property
    def by_key(self) -> dict[Key, Step]:
        """Steps by key."""
        return {step.key: step for step in self.steps}

    def match(self, pattern: str) -> list[Step]:
        """Return the steps that a name, a stage or a glob means, the first of these that is one; raises UsageError with what there
        is.
        """
        found = [step for step in self.steps if pattern in step.ids] or [
            step
            for step in self.steps
            if step.stage.name == pattern or any(fnmatch.fnmatchcase(name, pattern) for name in step.ids)
        ]
        if not found:
            names = ", ".join(name for step in self.steps for name in step.ids)
            raise UsageError(f"no step {pattern!r} in this plan", f"steps: {names}")
        return found

    def only(self, wanted: Iterable[Step]) -> Plan:
        """Return the plan cut down to some steps and what they need."""
        keep = closure((step.key for step in wanted), self.by_key)
        return Plan(
            identity=self.identity,
            steps=[step for step in self.steps if step.key in keep],
            warnings=self.warnings,
            packages={name: key for name, key in self.packages.items() if key in keep},
        )


def closure(keys: Iterable[Key], by_key: Mapping[Key, Step]) -> set[Key]:
    """Return keys and all that is upstream of them."""
    found, todo = set[Key](), list(keys)
    while todo:
        key = todo.pop()
        if key not in found:
            found.add(key)
            todo += by_key[key].stage.inputs()
    return found


class Graph:
    """Collect steps; a second step with the same key becomes another name of the first."""

    def __init__(self) -> None:
        self._steps: dict[Key, Step] = {}

    def add(self, name: str, stage: Stage, work: Work, *, memory: float = 0, disk: float = 0) -> Key:
        """Add one step and return its key."""
        key = stage.key()
        known = self._steps.get(key)
        ids = (*known.ids, name) if known else (name,)
        self._steps[key] = Step(
            ids=tuple(dict.fromkeys(ids)), stage=stage, key=key, work=work, memory=int(memory), disk=int(disk)
        )
        return key

    def step(self, key: Key) -> Step:
        """Return one of the steps that were added."""
        return self._steps[key]

    def steps(self) -> list[Step]:
        """Return the steps in the order in which they were added."""
        return list(self._steps.values())

    def upstream(self, keys: Iterable[Key]) -> list[Step]:
        """Return the steps of these keys and all that they need, in the order in which they were added."""
        found = closure(keys, self._steps)
        return [step for step in self._steps.values() if step.key in found]


def package_version(name: str) -> str:
    """Return the installed version of a package, or "" if it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_machine(plan: Plan, hint: str = "take a smaller model, or train by LoRA instead of in full") -> None:
    """Refuse a plan that this machine, or what a container leaves of it, has not the memory for."""
    memory = fingerprint().memory_bytes
    worst = max(plan.steps, key=lambda step: step.memory)
    if memory and worst.memory > memory:  # 0: not known
        raise UsageError(
            f"{worst.id} needs about {format_size(worst.memory)} of memory; this machine has {format_size(memory)}",
            hint,
        )
