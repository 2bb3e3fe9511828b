"""Layouts of the two expert layers in PyTorch: the same numbers, at speeds that depend on the machine."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Two layers of all experts, x [B, I] -> [E, B, H], from kernels [E, in, out] and biases [E, 1, out]."""


def single_experts(x: Tensor, kernel_1: Tensor, bias_1: Tensor, kernel_2: Tensor, bias_2: Tensor) -> Tensor:
    """One expert after the other, which keeps a hidden layer in the cache."""
    layers = zip(kernel_1.unbind(), bias_1.unbind(), kernel_2.unbind(), bias_2.unbind(), strict=True)
    return torch.stack([F.relu(torch.addmm(d, F.relu(torch.addmm(b, x, a)), c)) for a, b, c, d in layers])


def einsum_experts(x: Tensor, kernel_1: Tensor, bias_1: Tensor, kernel_2: Tensor, bias_2: Tensor) -> Tensor:
    """All experts in one batched product, expert-major."""
    hidden = F.relu(torch.einsum("bi,eio->ebo", x, kernel_1) + bias_1)
    return F.relu(torch.einsum("ebi,eio->ebo", hidden, kernel_2) + bias_2)


def baddbmm_experts(x: Tensor, kernel_1: Tensor, bias_1: Tensor, kernel_2: Tensor, bias_2: Tensor) -> Tensor:
    """The same with the bias inside the product."""
    hidden = F.relu(torch.baddbmm(bias_1, x.expand(len(kernel_1), -1, -1), kernel_1))
    return F.relu(torch.baddbmm(bias_2, hidden, kernel_2))


def stacked_experts(x: Tensor, kernel_1: Tensor, bias_1: Tensor, kernel_2: Tensor, bias_2: Tensor) -> Tensor:
    """The first layer of all experts as one wide product, the second on its strided slices."""
    num_experts, num_inputs, width = kernel_1.shape
    hidden = F.relu(torch.addmm(bias_1.flatten(), x, kernel_1.transpose(0, 1).reshape(num_inputs, -1)))
    return F.relu(torch.baddbmm(bias_2, hidden.view(-1, num_experts, width).transpose(0, 1), kernel_2))


EXPERTS: dict[str, Experts] = {
    "one by one": single_experts,
    "einsum": einsum_experts,
    "baddbmm": baddbmm_experts,
    "stacked": stacked_experts,
}
