"""What people do to a model and its optimizers between two steps, done to two equal models alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim import Adam

from tests.support.wrapped import Halved, Sinh

if TYPE_CHECKING:
    from tests.support.random.trainings import Training


def load_weights_by_assignment(training: Training) -> None:
    def load(model: nn.Module) -> None:
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)

    training.both(load)
    training.renew_optimizers()


def freeze_or_unfreeze(training: Training) -> None:
    name = _any_name(training)

    def turn(model: nn.Module) -> None:
        parameter = model.get_parameter(name)
        parameter.requires_grad_(not parameter.requires_grad)

    training.both(turn)


def halve_the_precision_of_a_module(training: Training) -> None:
    number = training.draw.randrange(len(training.model))
    training.both(lambda model: model[number].float())
    training.tolerance = 1e-4
    _renew_adams(training)


def double_the_precision(training: Training) -> None:
    training.both(lambda model: model.double())
    _renew_adams(training)


def prune_a_weight(training: Training) -> None:
    """One in five is taken out of a matrix; nothing yet of a bias."""
    module, names = _plain_names(training)
    if names:
        name = training.draw.choice(names)
        shape = getattr(training.model[module], name).shape
        kept = torch.rand(shape, generator=training.noise) > (0.2 if len(shape) == 2 else -1)
        training.both(lambda model: prune.custom_from_mask(model[module], name, kept))


def prune_nothing_yet(training: Training) -> None:
    module, names = _plain_names(training)
    if names:
        name = training.draw.choice(names)
        training.both(lambda model: prune.identity(model[module], name))


def parametrize_a_weight(training: Training) -> None:
    module, names = _plain_names(training)
    if names:
        name, kind = training.draw.choice(names), training.draw.choice([Halved, Sinh])
        training.both(lambda model: parametrize.register_parametrization(model[module], name, kind()))
        training.renew_optimizers()


def replace_a_parameter(training: Training) -> None:
    module, names = _plain_names(training)
    if names:
        name = training.draw.choice(names)

        def replace(model: nn.ModuleList) -> None:
            setattr(model[module], name, nn.Parameter(getattr(model[module], name).detach() + 0.01))

        training.both(replace)
        training.renew_optimizers()


def load_the_optimizers(training: Training) -> None:
    for pair in training.optimizers:
        for optimizer in pair:
            optimizer.load_state_dict(optimizer.state_dict())


def add_a_group(training: Training) -> None:
    """Of what no optimizer owns yet, or of a parameter that is not the model's."""
    models = (training.model, training.bare)
    for model, optimizer in zip(models, training.optimizers[0], strict=True):
        owned = {
            p for pair in training.optimizers for one in pair for group in one.param_groups for p in group["params"]
        }
        left_out = [p for p in model.parameters() if p not in owned]
        optimizer.add_param_group({"params": left_out or [nn.Parameter(torch.zeros(2))], "lr": 0.03})


def change_the_learning_rate(training: Training) -> None:
    for pair in training.optimizers:
        for optimizer in pair:
            optimizer.param_groups[0]["lr"] *= 0.5


def set_the_data(training: Training) -> None:
    def replace(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

    training.both(replace)


def tie_two_weights(training: Training) -> None:
    """Weights of one name in two modules of one class."""
    modules = list(training.model)
    pairs = [(i, j) for i in range(len(modules)) for j in range(i) if type(modules[i]) is type(modules[j])]
    if pairs:
        i, j = training.draw.choice(pairs)
        names = [name for name in _plain(modules[i]) if name in _plain(modules[j])]
        names = [name for name in names if getattr(modules[i], name).shape == getattr(modules[j], name).shape]
        if names:
            name = training.draw.choice(names)
            training.both(lambda model: setattr(model[i], name, getattr(model[j], name)))
            training.renew_optimizers()


def apply_constraints(training: Training) -> None:
    training.attachment.apply_constraints()
    training.interpreter.apply_constraints()


CHANGES = [
    load_weights_by_assignment,
    freeze_or_unfreeze,
    halve_the_precision_of_a_module,
    double_the_precision,
    prune_a_weight,
    prune_nothing_yet,
    parametrize_a_weight,
    replace_a_parameter,
    load_the_optimizers,
    add_a_group,
    change_the_learning_rate,
    set_the_data,
    tie_two_weights,
    apply_constraints,
]


def _any_name(training: Training) -> str:
    return training.draw.choice([name for name, _ in training.model.named_parameters()])


def _plain(module: nn.Module) -> list[str]:
    """The names of the weights that are parameters themselves."""
    return [name for name, _ in module.named_parameters(recurse=False) if not name.endswith("_orig")]


def _plain_names(training: Training) -> tuple[int, list[str]]:
    """The number of a module, and the names of its weights that are parameters themselves."""
    number = training.draw.randrange(len(training.model))
    return number, _plain(training.model[number])


def _renew_adams(training: Training) -> None:
    """Adam's averages would keep the old precision."""
    if any(isinstance(optimizer, Adam) for pair in training.optimizers for optimizer in pair):
        training.renew_optimizers()
