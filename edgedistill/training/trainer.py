"""The training loop: LoRA or full, cross-entropy and distillation, exact to resume.

A loop of our own rather than transformers.Trainer, for three reasons: Trainer's checkpoints hold pickles (optimizer.pt,
rng_state.pth, training_args.bin); its resume replays the data loader and so depends on the state of a global generator,
where here batches and dropout are functions of (seed, step); and keeping the model in bf16 with float32 master weights
outside costs less on a CPU than autocast, which casts every weight again in every step.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgedistill.errors import UsageError
from edgedistill.training import curriculum
from edgedistill.training.checkpoint import State, StepLog, latest_checkpoint, load_checkpoint, save_checkpoint
from edgedistill.training.data import Example
from edgedistill.training.dense import Beside
from edgedistill.training.fast_lora import restore, speed_up
from edgedistill.training.hidden import Guide, tokens_of
from edgedistill.training.keeping import Keeper
from edgedistill.training.lora import attach
from edgedistill.training.losses import LossTerms, batch_targets, completion_loss
from edgedistill.training.machine import memory_in_use, processes
from edgedistill.training.norms import is_norm, save_norms
from edgedistill.training.on_policy import OnPolicy, chosen
from edgedistill.training.packing import causal_lm, completion_states, make_batch, packed_mode
from edgedistill.training.precision import pick_device, torch_dtype
from edgedistill.training.quiet import quiet
from edgedistill.training.settings import (
    TrainResult,
    TrainSettings,
    check_loss,
    check_settings,
    learning_rate,
    make_optimizer,
    plan_steps,
    run_digest,
    steps_per_epoch,
)
from edgedistill.training.targets import SparseTargets
from edgedistill.training.weights import Weights

if TYPE_CHECKING:
    from edgedistill.training.looks import Looks
    from edgedistill.training.quantized import QuantizedWeights

__all__ = ["Progress", "TrainResult", "TrainSettings", "train"]

Progress = Callable[[int, int, str], None]


def train(
    model: Any,
    examples: Sequence[Example],
    targets: Sequence[SparseTargets] | None,
    *,
    settings: TrainSettings,
    out: Path,
    vocab_size: int | None = None,
    guide: Guide | None = None,
    teacher: Beside | None = None,
    writer: OnPolicy | None = None,
    general: Sequence[Example] = (),
    blocks: QuantizedWeights | None = None,
    looks: Looks | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a causal LM on examples, with soft targets where ``settings.loss.kd`` is set; resume what ``out`` holds.

    Writes ``out/adapter`` (lora), ``out/model`` (full), ``out/norms`` (the norms alone), safetensors in float32, or
    ``out/weights`` (as ``blocks`` saves them), and ``out/log.jsonl``; checkpoints live in ``out/checkpoints`` until the end.
    Killed at any moment, the same call goes on from the last checkpoint and ends with the same weights (same machine and thread
    count). ``model`` is used up.
    ``vocab_size`` is the tokenizer's.
    ``guide`` holds the teacher whose hidden states are matched where ``settings.hidden`` or ``settings.features`` is set;
    ``teacher`` the one that is asked in place of ``targets``; ``writer`` how the student writes where
    ``settings.on_policy`` is set; ``general`` the rows that hold it to its start where ``settings.keep`` is set; ``blocks`` the
    quantized matrices that are trained with the method "weights"; ``looks`` keeps the best weights and says when to end.
    Raises UsageError for settings that cannot work and StepFailed when the loss is not finite or runs away.
    """
    run = _Run(model, examples, targets, settings, Path(out), vocab_size, guide, teacher, writer, general, progress)
    if (settings.method == "weights") != (blocks is not None):
        raise UsageError("the method 'weights' and the blocks of a quantized file go together")
    run.blocks, run.looks = blocks, looks
    return run.finished() or run.go()


class _Run:
    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        targets: Sequence[SparseTargets] | None,
        settings: TrainSettings,
        out: Path,
        vocab_size: int | None,
        guide: Guide | None,
        teacher: Beside | None,
        writer: OnPolicy | None,
        general: Sequence[Example],
        progress: Progress | None,
    ) -> None:
        self.device = pick_device()
        check_settings(settings, examples, targets, self.device, dense=teacher is not None)
        if settings.guided and guide is None:
            raise UsageError(
                f"{next(iter(settings.guided))} is set, but there is no teacher whose states could be matched"
            )
        self.guide = guide if settings.guided else None
        self.teacher = teacher if settings.loss.kd else None
        if settings.on_policy and writer is None:
            raise UsageError("on_policy is set, but nothing says how the student writes")
        self.writer = writer if settings.on_policy else None
        longest = max((len(one.prompt_ids) for one in examples), default=0) + settings.on_policy_tokens
        context = getattr(model.config, "max_position_embeddings", None) or longest
        if self.writer is not None and longest > context:
            raise UsageError(
                f"the longest prompt and on_policy_tokens = {settings.on_policy_tokens} make {longest} tokens, and the "
                f"student's context has {context}",
                hint="lower distill.on_policy_tokens",
            )
        self.blocks: QuantizedWeights | None = None
        self.looks: Looks | None = None
        self.model, self.examples, self.targets, self.settings = model, examples, targets, settings
        self.out, self.progress = out, progress
        self.rank, self.world = processes()
        self.plan = plan_steps(examples, settings)
        head = model.get_output_embeddings()
        self.vocab_size = vocab_size or head.weight.shape[0]
        self.keeper = None
        if settings.keep is not None:
            total = len(self.plan)
            self.keeper = Keeper(general, settings, total=total, vocab_size=self.vocab_size, folder=out)
        self.eased = steps_per_epoch(examples, settings) if settings.curriculum != "none" else 0
        self.digest = run_digest(model, examples, targets, settings, self.vocab_size, general if self.keeper else ())
        self.dtype = torch_dtype(settings.dtype, self.device)
        self.final = out / {"full": "model", "norms": "norms", "weights": "weights"}.get(settings.method, "adapter")

    def finished(self) -> TrainResult | None:
        """Return the result of a run that came to its end, or None."""
        path = self.out / "train.json"
        if not (path.exists() and self.final.is_dir()):
            return None
        data = json.loads(path.read_text())
        if data.pop("digest") != self.digest:
            raise UsageError(
                f"{self.out}: trained with other settings or data", hint=f"remove {self.out} and run again"
            )
        return TrainResult(**{**data, "path": self.final})

    def go(self) -> TrainResult:
        """Train from the last checkpoint, or from the start."""
        self._prepare()
        settings, checkpoints = self.settings, self.out / "checkpoints"
        if self.eased:  # before a checkpoint is loaded: how hard a row is, is told by the student's start
            hard = curriculum.difficulty(
                self.model,
                self.examples,
                self.targets,
                settings.curriculum,
                vocab_size=self.vocab_size,
                folder=self.out,
                digest=self.digest,
                part=(self.rank, self.world),
                progress=lambda note: self.progress and self.progress(0, len(self.plan), note),
            )
            self.plan = plan_steps(self.examples, settings, hard)
        state = State(digest=self.digest)
        found = latest_checkpoint(checkpoints)
        if found is not None:
            state = load_checkpoint(found, self.digest, self.weights.masters, self.optimizer)
        resumed_at = state.step
        self.weights.publish()
        log = StepLog(self.out / "log.jsonl", state.step) if self.rank == 0 else None
        begun = saved = time.monotonic()
        before, tokens_here = state.seconds, 0
        total = len(self.plan)
        peak = 0
        tail: list[dict[str, Any]] = []
        try:
            beside = [one.teacher for one in (self.guide, self.teacher) if one is not None and one.reads_along]
            with torch.random.fork_rng(devices=[]), packed_mode(self.model, *beside) as self.packed:
                for step in range(state.step, total):
                    if any(one is not None and one.stopped(state) for one in (self.keeper, self.looks)):
                        break
                    started = time.monotonic()
                    record = self._step(step, total)
                    now = time.monotonic()
                    tokens_here += record["tokens"]
                    state.step, state.tokens = step + 1, state.tokens + record["tokens"]
                    state.seconds = before + now - begun
                    memory = memory_in_use()
                    peak = max(peak, memory)
                    record |= {
                        "tokens_per_s": round(record["tokens"] / (now - started), 1),
                        "seconds": round(state.seconds, 3),
                        "memory": memory,
                        **({"eased": 1} if step < self.eased else {}),
                    }
                    if self.keeper is not None and self.keeper.due(step + 1):
                        record["general"] = self.keeper.look(
                            self.model, state, self.weights.masters, write=log is not None
                        )
                    if self.looks is not None and self.looks.due(step + 1):
                        record |= self.looks.look(self.model, state, self.weights.masters, write=log is not None)
                    if log is not None:
                        log.write(record)
                    check_loss(record, state, settings, eased=self.eased)
                    tail = [*tail[-9:], record]
                    if self.progress is not None:
                        left = (now - begun) / (step + 1 - resumed_at) * (total - step - 1)
                        self.progress(step + 1, total, f"loss {record['loss']:.4f}, {_duration(left)} left")
                    due = settings.checkpoint_steps and (step + 1) % settings.checkpoint_steps == 0
                    due = due or now - saved >= settings.checkpoint_seconds
                    if due and step + 1 < total and log is not None:
                        log.sync()
                        save_checkpoint(checkpoints, state, self.weights.masters, self.optimizer)
                        saved = time.monotonic()
        finally:
            if log is not None:
                log.close()
        seconds = time.monotonic() - begun
        forgotten = None
        if self.keeper is not None and self.rank == 0:
            self.keeper.restore(state, self.weights.masters)
            self.weights.publish()
            forgotten = self.keeper.report(self.model, state)
        if self.looks is not None:
            self.looks.restore(state, self.weights.masters)
        mean = {
            key: sum(one[key] for one in tail) / len(tail) if tail else float("nan") for key in ("loss", "kd", "ce")
        }
        result = TrainResult(
            path=self.final,
            method=settings.method,
            steps=state.step,
            tokens=state.tokens,
            seconds=round(state.seconds, 3),
            tokens_per_s=round(tokens_here / seconds, 1),
            **mean,
            trainable_parameters=sum(master.numel() for master in self.weights.masters.values()),
            peak_memory=peak,
            resumed_at=resumed_at,
            dtype=str(self.dtype).removeprefix("torch."),
            general=forgotten,
            best_step=state.lowest_step if self.looks is not None else None,
        )
        if self.rank == 0:
            self._finish(result)
            shutil.rmtree(checkpoints, ignore_errors=True)
            if self.keeper is not None:
                self.keeper.snapshot.unlink(missing_ok=True)
            if self.looks is not None:
                self.looks.snapshot.unlink(missing_ok=True)
            (self.out / curriculum.FILE).unlink(missing_ok=True)
        return result

    def _prepare(self) -> None:
        """Attach the adapter, choose what is trained, and take float32 masters of it."""
        settings = self.settings
        self.out.mkdir(parents=True, exist_ok=True)
        self.model.config.use_cache = False
        if settings.method in ("norms", "weights"):
            for name, parameter in self.model.named_parameters():
                of_blocks = self.blocks is not None and name in self.blocks
                parameter.requires_grad_(is_norm(name, parameter) or of_blocks)
        elif settings.method == "full":
            for parameter in self.model.parameters():
                parameter.requires_grad_(True)
            if settings.freeze_embeddings:
                self.model.get_input_embeddings().weight.requires_grad_(False)
        else:
            self.model.requires_grad_(False)
            self.model = attach(self.model, settings.lora, seed=settings.seed)
            speed_up(self.model)
        self.model.to(self.device).train()
        if self.keeper is not None:
            self.keeper.freeze(self.model)
        if self.guide is not None:
            self.guide.to(self.device, self.dtype)
            self.guide.watch(self.model)
        if self.teacher is not None:
            self.teacher.to(self.device, self.dtype)
        self.weights = Weights(
            self.model,
            self.dtype,
            full=settings.method == "full",
            blocks=self.blocks,
            beside=self.guide.parameters() if self.guide is not None else {},
        )
        self.optimizer = make_optimizer(settings, self.weights.groups(settings))
        if self.keeper is not None:
            self.keeper.begin(self.model, self.device, self.dtype)
        if self.looks is not None:
            self.looks.begin(self.model, len(self.plan))
        if settings.gradient_checkpointing:
            causal_lm(self.model).gradient_checkpointing_enable({"use_reentrant": False})

    def _step(self, step: int, total: int) -> dict[str, Any]:
        """Run one optimiser step and return its line of the log (without times)."""
        settings, rows = self.settings, self.plan[step]
        examples, own = self._examples(step)
        completion = sum(len(one.completion_ids) for one in examples.values())
        mass = sum(sum(one.token_weights) for one in examples.values()) or 1.0
        offline = sum(sum(one.token_weights) for row, one in examples.items() if row not in own) or 1.0
        tokens = sum(one.length for one in examples.values())
        size = settings.micro_batch or math.ceil(len(rows) / self.world)
        # What the student wrote has no reference: such rows are batches of their own, without cross-entropy.
        groups = [[row for row in rows if row not in own], [row for row in rows if row in own]]
        micro = [rows[at : at + size] for rows in groups for at in range(0, len(rows), size)]
        terms = settings.loss
        named = [name for name, on in (("kd", terms.kd), ("ce", terms.ce), ("features", settings.guided)) if on]
        apart = bool(
            settings.gradient_norms
            and step % settings.gradient_norms == 0
            and len(named) > 1
            and not settings.hidden
            and self.writer is None
            and self.world == 1
        )
        compared = tokens_of(list(examples.values()))
        over = {name: len(rows) if name in ("distances", "angles") else compared for name in settings.guided}
        kd = ce = 0.0
        more = dict.fromkeys(over, 0.0)
        pending: list[dict[str, torch.Tensor]] = []
        for at, part in enumerate(micro):
            if at % self.world != self.rank:
                continue
            if settings.lora.dropout and settings.method != "full":
                torch.manual_seed((settings.seed * 1_000_003 + step) * 1009 + at)
            judged = replace(terms, ce=0.0) if part[0] in own else terms
            separate = apart and {"kd", "ce"} <= set(named)
            one_kd, one_ce, sums = self._forward(part, [examples[row] for row in part], judged, separate)
            kd, ce = kd + float(one_kd.detach()), ce + float(one_ce.detach())
            for name, one in sums.items():
                more[name] += float(one.detach())
            guided: Any = sum(weight * sums[name] / over[name] for name, weight in settings.guided.items())
            if apart:
                text = {"kd": one_kd / mass, "ce": one_ce / mass} if separate else {named[0]: (one_kd + one_ce) / mass}
                parts = text | ({"features": guided} if settings.guided else {})
                parts[named[0]].backward(retain_graph=True)
                self.weights.collect()
                pending.append(parts)
            else:
                ((one_kd + one_ce) / mass + guided).backward()
                self.weights.collect()
        norms = self._norms_apart(named, pending) if apart else {}
        kept: tuple[float, ...] = ()
        if self.keeper is not None:
            part = self.rank, self.world
            kept = self.keeper.backward(self.model, step, packed=self.packed, part=part, collect=self.weights.collect)
            tokens += sum(one.length for one in self.keeper.rows(step))
        if self.world > 1:
            kd, ce, *summed = self._sum_over_processes(kd, ce, *more.values(), *kept)
            more, kept = dict(zip(more, summed, strict=False)), tuple(summed[len(more) :])
        total_norm = self.weights.norm()
        norm = float(total_norm)
        if settings.clip and math.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(list(self.weights.masters.values()), settings.clip, total_norm)
        rate = learning_rate(settings, step, total)
        more = {name: value / over[name] for name, value in more.items()}
        loss = (kd + ce) / mass + sum(weight * more[name] for name, weight in settings.guided.items()) + sum(kept)
        if math.isfinite(loss) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("times", 1.0)
            self.optimizer.step()
            self.weights.publish()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": step + 1,
            "loss": loss,
            "kd": kd / mass / terms.kd if terms.kd else 0.0,
            "ce": ce / offline / terms.ce if terms.ce else 0.0,
            **more,
            **(self.keeper.words(*kept) if self.keeper is not None else {}),
            "gradient": norm,
            **norms,
            "lr": rate,
            "tokens": tokens,
            "completion_tokens": completion,
            **({"written_rows": len(own)} if self.writer is not None else {}),
        }

    def _norms_apart(self, names: Sequence[str], pending: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Return the norm of each term's gradient. That of the first is there already; the others' are added to it."""
        norms = {f"gradient_{names[0]}": float(self.weights.norm())}
        for name in names[1:]:
            before = [None if one.grad is None else one.grad.clone() for one in self.weights.masters.values()]
            for parts in pending:
                if parts[name].requires_grad:  # a row that is computed alone has no relations
                    parts[name].backward(retain_graph=name != names[-1])
                    self.weights.collect()
            squares = 0.0
            for master, old in zip(self.weights.masters.values(), before, strict=True):
                if master.grad is not None:
                    squares += float((master.grad if old is None else master.grad - old).square().sum())
            norms[f"gradient_{name}"] = math.sqrt(squares)
        return norms

    def _examples(self, step: int) -> tuple[dict[int, Example], set[int]]:
        """Return the rows of a step with their examples, and which of them the student has just written."""
        settings, rows = self.settings, self.plan[step]
        examples = {row: self.examples[row] for row in rows}
        if self.writer is None:
            return examples, set()
        picked = chosen(settings.on_policy, settings.seed, step, list(examples.values()))
        own = [row for row, written in zip(examples, picked, strict=True) if written]
        if own:
            written = self.writer.write(
                self.model,
                [examples[row] for row in own],
                seed=settings.seed,
                step=step,
                most=settings.on_policy_tokens,
                temperature=settings.on_policy_temperature,
            )
            examples.update(zip(own, written, strict=True))
        return examples, set(own)

    def _forward(
        self, rows: Sequence[int], examples: Sequence[Example], terms: LossTerms, separate: bool
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return the sums of kd and ce over completion tokens, and those of what is compared of the hidden states."""
        batch = make_batch(examples, packed=self.packed)
        soft = None
        if self.teacher is not None:
            soft = self.teacher.targets(batch, rows, examples)
        elif self.targets is not None and terms.kd:
            soft = batch_targets([self.targets[row] for row in rows], terms.temperature)
        states = completion_states(self.model, batch)
        nothing = states.new_zeros((), dtype=torch.float32)
        sums: dict[str, torch.Tensor] = {}
        if self.guide is not None:
            also = self.teacher
            seen = also is not None and also.reads_along and also.teacher is self.guide.teacher
            sums = self.guide.sums(batch, examples, read=not seen)
        if not (terms.kd or terms.ce):
            return nothing, nothing, sums
        kd, ce = completion_loss(
            self.model,
            states,
            batch.targets.to(states.device),
            batch.weights.to(states.device),
            soft,
            terms,
            vocab_size=self.vocab_size,
            separate=separate,
        )
        return kd, ce, sums

    def _sum_over_processes(self, *sums: float) -> tuple[float, ...]:
        """Add gradients and losses of all processes: each has divided by the tokens' weights of the whole step."""
        import torch.distributed as dist

        for master in self.weights.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            dist.all_reduce(master.grad)
        together = torch.tensor(sums, dtype=torch.float64, device=self.device)
        dist.all_reduce(together)
        return tuple(together.tolist())

    def _finish(self, result: TrainResult) -> None:
        """Write the trained weights in float32 under their final name, then the result."""
        self.weights.hand_back()
        partial = self.out / "final.partial"
        shutil.rmtree(partial, ignore_errors=True)
        restore(self.model)
        if self.settings.gradient_checkpointing:
            causal_lm(self.model).gradient_checkpointing_disable()
        self.model.config.use_cache = True
        if self.blocks is not None:
            self.blocks.save(self.weights.masters, partial)
        elif self.settings.method == "norms":
            save_norms(
                {name: one for name, one in self.weights.masters.items() if name not in self.weights.beside}, partial
            )
        else:
            with quiet():
                self.model.save_pretrained(partial)
        if self.final.exists():
            shutil.rmtree(self.final)
        os.rename(partial, self.final)
        path = self.out / "train.json"
        text = json.dumps({**result.to_json(), "digest": self.digest}, indent=1)
        path.with_suffix(".partial").write_text(text)
        os.replace(path.with_suffix(".partial"), path)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
