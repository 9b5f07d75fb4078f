"""Parts of a model that are not trained, by their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from maskloss.errors import InputError, one_line


def freeze(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Freeze the parts of a model with these names.

    Args:
        model: the model.
        names: names of modules or parameters, such as "backbone" or "rpn.head.conv"; * stands for any text.

    Returns:
        The frozen modules. In evaluation mode, their batch norms keep their statistics, too.

    Raises:
        InputError: no module or parameter has such a name, or nothing is left to train.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> freeze(model, ["0"])
        [Linear(in_features=2, out_features=2, bias=True)]
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['1.weight', '1.bias']
    """
    frozen = []
    for name in names:
        modules = [module for key, module in model.named_modules() if key and fnmatch.fnmatchcase(key, name)]
        parameters = [value for key, value in model.named_parameters() if fnmatch.fnmatchcase(key, name)]
        if not modules and not parameters:
            raise InputError(
                f"--freeze: no part of the model is named {one_line(name, 80)!r}; its parts are "
                f"{', '.join(_parts(model))}"
            )
        for parameter in [*parameters, *(value for module in modules for value in module.parameters())]:
            parameter.requires_grad_(False)
        frozen.extend(modules)
    if names and not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"--freeze {','.join(names)} leaves nothing to train")
    return frozen


def _parts(model: nn.Module) -> list[str]:
    """Return the names of the modules of the first two levels that have parameters."""
    return [
        name
        for name, module in model.named_modules()
        if name and name.count(".") < 2 and any(True for _ in module.parameters())
    ]
