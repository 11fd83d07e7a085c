"""Run by test_trainer: train in children, killed with kill -9 at given steps, or in pairs; in folders under argv[1].

One interpreter for all runs, forked before torch starts a thread: importing takes longer than training.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

# what the trainer imports when it needs it: once here, before the forks, not in every child
import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from edgedistill.training.lora import LoraSettings
from edgedistill.training.losses import LossTerms
from edgedistill.training.settings import TrainResult
from edgedistill.training.trainer import TrainSettings, train
from tests.unit.training.tiny import make_examples, make_llama, score


def run(out: Path, method: str, *, kill_at: int | None = None, kill_in: str = "") -> TrainResult:
    model, examples = make_llama(2), make_examples(30)
    soft = score(make_llama(2, seed=1), examples)
    settings = TrainSettings(
        method=method,  # pyright: ignore[reportArgumentType]
        lora=LoraSettings(rank=2, dropout=0.1),
        lr=1e-2,
        steps=14,
        batch_size=4,
        micro_batch=3,
        loss=LossTerms(kd=0.5, ce=0.5),
        checkpoint_steps=3,
        checkpoint_seconds=1e9,
        gradient_norms=4,
    )

    def progress(done: int, total: int, note: str) -> None:
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if kill_in:
        real = os.rename if kill_in == "rename" else os.replace

        def dying(*args: str) -> None:
            if "checkpoints" in str(args[1]) or kill_in == "replace":
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        setattr(os, kill_in, dying)
    return train(model, examples, soft, settings=settings, out=out, progress=progress)


def pair(rank: int, root: Path) -> TrainResult:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
    settings = TrainSettings(method="full", lr=1e-3, steps=6, batch_size=6, dtype="float32")
    result = train(make_llama(), make_examples(), None, settings=settings, out=root / "two")
    dist.destroy_process_group()
    return result


def start(action: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        import torch

        torch.set_num_threads(1)
        try:
            action()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def child(action: Callable[[], object]) -> int:
    return os.waitpid(start(action), 0)[1]


def main(root: Path) -> None:
    pids = [start(lambda rank=rank: pair(rank, root)) for rank in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    for method in ("lora", "full"):
        assert child(lambda method=method: run(root / method / "whole", method)) == 0
        cut = root / method / "cut"
        for kill_at in (2, 5, 6, 13):
            assert child(lambda method=method, cut=cut, at=kill_at: run(cut, method, kill_at=at)) == signal.SIGKILL
        assert child(lambda method=method, cut=cut: run(cut, method)) == 0
    cut = root / "lora" / "cut in the middle of a checkpoint"
    assert child(lambda: run(cut, "lora", kill_in="rename")) == signal.SIGKILL
    assert child(lambda: run(cut, "lora", kill_at=8)) == signal.SIGKILL
    assert child(lambda: run(cut, "lora")) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
