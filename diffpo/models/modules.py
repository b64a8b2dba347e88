"""Layers that compute in the dtype of their input, whatever their weights are kept in.

What is trained is kept in fp32, or small steps are lost: a bf16 weight of 1 does not notice 0.003. The products are still formed in the
network's own dtype, to which each weight is converted where it is used; the conversion is differentiable, so the gradient is fp32 too.
Where both dtypes are the same nothing is converted. torch.autocast would do as much, but it also keeps a copy of every input that it
converts, and every weight until a context ends, where it would be stale after an optimizer's step.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
