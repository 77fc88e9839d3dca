"""Attention over packed sequences on a card: what there is, and the trial that picks one.

In: a model on its device, the layout of its tokens. Out: that layout as blocks take it, an entry in
`model.DOORS`, and a line in the log that names it. All passes over packed sequences come through
here, so each of them attends through what was picked.
Knows nothing of batches, optimizers or the loop. `attend_in_blocks` in `model.py` is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config import UserError
from hearth import hardware, log
from model import DOORS, Attention, Model, PackedSequences, attend_in_blocks

if TYPE_CHECKING:  # imported where it is used: with it comes a second's work
    from torch.nn.attention.flex_attention import BlockMask

# N tokens laid flat, H query heads, G key/value heads, E head_dim, Q blocks of BLOCK tokens

BLOCK = 128  # queries, or keys, of a tile of flex_attention
SIZES = 64  # micro-batch sizes that may each have compiled code of their own


def flash_attn_package() -> Attention:
    """FlashAttention-2 of the flash-attn package (arXiv 2307.08691), where its extra is here."""
    from flash_attn import flash_attn_varlen_func

    return partial(attend_varlen, partial(flash_attn_varlen_func, causal=True))


def varlen_attn_of_torch() -> Attention:
    """FlashAttention of torch itself."""
    from torch.nn.attention.varlen import varlen_attn

    told = "enable_gqa" in signature(varlen_attn).parameters
    return partial(attend_varlen, partial(varlen_attn, enable_gqa=True) if told else varlen_attn)


def attend_varlen(
    kernel: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedSequences,
    window: int | None,
) -> Tensor:
    """A kernel over the segments as they lie, without padding: q (N, H, E), k and v (N, G, E)."""
    reach = (-1 if window is None else window - 1, 0)  # tokens seen before and after the query
    edges, longest = packed.cu_seqlens, packed.row_length
    return kernel(q, k, v, edges, edges, longest, longest, window_size=reach)


def compiled_flex_attention() -> Attention:
    """flex_attention (arXiv 2412.05496), which has no kernel without its compiler."""
    if not hardware.compiles(None, torch.device("cuda")):
        raise ImportError("needs triton")
    return partial(attend_flex, compiled())


@cache
def compiled() -> Callable[..., Tensor]:
    """flex_attention compiled, once for each size of a micro-batch."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(SIZES, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False)


def attend_flex(
    kernel: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedSequences,
    window: int | None,
) -> Tensor:
    """flex_attention over all N tokens as one sequence, under the segments' mask."""
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, ·, N, E)
    y = kernel(*heads, block_mask=flex_mask(packed, window), enable_gqa=True)
    return y[0].transpose(0, 1)  # (N, H, E)


@lru_cache(maxsize=4)  # of a micro-batch: its windows, again in the backward pass
def flex_mask(packed: PackedSequences, window: int | None) -> BlockMask:
    """What each query sees, as flex_attention takes it: for each block of queries the blocks of
    keys that all of them see, and those that some see.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device, (n_rows, length) = packed.positions.device, packed.first.shape
    index = torch.arange(n_rows * length).view(n_rows, length)
    oldest = index[:, :1] + packed.first.cpu()  # (R, L): the oldest key that a query sees
    if window is not None:
        oldest = oldest.maximum(index - window + 1)
    oldest = oldest.flatten()
    whole = torch.nn.functional.pad(oldest, (0, -len(oldest) % BLOCK), value=int(oldest[-1]))
    first, last = (whole.view(-1, BLOCK).aminmax(dim=1)[n].to(device)[:, None] for n in (0, 1))
    key = torch.arange(len(first), device=device)  # blocks of keys, (Q,)
    query = key[:, None]
    full = (key < query) & (key * BLOCK >= last)  # (Q, Q)
    some = (key <= query) & (key >= first // BLOCK) & ~full
    oldest = oldest.to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= oldest[query])

    return BlockMask.from_kv_blocks(
        *listed(some), *listed(full), BLOCK, sees, seq_lengths=(len(oldest), len(oldest))
    )


def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The number of true entries in each row of (Q, Q), and their places first: (1, 1, Q, …)."""
    places = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1).int()[None, None], places.int()[None, None]


# in the order in which they are tried on a card
KINDS: dict[str, Callable[[], Attention]] = {
    "flash-attn": flash_attn_package,
    "varlen_attn": varlen_attn_of_torch,
    "flex_attention": compiled_flex_attention,
    "scaled_dot_product_attention in blocks": lambda: attend_in_blocks,
}


def packed(model: Model, starts: Tensor, row_length: int) -> PackedSequences:
    """Packed segments on the model's device, their attention picked, once on a card: `starts` (N,)
    marks the first token of each.
    """
    device = model.device
    if device.type == "cuda" and (device.type, model.dtype) not in DOORS:
        pick(model)
    return PackedSequences(starts, row_length, device)


def pick(model: Model) -> str:
    """Let training and evaluation of models like this one use the first kind of attention that
    works here; its name, also said in the log with why others do not.

    Raises UserError where none works.
    """
    device, failed = model.device, []
    names = KINDS if device.type == "cuda" else list(KINDS)[-1:]
    for name in names:
        try:
            door = KINDS[name]()
            with torch.inference_mode(False), torch.enable_grad():
                require_right(door, model)
        except ModuleNotFoundError:
            continue  # an extra that is not installed
        except Exception as error:  # a driver, a compiler, a kernel: each with errors of its own
            failed.append(f"{name} does not work here: {' '.join(str(error).split())[:160]}")
            hardware.free_memory(device)
            continue
        DOORS[device.type, model.dtype] = door
        log.say("; ".join([f"attention   {name}", *failed]))
        return name
    raise UserError(
        f"No attention works on {hardware.describe(device)}: {'; '.join(failed)}. "
        "Train on the processor with --device cpu."
    )


def require_right(door: Attention, model: Model) -> None:
    """Raises ArithmeticError where `door` is not the reference on a few packed segments in the
    model's shape: forward, and gradient.
    """
    c = model.config
    starts = torch.zeros(512, dtype=torch.bool)
    starts[[3, 130, 131, 290]] = True
    rng = torch.Generator().manual_seed(0)
    shapes = [(512, n, c.head_dim) for n in (c.n_head, c.n_kv_head, c.n_kv_head, c.n_head)]
    rounded = [torch.randn(shape, generator=rng).to(model.dtype) for shape in shapes]
    exact, given = [x.float() for x in rounded], [x.to(model.device) for x in rounded]
    for window in {c.window and min(c.window, 100), None}:
        there = PackedSequences(starts, 256, model.device)
        found = with_gradients(door, given, there, window)
        wanted = with_gradients(attend_in_blocks, exact, PackedSequences(starts, 256), window)
        far = max(map(off, found, wanted))
        if not far < (1e-3 if model.dtype == torch.float32 else 4e-2):
            raise ArithmeticError(f"its result is off by {far:.2g} of its size, window {window}")


def with_gradients(
    how: Attention, given: Sequence[Tensor], packed: PackedSequences, window: int | None
) -> list[Tensor]:
    """Attention of `given`'s q, k, v, and the gradient of its sum under the weights (N, H, E) that
    come last in it, to each of them.
    """
    *heads, weights = given
    heads = [x.detach().requires_grad_() for x in heads]
    y = how(*heads, packed, window)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), heads)]


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, over the largest value; NaN where a value is none."""
    return float((found.float().cpu() - wanted).abs().max() / wanted.abs().max())
