"""How `cifar10.py` trains: recipes by name, and what identifies one trained network."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """An optimizer under a one-cycle schedule.

    Attributes:
        optimizer: ``"sgd"``, with Nesterov momentum of 0.9, or ``"adamw"``.
        peak_rate: the largest learning rate.
        warm_up: share of the training until it is reached.
        batch_size: images of a step; what is left over of an epoch waits for the next.
        weight_decay: of the weights of layers alone: not of biases, norms and positions.
        label_smoothing: 0 for none.
    """

    optimizer: str
    peak_rate: float
    warm_up: float = 0.2
    batch_size: int = 128
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0

    @staticmethod
    def of(spec: str) -> Recipe:
        """Read a recipe: its name, and what to change of it, as in ``sgd,batch_size=512,peak_rate=0.4``.

        Raises:
            ValueError: if there is no such recipe, nothing in it to change by that name, or no image in a batch.
        """
        name, *changes = spec.split(",")
        if name not in RECIPES:
            raise ValueError(f"a recipe begins with one of {', '.join(RECIPES)}, got {spec!r}.")
        numbers = {one.name: int if one.name == "batch_size" else float for one in fields(Recipe)[1:]}
        changed: dict[str, Any] = {}
        for change in changes:
            field, _, value = change.partition("=")
            if field not in numbers:
                raise ValueError(f"a recipe has {', '.join(numbers)} to change, got {change!r} in {spec!r}.")
            changed[field] = numbers[field](value)
        recipe = replace(RECIPES[name], **changed)
        if recipe.batch_size < 1:
            raise ValueError(f"the batch_size of a recipe must be at least 1, got {recipe.batch_size} in {spec!r}.")
        return recipe

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer of a model, with weight decay on the weights of layers alone."""
        decayed, others = [], []
        for name, parameter in model.named_parameters():
            is_weight = parameter.ndim > 1 and name.rpartition(".")[2] == "weight"
            (decayed if is_weight else others).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.peak_rate)
        return torch.optim.SGD(groups, lr=self.peak_rate, momentum=0.9, nesterov=True)

    def make_schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
        """Make the schedule of the learning rate over so many steps."""
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.peak_rate, total_steps=steps, pct_start=self.warm_up, cycle_momentum=False
        )


RECIPES = {
    "sgd": Recipe("sgd", peak_rate=0.2),
    "sgd_label_smoothing": Recipe("sgd", peak_rate=0.2, label_smoothing=0.1),
    "sgd_large_batch": Recipe("sgd", peak_rate=0.4, batch_size=512),
    "adamw": Recipe("adamw", peak_rate=1e-3, weight_decay=0.05, label_smoothing=0.1),
}


@dataclass(frozen=True)
class Run:
    """What identifies a trained network: all that its training depends on.

    Attributes:
        network: a name of ``testbed.cifar_networks.ARCHITECTURES``.
        width: of the network.
        epochs: of the training.
        recipe: as ``Recipe.of`` reads it.
        penalty: the name of a candidate.
        strength: of the penalty.
        seed: of the initial weights, and of the order and the crops of the images.
        data: ``"jpeg"`` or ``"original"``.
        dtype: in which the network computes while it trains: ``"bfloat16"`` (autocast) or ``"float32"``.
        train_images: how many it is trained on.
    """

    network: str
    width: int
    epochs: int
    recipe: str
    penalty: str
    strength: float
    seed: int
    data: str
    dtype: str
    train_images: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return "-".join(f"w{value}" if key == "width" else f"{value}" for key, value in asdict(self).items())
