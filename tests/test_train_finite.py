"""Numbers that are not finite end a run before a checkpoint could hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import Workplace, read_json

from train.run import COMPLETE
from train.sft_trainer import LoraTrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"))


def whole_steps(run: Path) -> list[int]:
    return sorted(int(path.parent.name[11:]) for path in run.glob(f"checkpoints/*/{COMPLETE}"))


def check_refused(run: Path, told: str) -> None:
    error = read_json(run / "error.json")
    assert error["code"] == "loss_not_finite"
    assert told in error["message"]
    assert not (run / "result.json").exists()


def test_a_gradient(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LoraTrainer.compute_loss

    def steep(self: LoraTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = whole(self, model, *args, **kwargs)
        weight = next(one for one in model.parameters() if one.requires_grad)
        # Finite, with the derivative 0 * inf.
        return loss + torch.sqrt(0 * weight.sum()) if self.state.global_step == 2 else loss

    monkeypatch.setattr(LoraTrainer, "compute_loss", steep)
    status, run = place.run("gradient", n_checkpoints=6)
    assert status == 1
    check_refused(run, "The length of the gradient is nan at step 3")
    assert "the step's rows were lines " in read_json(run / "error.json")["message"]
    assert whole_steps(run) == [1, 2]


def test_a_weight(place: Workplace) -> None:
    status, run = place.run("weight", learning_rate=1e39, warmup_fraction=0, n_checkpoints=6)
    assert status == 1
    check_refused(run, "The largest number of base_model.")  # float32 ends at 3e38
    assert whole_steps(run) == []


def test_a_validation_loss(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = torch.full((3,), float("nan"), dtype=torch.float64)
    monkeypatch.setattr(LoraTrainer, "_sums", lambda *_: nan)
    status, run = place.run("valid", validation_fraction=0.25, n_evals=1, n_checkpoints=2)
    assert status == 1
    check_refused(run, "The validation loss is nan at step 6")
    assert whole_steps(run) == [3]
