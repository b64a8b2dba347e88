"""The starting model, to which the KL is taken. It is no second model: its weights are put in place while it is scored."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffpo.models.adapters import adapters_off, added_parameters
from diffpo.models.sharding import reshard
from diffpo.models.transformer import MaskedDiffusionLM


class Reference:
    """A model before its training, in the memory of the weights that are trained. A shard's copy is a shard.

    Adapters are not copied: with adapters, the starting model is the one without them. The threshold is neither: no KL is taken of it.
    Made when it is known which parameters are trained, before the first step.
    """

    def __init__(self, model: MaskedDiffusionLM):
        reshard(model)  # the optimizer's parameters, not what a forward has gathered of them
        added = added_parameters(model)
        kept = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name not in added and not name.startswith("threshold.")
        ]
        self._model = model
        self._apart = [(parameter, parameter.detach().clone()) for parameter in kept]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model is the reference, for passes without a gradient."""
        with adapters_off(self._model):
            self._exchange()
            try:
                yield
            finally:
                self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """What is in the model and what is kept beside it change places, one tensor after the other, in the memory where each lies."""
        reshard(self._model)
        for parameter, apart in self._apart:
            now = parameter.clone()
            parameter.copy_(apart)
            apart.copy_(now)
