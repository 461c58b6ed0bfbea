"""A loss never waits for the device: on the meta device, reading a value is an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pipeline.objectives import create_objective
from tests.engines import batches, stage_recipe

META = torch.device("meta")


class Waits(TorchFunctionMode):
    """Record blocking copies from the host: they would wait until the device has done all earlier work."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device == META and not (kwargs or {}).get("non_blocking"):
            sent = function in (Tensor.to, Tensor.copy_) and any(
                isinstance(a, Tensor) and a.device != META for a in args
            )
            if sent or function in (torch.tensor, torch.as_tensor, Tensor.cuda):
                self.copies.append(f"{function.__name__} of {tuple(result.shape)}")
        return result


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_loss_does_not_wait_for_the_device(stage):
    changes = {"data": {"erase_probability": 1.0}} if stage == "finetune" else {}
    recipe = stage_recipe(stage, "ddp", **changes)
    objective = create_objective(recipe, seed=0)
    with META:
        model = objective.build_model()
    batch, inputs = batches(recipe, 0)[0].to(META), []
    model.register_forward_pre_hook(lambda _, *arguments: inputs.extend(tree_leaves(arguments)), with_kwargs=True)
    with Waits() as waits:
        objective.loss(model, batch, 0)
    assert waits.copies == []
    # FSDP moves every tensor argument of the model to the GPU, so a tensor for the CPU would have to come back.
    assert {value.device for value in inputs if isinstance(value, Tensor)} == {META}
