"""The runner: nothing twice, damage rebuilt, failures contained, interrupted work resumed, reasons told."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from edgedistill.errors import StepFailed
from edgedistill.fingerprint import Key
from edgedistill.plan import Graph, Plan, Step
from edgedistill.rates import Rates, Work
from edgedistill.runner import Reporter, Runner, assess, worst
from edgedistill.step import Context, Stage, unkeyed
from edgedistill.store import Entry, Store, write_atomic

RUNS: list[str] = []
WORK = Work(kind="bytes", amount=1)


@dataclass(frozen=True, kw_only=True)
class Source(Stage):
    name: ClassVar[str] = "source"
    text: str
    note: str = unkeyed(default="")

    def run(self, ctx: Context) -> Mapping[str, Any]:
        RUNS.append(f"source {self.text}")
        (ctx.out / "text").write_text(self.text.lower())
        return {"length": len(self.text)}


@dataclass(frozen=True, kw_only=True)
class Double(Stage):
    name: ClassVar[str] = "double"
    source: Key
    times: int = 2
    error: str = unkeyed(default="")

    def run(self, ctx: Context) -> Mapping[str, Any]:
        RUNS.append("double")
        if self.error == "step":
            raise StepFailed("it broke", "mend it")
        if self.error == "bug":
            raise ValueError("surprise")
        if self.error == "disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        (ctx.work / "seen").write_text("x")
        (ctx.out / "text").write_text(ctx.path(self.source, "text").read_text() * self.times)
        return {}


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def make(text: str = "Ab", times: int = 2, error: str = "", note: str = "") -> Plan:
    graph = Graph()
    source = graph.add("source", Source(text=text, note=note), WORK)
    graph.add("double", Double(source=source, times=times, error=error), WORK)
    graph.add("other", Double(source=source, times=3), WORK)
    return Plan(identity="test", steps=graph.steps())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    RUNS.clear()
    return Store(tmp_path / "store")


def build(plan: Plan, store: Store, reporter: Reporter | None = None, **options: Any) -> Any:
    RUNS.clear()
    return Runner(plan, Store(store.root), reporter).build(**options)


def loaded(store: Store, key: Key) -> Entry:
    entry = Store(store.root).load(key)
    assert entry is not None
    return entry


def text_of(plan: Plan, store: Store, step: str) -> str:
    return (loaded(store, plan.match(step)[0].key).path / "text").read_text()


def test_a_second_build_runs_nothing(store: Store) -> None:
    assert build(make(), store).ran == ["source", "double", "other"]
    again = build(make(), store)
    assert (again.ran, again.cached, RUNS) == ([], ["source", "double", "other"], [])
    assert text_of(make(), store, "double") == "abab"


def test_what_is_not_keyed_changes_nothing(store: Store) -> None:
    build(make(), store)
    assert build(make(note="another path"), store).ran == []


def test_a_changed_field_runs_its_step_and_what_follows_and_says_so(store: Store) -> None:
    build(make(), store)
    verdicts = assess(make(times=4), store)
    reasons = {make(times=4).by_key[key].id: verdict.reason for key, verdict in verdicts.items()}
    assert reasons == {"source": "", "double": "times 2 -> 4", "other": ""}
    assert build(make(times=4), store).ran == ["double"]
    changed = make(text="cd")
    reasons = {changed.by_key[key].id: verdict.reason for key, verdict in assess(changed, store).items()}
    assert reasons == {"source": "text Ab -> cd", "double": "times 4 -> 2", "other": "source changed"}


def test_an_input_rebuilt_with_the_same_bytes_keeps_its_descendants(store: Store) -> None:
    build(make(), store)
    store.discard(make().match("source")[0].key)
    assert assess(make(), Store(store.root))[make().match("double")[0].key].status == "wait"
    assert build(make(), store).ran == ["source"]


def test_an_input_with_other_bytes_rebuilds_them(store: Store) -> None:
    build(make(), store)
    entry = store.load(make().match("source")[0].key)
    assert entry is not None
    store.discard(entry.key)
    out, _ = store.partial(entry.key, {})
    (out / "text").write_text("zz")
    store.commit(entry.key, stage="source", inputs={}, fields={}, facts={}, seconds=0, versions={})
    assert build(make(), store).ran == ["double", "other"]
    assert text_of(make(), store, "double") == "zzzz"


def test_force_runs_one_step(store: Store) -> None:
    build(make(), store)
    assert build(make(), store, force=["double"]).ran == ["double"]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_damaged_entry_is_rebuilt_and_the_build_says_so(store: Store, quiet: bool) -> None:
    build(make(), store)
    entry = store.load(make().match("source")[0].key)
    assert entry is not None
    file = entry.path / "text"
    stat = file.stat()
    file.write_text("xx")
    if quiet:  # size and mtime as before: found only when a step consumes it
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        store.discard(make().match("double")[0].key)
    else:
        os.utime(file, ns=(1, 1))
    notes = Notes()
    outcome = build(make(), store, notes)
    assert "source" in outcome.ran
    assert any("source" in note and "damaged" in note for note in notes.notes)
    assert text_of(make(), store, "double") == "abab"


@pytest.mark.parametrize(
    ("error", "code", "message"), [("step", 3, "it broke"), ("bug", 1, "surprise"), ("disk", 3, "disk of .* is full")]
)
def test_a_failure_is_told_once_not_cached_and_loses_no_other_step(
    store: Store, error: str, code: int, message: str
) -> None:
    outcome = build(make(error=error), store)
    assert outcome.ran == ["source", "other"]
    assert outcome.exit_code == code
    with pytest.raises(type(outcome.failed["double"]), match=message):
        raise outcome.failed["double"]
    assert build(make(), store).ran == ["double"]


def test_steps_after_a_failure_are_skipped(store: Store) -> None:
    graph = Graph()
    source = graph.add("source", Source(text="a"), WORK)
    bad = graph.add("bad", Double(source=source, error="step"), WORK)
    graph.add("after", Double(source=bad), WORK)
    outcome = build(Plan(identity="x", steps=graph.steps()), store)
    assert (outcome.skipped, list(outcome.failed)) == (["after"], ["bad"])


def test_work_of_an_interrupted_step_is_still_there(store: Store) -> None:
    plan = make()
    build(plan, store)
    step = plan.match("double")[0]
    key, inputs = step.key, {one: loaded(store, one).digest for one in step.stage.inputs()}
    store.discard(key)
    assert "gone" in assess(plan, store)[key].reason
    _, work = store.partial(key, inputs)
    (work / "checkpoint").write_text("half")
    assert "goes on" in assess(plan, store)[key].reason
    out, again = store.partial(key, inputs)
    assert (again / "checkpoint").read_text() == "half"
    assert not any(out.iterdir())


def test_work_on_other_bytes_is_begun_anew(store: Store) -> None:
    """A teacher trained again is another one: what was half done with the first must not go on with the second."""
    plan = make()
    build(plan, store)
    step = plan.match("double")[0]
    inputs = {one: loaded(store, one).digest for one in step.stage.inputs()}
    store.discard(step.key)
    _, work = store.partial(step.key, dict.fromkeys(inputs, "of before"))
    (work / "checkpoint").write_text("half")
    assert "goes on" not in assess(plan, store)[step.key].reason
    _, again = store.partial(step.key, inputs)
    assert not any(again.iterdir())


def test_a_step_that_needs_more_disk_than_there_is_says_so(store: Store) -> None:
    graph = Graph()
    graph.add("big", Source(text="a"), WORK, disk=10**18)
    outcome = build(Plan(identity="x", steps=graph.steps()), store)
    with pytest.raises(StepFailed, match="MiB of disk"):
        raise outcome.failed["big"]


def test_two_names_of_one_key_are_one_step(store: Store) -> None:
    graph = Graph()
    graph.add("one", Source(text="a"), WORK)
    graph.add("two", Source(text="a"), WORK)
    plan = Plan(identity="x", steps=graph.steps())
    assert [step.ids for step in plan.steps] == [("one", "two")]
    assert build(plan, store).ran == ["one"]
    assert plan.match("two") == plan.match("one")


def test_only_keeps_what_a_step_needs() -> None:
    plan = make()
    assert [step.id for step in plan.only(plan.match("other")).steps] == ["source", "other"]


def test_an_unknown_step_lists_what_there_is() -> None:
    from edgedistill.errors import UsageError

    with pytest.raises(UsageError, match="no step 'bogus'") as caught:
        make().match("bogus")
    assert "double" in caught.value.hint


def test_rates_are_learnt(tmp_path: Path) -> None:
    rates = Rates(tmp_path)
    rates.learn(Work(kind="decode", amount=1000), 2.0)
    assert Rates(tmp_path).seconds(Work(kind="decode", amount=500)) == pytest.approx(1.0)
    rates.learn(Work(kind="decode", amount=1e9), 0.01)  # too short to say anything
    assert Rates(tmp_path).seconds(Work(kind="decode", amount=500)) == pytest.approx(1.0)


def test_a_step_that_another_build_made_while_the_inputs_were_read_is_not_run_again(store: Store) -> None:
    class Slow(Runner):
        raced = False

        def _check_inputs(self, step: Step) -> None:
            super()._check_inputs(step)
            if step.id == "double" and not self.raced:
                self.raced = True
                Runner(make(), Store(store.root)).build()

    outcome = Slow(make(), Store(store.root)).build()
    assert RUNS.count("double") == 2  # double and other, once each
    assert outcome.ran == ["source"] and outcome.cached == ["double", "other"]


def test_a_disk_that_fills_up_while_an_entry_is_written_is_told_of(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        if path.name == "entry.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomic(path, text)

    monkeypatch.setattr("edgedistill.store.write_atomic", full)
    outcome = build(make(), store)
    with pytest.raises(StepFailed, match="is full"):
        raise outcome.failed["source"]


def _safetensors() -> None:
    from safetensors import SafetensorError

    # as on a full tmpfs; a test on /dev/full would put a file in its place
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def _numpy() -> None:
    import numpy as np

    with Path("/dev/full").open("wb") as file:
        np.zeros(1 << 16).tofile(file)


def _too_much() -> None:
    import torch

    torch.empty(1 << 55)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [(_safetensors, "is full"), (_numpy, "is full"), (_too_much, "out of memory")],
)
def test_libraries_say_in_words_of_their_own_that_a_disk_or_the_memory_is_full(
    store: Store, monkeypatch: pytest.MonkeyPatch, trouble: Callable[[], None], message: str
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Troubled(Source):
        def run(self, ctx: Context) -> Mapping[str, Any]:
            trouble()
            return {}

    if trouble is _numpy:
        monkeypatch.setattr("edgedistill.runner.FULL", 1 << 62)  # no disk has more left than that
    graph = Graph()
    graph.add("troubled", Troubled(text="a"), WORK)
    outcome = build(Plan(identity="x", steps=graph.steps()), store)
    with pytest.raises(StepFailed, match=message) as caught:
        raise outcome.failed["troubled"]
    assert caught.value.hint and outcome.exit_code == 3


def test_torch_computes_with_the_threads_that_were_asked_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    @dataclass(frozen=True, kw_only=True)
    class Count(Source):
        def run(self, ctx: Context) -> Mapping[str, Any]:
            return {"threads": torch.get_num_threads()}

    before = torch.get_num_threads()
    monkeypatch.setattr("edgedistill.runner.usable_cores", lambda: 3)
    try:
        for asked, got in ((1, 1), (2, 2), (64, 3)):  # no two on one core
            graph = Graph()
            key = graph.add("count", Count(text=str(asked)), WORK)
            Runner(Plan(identity="x", steps=graph.steps()), store, threads=asked).build()
            assert loaded(store, key).facts["threads"] == got
            assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


def test_a_failure_names_its_step_and_keeps_its_kind(store: Store) -> None:
    outcome = build(make(error="step"), store)
    assert outcome.failed["double"].message == "double: it broke" == str(outcome.failed["double"])
    assert outcome.failed["double"].hint == "mend it"


@pytest.mark.parametrize("facts", [{"from_store": 99}, {"waited": 7.5}, {"reused": True}, {}])
def test_a_step_that_found_a_part_of_its_work_done_teaches_no_rate(
    store: Store, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any]
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Part(Source):
        def run(self, ctx: Context) -> Mapping[str, Any]:
            return {**super().run(ctx), **facts}

    learnt: list[Work] = []
    monkeypatch.setattr(Rates, "learn", lambda self, work, seconds: learnt.append(work))
    graph = Graph()
    graph.add("part", Part(text="a"), WORK)
    if not facts:  # then a part lies in its work
        _, work = store.partial(graph.steps()[0].key, {})
        (work / "shard").write_text("half")
    build(Plan(identity="part", steps=graph.steps()), store)
    assert learnt == []
    graph = Graph()
    graph.add("whole", Source(text="b"), WORK)
    build(Plan(identity="whole", steps=graph.steps()), store)
    assert learnt == [WORK]


def test_the_worst_of_several_exit_codes_is_no_maximum() -> None:
    assert [worst(codes) for codes in ([], [0, 4], [4, 2], [2, 3], [3, 1, 0])] == [0, 4, 2, 3, 1]
