"""What an adapter's folder holds must not depend on where it was trained."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from edgedistill.recipe_base import Training
from edgedistill.recipe_distill import Distill, Keep
from edgedistill.recipe_tune import Tune
from edgedistill.training.recipe import strip_adapter, train_settings
from edgedistill.training.settings import LATER, KeepSettings, TrainSettings


def test_an_adapter_names_no_path_of_this_machine(tmp_path: Path) -> None:
    found = []
    for name, order in (("one", ["q_proj", "k_proj"]), ("two", ["k_proj", "q_proj"])):
        folder = tmp_path / name
        folder.mkdir()
        config = {"base_model_name_or_path": str(folder), "target_modules": order, "r": 4}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "README.md").write_text(f"base_model: {folder}")
        strip_adapter(folder)
        found.append({path.name: path.read_text() for path in folder.iterdir()})
    assert found[0] == found[1]
    assert json.loads(found[0]["adapter_config.json"])["target_modules"] == ["k_proj", "q_proj"]


def test_accumulation_cuts_a_batch_and_leaves_the_step_what_it_was() -> None:
    table = {
        "method": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear"}, "lr": 1e-3,
        "epochs": 1.0, "batch_size": 10, "accumulate": 4, "schedule": "cosine", "warmup": 0.1, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "beta2": 0.95,
    }  # fmt: skip
    settings = train_settings(
        table, seed=0, loss={"kd": 0.7, "ce": 0.3, "temperature": 2.0, "divergence": "forward-kl"}
    )
    assert (settings.batch_size, settings.micro_batch) == (10, 3)
    assert (settings.beta2, settings.hidden) == (0.95, 0.0)
    assert (settings.loss.kd, settings.loss.temperature) == (0.7, 2.0)


def test_what_a_key_leaves_out_is_what_the_trainer_does_without_it() -> None:
    """Settings that came later are not in a key at the recipe's default: the trainer's own has to be the same."""
    fields = {**Tune.model_fields, **Training.model_fields, **Distill.model_fields}
    assert {name: fields[name].default for name in LATER} == {name: getattr(TrainSettings, name) for name in LATER}
    general = asdict(KeepSettings())
    assert {name: Keep.model_fields[name].default for name in general} == general
