"""Matrix products of the blocks in 8 bits while training, through torchao; refused where they do
not pay.

In: `float8` (cards from Ada on) or `int8` (cards from Ampere on), and the device. Out: what takes
F.linear's place. Weights stay float32, what is read out and the loss stay as they are. Knows
nothing of models.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig, UserError
from hearth import hardware
from model import Block

Kind = Literal["float8", "int8"]
Linear = Callable[[Tensor, Tensor], Tensor]  # x (N, in), weight (out, in) -> (N, out)

WORTH = 1.05  # an MLP must train this many times as fast as with ordinary products


def linear(kind: Kind) -> Linear:
    """F.linear in 8 bits, forward and backward: float8 with a scale a tensor, int8 with a scale a
    row.

    Each input of a product is scaled by its own largest value as it is at that moment.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own, of what it does not need here
        try:
            return float8_linear() if kind == "float8" else int8_linear()
        except ImportError as error:
            raise UserError(
                f"--eight_bit {kind} needs torchao, which could not be imported ({error}). Run "
                "with "
                "`uv run --extra eight-bit pretrain.py …`, or leave --eight_bit away."
            ) from error


def float8_linear() -> Linear:
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    config = Float8LinearConfig()
    roles = (
        config.gemm_config_output,
        config.gemm_config_grad_input,
        config.gemm_config_grad_weight,
    )
    how = LinearMMConfig(
        *(ScaledMMConfig(config.emulate, role.use_fast_accum, False, False) for role in roles)
    )
    return lambda x, weight: matmul_with_hp_or_float8_args.apply(x, weight.t(), how, config)


def int8_linear() -> Linear:
    from torchao.prototype.quantized_training import int8_mixed_precision as torchao_int8

    product = torchao_int8._Int8MixedPrecisionTrainingLinearFunction
    config = torchao_int8.int8_mixed_precision_training()
    return lambda x, weight: product.apply(x, weight, None, config)


def linear_that_pays(
    kind: Kind, config: ModelConfig, device: torch.device, dtype: torch.dtype, compiled: bool
) -> Linear:
    """`linear(kind)`, once an MLP of the model's shape has trained faster with it than without.

    Raises UserError with what stands against it: the card, the sizes, or the seconds of both.
    """
    require_able(kind, device)
    sizes = (
        config.d_model,
        config.d_ff,
        config.n_head * config.head_dim,
        config.n_kv_head * config.head_dim,
    )
    if any(size % 16 for size in sizes):
        raise UserError(
            f"--eight_bit {kind} needs widths that are multiples of 16, but the model's are "
            f"{', '.join(map(str, sizes))} (d_model, d_ff, all query heads, all key/value heads)."
        )
    product = linear(kind)
    n_tokens = 8192 if device.type == "cuda" else 128
    plain = mlp_seconds(F.linear, config, n_tokens, device, dtype, compiled)
    try:
        ours = mlp_seconds(product, config, n_tokens, device, dtype, compiled)
    except Exception as error:  # a kernel, a compiler, a driver: each with errors of its own
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"--eight_bit {kind} does not work on {hardware.describe(device)}: {said}. {LEAVE}"
        ) from error
    if plain < WORTH * ours:
        raise UserError(
            f"--eight_bit {kind} does not pay here: an MLP over {n_tokens} tokens takes "
            f"{1e3 * ours:.2f} ms "
            f"forward and backward with it, {1e3 * plain:.2f} ms without "
            f"({hardware.describe(device)}). {LEAVE}"
        )
    return product


LEAVE = "Leave --eight_bit away."


def require_able(kind: Kind, device: torch.device) -> None:
    """Raises UserError where the device has no unit that multiplies this kind, with what it is and
    what it could take instead.
    """
    found, amd = hardware.describe(device), torch.version.hip is not None
    if device.type == "mps":
        raise UserError(
            f"--eight_bit {kind} is for NVIDIA's cards; this is {found}, whose chip multiplies no "
            f"8 bits in torch. {LEAVE}"
        )
    if device.type != "cuda" or amd:
        return  # the trial decides
    capability = torch.cuda.get_device_capability(device)
    needed, name = ((8, 9), "Ada (RTX 40)") if kind == "float8" else ((8, 0), "Ampere (RTX 30)")
    if capability < needed:
        other = "Take --eight_bit int8, or leave it away." if capability >= (8, 0) else LEAVE
        raise UserError(
            f"--eight_bit {kind} needs a card from {name} on, compute capability "
            f"{needed[0]}.{needed[1]}; this is {found}, {capability[0]}.{capability[1]}. {other}"
        )


def mlp_seconds(
    product: Linear,
    config: ModelConfig,
    n_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
) -> float:
    """The least seconds of several turns: forward and backward of a block's MLP."""
    block = Block(config, None).to(device)
    for weight in block.parameters():
        torch.nn.init.normal_(weight)
    block.linear = product
    x = torch.randn(n_tokens, config.d_model, device=device, dtype=dtype, requires_grad=True)
    run, best = torch.compile(block.mlp, dynamic=False) if compiled else block.mlp, float("inf")
    for _ in range(8 if device.type == "cuda" else 3):  # the first ones compile and choose kernels
        started = time.perf_counter()
        float(run(x).sum().backward() or x.grad[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return best
