"""What each objective is worth: one task, one student, one set of rows, the same number of student tokens, several seeds.

Every arm distils the quickstart's healed student anew: what is kept of the teacher's distributions (none: plain fine-tuning; 4,
12 or 50 draws; the best with the tail as one bucket; the best with a sampled tail; all of it), at which temperature, and by
which divergence. An arm and a seed are steps of a build (score, distill, merge, convert, evaluate) in the user's store:
cached, resumable, shared with the quickstart. (Where there is a GPU, answers and likelihoods come from transformers on it, not
from the GGUF file.) Compared are exact match on the suites, KL divergence to the teacher and
calibration (expected calibration error of the next token, 15 bins) along the references, and bytes a token of the stored targets.
Values are averaged over the seeds row by row; rows are the sample, and differences to the dense teacher are paired.

Reasons need a teacher that gives them, so their arm is a pair of its own: the packaged recipe `rationale`, against the same rows
without reasons, read twice, which are about as many student tokens.
"""

from __future__ import annotations

import argparse
import json
import re
from contextlib import closing
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from _common import cache_folder, could_not_measure, finish, machine_line, parser, say, table
from _recipe import build, entry_of, few_rows, recipe_folder

from edgedistill.data.prompts import load_rows
from edgedistill.errors import EdgeDistillError
from edgedistill.evals.likelihood import cut_alike, kl_divergence, shared_columns, token_rows
from edgedistill.evals.runners.base import Runner
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.evals.statistics import Estimate, paired_difference
from edgedistill.evals.suites import evaluate, load_answers
from edgedistill.session import Session
from edgedistill.store import Entry, Store, write_atomic

NAME = "kd_methods"
TARGET = "phone-midrange"
SUITES = ("holdout", "ood")
DENSE, DRAWS, SFT = "dense", "12 draws", "no distributions (SFT)"
STEPS = ("convert/student", "convert/teacher", "evaluate/student")  # what an arm is brought up to
GPU_STEPS = ("merge", "adapt")
BINS = 15
ARMS: dict[str, dict[str, Any]] = {
    DENSE: {"score.kind": "dense"},
    DRAWS: {"score.kind": "sampled", "score.n": 12},
    SFT: {"score.kind": "none", "distill.loss.kd": 0.0, "distill.loss.ce": 1.0},
    "4 draws": {"score.kind": "sampled", "score.n": 4},
    "50 draws": {"score.kind": "sampled", "score.n": 50},
    "top 12 + tail bucket": {"score.kind": "top-k", "score.n": 12},
    "top 8 + 4 draws": {"score.kind": "top-sampled", "score.n": 12},
    "top 2 + 1 draw": {
        "score.kind": "top-sampled",
        "score.n": 3,
    },  # about the bytes of 12 draws where few ids are likely
    "12 draws, T = 1.5": {"score.kind": "sampled", "score.n": 12, "distill.loss.temperature": 1.5},
    "12 draws, T = 2": {"score.kind": "sampled", "score.n": 12, "distill.loss.temperature": 2.0},
    "12 draws, T = 3": {"score.kind": "sampled", "score.n": 12, "distill.loss.temperature": 3.0},
    "dense, reverse KL": {"score.kind": "dense", "distill.loss.divergence": "reverse-kl"},
    "dense, JSD": {"score.kind": "dense", "distill.loss.divergence": "jsd"},
    "dense, half on-policy": {"score.kind": "dense", "distill.on_policy": 0.5},
    "12 draws, hidden states": {"score.kind": "sampled", "score.n": 12, "distill.features.weight": 1.0},
}
REASONS = "rationale"
WITH, ALONE = "with reasons", "answers alone"
REASONS_ARMS: dict[str, dict[str, Any]] = {
    WITH: {},
    ALONE: {"generate.style": "answer", "heal.epochs": 2.0, "distill.epochs": 2.0},
}


def base_overrides(folder: Path, quick: bool) -> dict[str, Any]:
    """Return what all arms change of the quickstart: no gates, no baselines; with --quick fewer rows of everything."""
    return {**(few_rows(folder, SUITES) if quick else {}), "gates": {}, "baselines": {}}


def on_gpu() -> bool:
    """Tell whether answers and likelihoods are taken with transformers on a GPU, or with llama.cpp on the CPU."""
    from edgedistill.training.precision import pick_device

    return pick_device() == "cuda"


def gpu_name() -> str:
    """Return what the GPU calls itself."""
    import torch

    return torch.cuda.get_device_name(0)


def runner_of(entry: Entry) -> Runner:
    """Open a model, full precision on a GPU and f16 in llama.cpp."""
    if on_gpu():
        from edgedistill.evals.runners.transformers import TransformersRunner

        return TransformersRunner(entry.path / "model", dtype="float32")
    return GgufRunner(entry.path / "model.gguf")


def right_answers(session: Session, student: Runner) -> dict[str, float]:
    """Return whether each answer is right, by suite and row; a build's own evaluation goes before one done here."""
    evaluated = session.plan.match("evaluate/student")[0].key
    found: dict[str, float] = {}
    for suite in SUITES:
        if (entry := Store(session.store.root).load(evaluated)) is not None:
            answers = load_answers(entry.path / "answers" / f"{suite}.jsonl")
        else:
            one = session.recipe.suites[suite]
            rows = [row for file in one.files for row in load_rows(session.path.parent / file, need_reference=True)]
            answers = evaluate(student, rows, one.metric, max_new_tokens=one.max_new_tokens).rows
        found |= {f"{suite} {row.id}": row.score for row in answers}
    return found


def judge(session: Session, rows: int) -> dict[str, Any]:
    """Return which answers are right, per row the KL divergence to the teacher, per token confidence and hit.

    It is kept beside the bench.
    """
    of_student, of_teacher = (entry_of(session, step) for step in (GPU_STEPS if on_gpu() else STEPS)[:2])
    kept = cache_folder(NAME) / "judged" / f"{of_student.digest[:24]}-{of_teacher.digest[:24]}-{rows}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    some = load_rows(session.path.parent / "data" / "holdout.jsonl", need_reference=True)[:rows]
    found: dict[str, Any] = {"kl": [], "confidence": [], "hit": []}
    with closing(runner_of(of_student)) as student, closing(runner_of(of_teacher)) as teacher:
        found["right"] = right_answers(session, student)
        own, other = token_rows(student, some), token_rows(teacher, some)
        columns = shared_columns(student, own, teacher, other)
        alike = [at for at in range(len(own)) if cut_alike(own[at], other[at], columns)]
        own, other = [own[at] for at in alike], [other[at] for at in alike]
        pairs = zip(
            own,
            teacher.logprobs([one.ids for one in other], [one.positions for one in other]),
            student.logprobs([one.ids for one in own], [one.positions for one in own]),
            strict=True,
        )
        for row, p, q in pairs:
            found["kl"].append(float(kl_divergence(p, q, columns=columns)[0].mean()))
            found["confidence"] += np.exp(q.max(axis=1)).tolist()
            found["hit"] += (q.argmax(axis=1) == np.asarray(row.ids[row.start :])).astype(int).tolist()
    kept.parent.mkdir(exist_ok=True)
    write_atomic(kept, json.dumps(found))
    return found


def measure_reasons(arm: str, seed: int) -> dict[str, Any]:
    """Return which answers are right of a student that learns reasons, too, or reads the answers alone twice, and the tokens that
    it was distilled on.
    """
    folder = recipe_folder(NAME, REASONS, recipe=REASONS)
    common = {"gates": {}, "baselines": {}, "compare": {}, "distill.seed": seed}
    step = "merge" if on_gpu() else "evaluate/student"
    session = build(folder, [step], targets=[TARGET], overrides={**common, **REASONS_ARMS[arm]})
    if on_gpu():
        with closing(runner_of(entry_of(session, step))) as student:
            right = right_answers(session, student)
    else:
        answers = entry_of(session, step).path / "answers"
        right = {f"{suite} {one.id}": one.score for suite in SUITES for one in load_answers(answers / f"{suite}.jsonl")}
    return {
        "right": right,
        "tokens": entry_of(session, "distill/1").facts["train"]["tokens"],
        "machine": machine_line(**({"GPU": gpu_name()} if on_gpu() else {})),
    }


def compare_reasons(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the exact matches of both students, averaged over seeds row by row, their paired difference, and their tokens."""
    names = sorted(found[WITH][0]["right"])
    means = {arm: [mean(one["right"][name] for one in some) for name in names] for arm, some in found.items()}
    return {
        **{f"{arm}_tokens": some[0]["tokens"] for arm, some in found.items()},
        **{arm: mean(values) for arm, values in means.items()},
        "difference": paired_difference(means[WITH], means[ALONE]),
    }


def calibration_error(confidence: list[float], hit: list[int]) -> float:
    """Return the expected calibration error: |accuracy - confidence| in bins of confidence, weighted by their tokens."""
    sure, right = np.asarray(confidence), np.asarray(hit, dtype=float)
    places = np.minimum((sure * BINS).astype(int), BINS - 1)
    size = np.bincount(places, minlength=BINS)
    gaps = np.abs(np.bincount(places, sure - right, BINS))
    return float(gaps.sum() / size.sum())


def measure(session: Session, rows: int) -> dict[str, Any]:
    """Return what one arm and seed came to."""
    stored = any(step.stage.name == "score" for step in session.plan.steps)
    return {
        **judge(session, rows),
        "machine": machine_line(**({"GPU": gpu_name()} if on_gpu() else {})),
        "bytes": entry_of(session, "score").facts["bytes_per_token"] if stored else None,
        "tokens": entry_of(session, "distill/1").facts["train"]["tokens"],
    }


def average(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Average seeds row by row."""
    return {
        "right": {name: mean(one["right"][name] for one in found) for name in found[0]["right"]},
        "kl": [mean(values) for values in zip(*(one["kl"] for one in found), strict=True)],
        "ece": [calibration_error(one["confidence"], one["hit"]) for one in found],
        "bytes": found[0]["bytes"],
        "tokens": found[0]["tokens"],
        "machines": [one["machine"] for one in found],
    }


def against(own: dict[str, Any], dense: dict[str, Any]) -> dict[str, Estimate]:
    """Return the paired differences to the dense arm."""
    names = sorted(own["right"])
    return {
        "right": paired_difference([own["right"][name] for name in names], [dense["right"][name] for name in names]),
        "kl": paired_difference(own["kl"], dense["kl"]),
    }


def share(text: str) -> tuple[int, int]:
    """Read "2/6": the second of six shares."""
    at, count = (int(part) for part in text.split("/"))
    if not 1 <= at <= count:
        raise ValueError(text)
    return at, count


def interval(one: Estimate, digits: int) -> str:
    """Write a difference with its interval."""
    return f"{one.value:+.{digits}f} [{one.low:+.{digits}f}, {one.high:+.{digits}f}]"


def kept_file(folder: Path, seed: int, arm: str) -> Path:
    """Return where what one arm and seed came to is kept."""
    return folder / f"{seed}-{re.sub(r'[^a-z0-9.]+', '-', arm.lower()).strip('-')}.json"


def read_measured(folder: Path, arms: list[str], seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Return what other runs kept in ``folder``, of the arms whose every seed is there; says which are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        files = [kept_file(folder, seed, arm) for seed in range(seeds)]
        if missing := [file.name for file in files if not file.is_file()]:
            say(f"{arm}: left out, {folder} has no {', '.join(missing)}")
            continue
        found[arm] = [json.loads(file.read_text()) for file in files]
    if absent := [arm for arm in (DENSE, DRAWS) if arm not in found]:
        could_not_measure(NAME, f"{folder} lacks {', '.join(absent)}")
    return found


def build_arms(given: argparse.Namespace, arms: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Build and measure every arm for every seed, or this process's share of them; each is kept for ``--measured``."""
    part = "quick" if given.quick else "full"
    folder, kept = recipe_folder(NAME, part), cache_folder(NAME) / "measured" / part
    kept.mkdir(parents=True, exist_ok=True)
    common = base_overrides(folder, given.quick)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    work = [(seed, arm) for seed in range(given.seeds) for arm in arms]
    for seed, arm in work if given.share is None else work[given.share[0] - 1 :: given.share[1]]:
        say(f"seed {seed}, {arm}")
        if arm in REASONS_ARMS:
            found[arm].append(measure_reasons(arm, seed))
        else:
            overrides = {**common, **ARMS[arm], "distill.seed": seed}
            session = build(folder, GPU_STEPS if on_gpu() else STEPS, targets=[TARGET], overrides=overrides)
            found[arm].append(measure(session, 12 if given.quick else 160))
        write_atomic(kept_file(kept, seed, arm), json.dumps(found[arm][-1]))
    return found


def main() -> None:
    """Build every arm for every seed, and print the comparison."""
    options = parser(__doc__ or "", quick="three arms, one seed, 24 rows to learn from and 24 to score")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument(
        "--arms",
        nargs="+",
        choices=[*ARMS, REASONS],
        default=[*ARMS, REASONS],
        help="dense and 12 draws always run",
    )
    options.add_argument(
        "--share",
        metavar="I/N",
        type=share,
        help="build every N-th arm and seed from the I-th on, and print no table: for N processes over one store",
    )
    options.add_argument(
        "--measured",
        metavar="FOLDER",
        type=Path,
        help="build nothing: print the table of what other runs, on another machine say, have kept in this folder",
    )
    given = options.parse_args()
    if given.quick:
        given.seeds, given.arms = 1, [DENSE, DRAWS, SFT]  # and no reasons: their teacher is one more
    arms = [arm for arm in ARMS if arm in {DENSE, DRAWS, *given.arms}] + [
        *(REASONS_ARMS if REASONS in given.arms else [])
    ]
    if given.measured is not None:
        found = read_measured(given.measured, arms, given.seeds)
    else:
        try:
            found = build_arms(given, arms)
            if given.share is not None:
                say(f"share {given.share[0]} of {given.share[1]} is built; without --share the table is printed")
                return
        except EdgeDistillError as error:
            could_not_measure(NAME, str(error))
    of_reasons = {arm: found.pop(arm) for arm in REASONS_ARMS if arm in found}
    reasons = compare_reasons(of_reasons) if len(of_reasons) == len(REASONS_ARMS) else None
    every = {arm: average(some) for arm, some in found.items()}
    differences = {arm: against(one, every[DENSE]) for arm, one in every.items()}
    n, n_kl = len(every[DENSE]["right"]), len(every[DENSE]["kl"])
    table(
        f"{given.seeds} seeds; exact match over n = {n} answers, KL over n = {n_kl} rows; differences to dense",
        ["arm", "exact", "difference", "KL, nats/token", "difference", "ECE", "bytes/token"],
        [
            [
                arm,
                f"{mean(one['right'].values()):.4f}",
                "" if arm == DENSE else interval(differences[arm]["right"], 4),
                f"{mean(one['kl']):.4f}",
                "" if arm == DENSE else interval(differences[arm]["kl"], 4),
                f"{mean(one['ece']):.4f}",
                "" if one["bytes"] is None else f"{one['bytes']:.1f}",
            ]
            for arm, one in every.items()
        ],
    )
    if reasons is not None:
        table(
            f"recipe {REASONS}, {given.seeds} seeds; exact match over n = {reasons['difference'].n} answers",
            ["arm", "exact", "difference", "student tokens"],
            [
                ["answers alone, read twice", f"{reasons[ALONE]:.4f}", "", str(reasons[f"{ALONE}_tokens"])],
                [
                    "answers, and reasons when asked",
                    f"{reasons[WITH]:.4f}",
                    interval(reasons["difference"], 4),
                    str(reasons[f"{WITH}_tokens"]),
                ],
            ],
        )
    print(f"\nstudent tokens of every arm: {', '.join(sorted({str(one['tokens']) for one in every.values()}))}")
    for machine in sorted({machine.split("; load")[0] for one in every.values() for machine in one["machines"]}):
        print(machine)
    of_draws = differences[DRAWS]
    finish(
        name=NAME,
        ours=round(mean(every[DRAWS]["right"].values()), 4),
        peer=round(mean(every[DENSE]["right"].values()), 4),
        ratio=round(mean(every[DRAWS]["kl"]) / mean(every[DENSE]["kl"]), 4),
        unit="exact match; the ratio is that of the KL to the teacher",
        n=n,
        wanted="12 draws within noise of dense: the intervals of both differences reach 0",
        holds=of_draws["right"].low <= 0 <= of_draws["right"].high and of_draws["kl"].low <= 0 <= of_draws["kl"].high,
        seeds=given.seeds,
        arms={
            arm: {
                "exact": mean(one["right"].values()),
                "kl": mean(one["kl"]),
                "ece": mean(one["ece"]),
                "bytes_per_token": one["bytes"],
                **{f"{key}_difference": value.to_json() for key, value in differences[arm].items()},
            }
            for arm, one in every.items()
        },
        reasons=None if reasons is None else {**reasons, "difference": reasons["difference"].to_json()},
        quick=given.quick,
    )


if __name__ == "__main__":
    main()
