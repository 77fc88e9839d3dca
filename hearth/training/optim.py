"""Update rules, parameter groups, learning-rate schedule.

In: a model's parameters and `OptimConfig`. Out: an `Optimizers` that steps, saves and loads as one.
Knows nothing of data, loss or checkpoints.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from config import LoopConfig, OptimConfig

# Polar Express (arXiv 2505.16932, table of optimal quintics for lower bound 1e-3), each shrunk by
# 2% for safety.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# root mean square of a typical AdamW update, to which Muon's is scaled (arXiv 2502.16982)
RMS_OF_ADAMW = 0.2


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: (K, m, n) -> (K, m, n), singular values
    between about 0.7 and 1.2.

    Five quintic Newton-Schulz steps (Muon) with Polar Express coefficients, all K matrices at once;
    in bfloat16 on a card, where that is fast and enough, in float32 elsewhere.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    scale = 1 / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    if x.dtype == torch.float32 and x.shape[-1] >= WIDE * x.shape[-2]:
        x = (scale * polar_factor(x @ x.mT * scale.square())) @ x
    else:
        x = x * scale
        for a, b, c in POLAR_EXPRESS:
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


# columns a row from which on `polar_factor` takes fewer operations than the steps written out
WIDE = 1.5


def polar_factor(gram: Tensor) -> Tensor:
    """The matrices (K, m, m) that the same steps multiply x (K, m, n) by, from x xᵀ alone: every
    step's polynomial of x xᵀ commutes with the others, so x itself is needed once. Wants float32:
    in bfloat16 the small singular values of x, squared in x xᵀ, would be lost.
    """
    factor = None
    for step, (a, b, c) in enumerate(POLAR_EXPRESS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if step + 1 < len(POLAR_EXPRESS):
            gram = polynomial @ gram @ polynomial
    return factor


ELEMENTS_AT_ONCE = 2**26  # of equal matrices updated together: 256 MiB in float32


class Rule(torch.optim.Optimizer):
    """A base for update rules, whose bookkeeping is called as it is written: called as torch wraps
    it, the first call imports torch's compiler, which takes seconds.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(Rule, torch.optim.AdamW):
    """AdamW of torch (arXiv 1711.05101), its step without that import too."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class Muon(Rule):
    """Momentum orthogonalised (https://kellerjordan.github.io/posts/muon), batched over matrices of
    one shape. All that takes memory is done before a weight or the state of a shape changes: where
    memory runs out, the shape can be updated again.
    """

    def __init__(
        self,
        matrices: list[Tensor],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,  # of the momentum between two steps
    ) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        groups = []
        for shape, equal in by_shape.items():  # few at once where they are large
            n = max(1, ELEMENTS_AT_ONCE // shape.numel())
            groups += [{"params": equal[i : i + n]} for i in range(0, len(equal), n)]
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self.dtype = dtype
        super().__init__(groups, settings)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradient = torch.stack([p.grad for p in params])  # (K, m, n)
            state = self.state[group["params"][0]]
            before = state.get("momentum_buffer")
            before = torch.zeros_like(gradient) if before is None else before.float()
            momentum = before.lerp(gradient, 1 - group["momentum"])
            new = {"momentum_buffer": momentum.to(self.dtype)}
            if "second_moment" in state:
                new["second_moment"] = state["second_moment"].clone()
            direction = orthogonalise(gradient.lerp_(momentum, group["momentum"]))  # Nesterov
            del before, momentum, gradient
            direction = normalize_rows(direction, new)
            m, n = direction.shape[-2:]
            size = group["lr"] * RMS_OF_ADAMW * math.sqrt(max(m, n))
            # decay only where the update shrinks the weight too (arXiv 2510.12402)
            decay = group["lr"] * group["weight_decay"]
            kept = (
                (torch.stack(params) * direction > 0).float().mul_(-decay).add_(1) if decay else ()
            )
            updates = list(direction)
            state.update(new)
            if decay:
                torch._foreach_mul_(params, list(kept))
            torch._foreach_add_(params, updates, alpha=-size)


def normalize_rows(direction: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Updates (K, m, n) whose rows (columns, where those are more) are of like size in the long
    run, as large in all as those of an orthogonal matrix (NorMuon, arXiv 2510.05491).
    """
    m, n = direction.shape[-2:]
    along, length = (-1, n) if m >= n else (-2, m)
    now = torch.linalg.vector_norm(direction, dim=along, keepdim=True).square() / length
    second_moment = state.setdefault("second_moment", torch.zeros_like(now)).lerp_(now, 0.1)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    norm = (now * scale.square()).sum(dim=(-2, -1), keepdim=True).mul(length).sqrt()
    return direction * (scale * (math.sqrt(min(m, n)) / norm.clamp_min(1e-7)))


class RowAdagrad(Rule):
    """Adagrad (Duchi et al., JMLR 12, 2011) with one number a row, as tables of recommenders are
    trained: a row's first update has the size of the learning rate, its nth one of that over √n.

    A row that nobody looked up is left as it is. Beside the table and its gradient it takes no
    memory to speak of.
    """

    def __init__(self, tables: list[Tensor], *, lr: float) -> None:
        super().__init__(tables, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for table in (p for p in group["params"] if p.grad is not None):
                now = torch.linalg.vector_norm(table.grad, dim=1).square_().div_(table.shape[1])
                state = self.state[table]
                used = state["sum"] + now if state else now  # mean squares, summed
                scale = torch.where(now > 0, used.rsqrt(), 0.0)[:, None]
                # nothing changes before all that takes memory is done, as in `Muon`
                if table.device.type == "cpu":  # a few rows of many
                    (rows,) = now.nonzero(as_tuple=True)
                    update = table.grad[rows] * scale[rows]
                    state["sum"] = used
                    table.index_add_(0, rows, update, alpha=-group["lr"])
                else:  # all, without waiting for the card to say which
                    state["sum"] = used
                    table.addcmul_(table.grad, scale, value=-group["lr"])


# what each rule keeps of a parameter, or of a group of equal matrices
KEPT = {
    "Muon": {"momentum_buffer", "second_moment"},
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "AdamWScheduleFree": {"z", "exp_avg_sq"},
    "RowAdagrad": {"sum"},
}


class Optimizers:
    """The optimizers of one model as one: a learning rate by factor, one state, weights meant for
    use.
    """

    def __init__(
        self, parts: list[torch.optim.Optimizer], config: OptimConfig, model: nn.Module
    ) -> None:
        self.parts, self.config, self.model = parts, config, model
        self._updated: set[int] = set()  # groups, of a step that an error broke off
        for group in self._groups():
            group["peak_lr"] = group["lr"]

    def _groups(self) -> Iterator[dict[str, Any]]:
        for part in self.parts:
            yield from part.param_groups

    def schedule(self, step: int, steps: int, loop: LoopConfig) -> float:
        """Set the learning rates of `step`, and Muon's momentum for its warm-up; gives the share
        of the peak.

        The schedule-free rule has no decay: averaging the weights takes its place (arXiv
        2405.15682, section 2).
        """
        if self.config.name == "schedulefree":
            loop = replace(loop, decay_share=0.0)
        factor = learning_rate_factor(step, steps, loop)
        warm = min(1.0, step / max(1, self.config.momentum_warmup_steps))
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor
            if "momentum" in group:
                group["momentum"] = 0.85 + (self.config.momentum - 0.85) * warm
        return factor

    @property
    def can_continue(self) -> bool:
        """Whether a step that memory ran out in can be taken up again, and ends the same."""
        return self.config.name != "schedulefree"

    def step(self) -> None:
        """Update all weights; after an error, those that it kept from it, where `can_continue`."""
        for part in self.parts:
            groups = part.param_groups
            for p, state in list(part.state.items()):
                if set(state) != KEPT[type(part).__name__]:
                    del part.state[p]  # half made
            try:
                for group in groups:
                    if id(group) not in self._updated:
                        part.param_groups = [group]
                        part.step()
                        self._updated.add(id(group))
            finally:
                part.param_groups = groups
        self._updated.clear()

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only; with the weights being trained where inference uses
        averaged ones.
        """
        state: dict[str, Any] = {"parts": [part.state_dict() for part in self.parts]}
        if self.config.name == "schedulefree":
            state["training_weights"] = {
                name: p.detach() for name, p in self.model.named_parameters()
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; raises an error for a state that is not of these optimizers,
        also where torch would find out only at the next step.
        """
        kinds = [{name: type(v) for name, v in group.items()} for group in self._groups()]
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
            if isinstance(part, Muon):  # torch has made it float32
                for state in part.state.values():
                    if "momentum_buffer" in state:
                        state["momentum_buffer"] = state["momentum_buffer"].to(part.dtype)
            check_state(part)
        if kinds != [{name: type(v) for name, v in group.items()} for group in self._groups()]:
            raise ValueError("settings of another kind")
        if self.config.name == "schedulefree":
            self.model.load_state_dict(state["training_weights"])
            if not all(p.isfinite().all() for p in self.model.parameters()):
                raise ValueError("weights that are not finite")

    def saved_bytes(self) -> int:
        """Size in bytes of what `state_dict` holds."""
        twice = self.config.name == "schedulefree"
        return self.state_bytes() + (4 * sum(p.numel() for p in self.model.parameters()) * twice)

    def state_bytes(self) -> int:
        """Memory of the whole state in bytes, whether or not it is there yet: Muon keeps one number
        of each weight, in its own dtype, and a float32 of each row or column, AdamW and its
        schedule-free form two float32 of each weight, Adagrad a float32 of each row.
        """

        def size(part: torch.optim.Optimizer, p: Tensor) -> int:
            if isinstance(part, RowAdagrad):
                return 4 * len(p)
            if isinstance(part, Muon):
                return part.dtype.itemsize * p.numel() + 4 * max(p.shape)
            return 8 * p.numel()

        sizes = (
            size(part, p)
            for part in self.parts
            for group in part.param_groups
            for p in group["params"]
        )
        return sum(sizes)

    @contextmanager
    def inference_weights(self) -> Iterator[None]:
        """Inside, the model holds the weights meant for use; afterwards exactly those it is
        training.
        """
        if self.config.name != "schedulefree":
            yield
            return
        trained = [p.detach().clone() for p in self.model.parameters()]
        for part in self.parts:
            part.eval()
        try:
            yield
        finally:
            for part in self.parts:
                part.train()
            with torch.no_grad():
                for p, before in zip(self.model.parameters(), trained, strict=True):
                    p.copy_(before)


def check_state(part: torch.optim.Optimizer) -> None:
    """Raises `ValueError` where the state that was loaded is not one of this optimizer."""
    for group in part.param_groups:
        for p in group["params"]:
            state = part.state.get(p, {})
            if state and set(state) != KEPT[type(part).__name__]:
                raise ValueError(f"holds {sorted(state)} of a parameter")
            shape = (len(group["params"]), *p.shape) if isinstance(part, Muon) else p.shape
            rows = {(*shape[:-1], 1), (*shape[:-2], 1, *shape[-1:])}  # of `normalize_rows`
            for name, value in state.items():
                fits = tuple(value.shape) in {
                    "step": {()},
                    "sum": {tuple(shape[:1])},
                    "second_moment": rows,
                }.get(name, {tuple(shape)})
                if not (fits and value.isfinite().all()):
                    raise ValueError(f"{name} of a parameter {tuple(p.shape)} does not fit it")


def build_optimizers(model: nn.Module, config: OptimConfig, lr: float) -> Optimizers:
    """Matrices, embedding and vectors in their own groups, under the rule that `config.name` asks
    for.
    """
    looked_up = {id(p) for p in (model.embedding, *model.tables)}
    matrices = [
        p for p in model.parameters() if p.ndim == 2 and id(p) not in looked_up and min(p.shape) > 8
    ]
    chosen = looked_up | {id(p) for p in matrices}
    vectors = [p for p in model.parameters() if id(p) not in chosen]
    betas = (config.beta1, config.beta2)
    # a row has a gradient only where its token stands: with a short memory the few steps that have
    # one would count as large ones
    rare = {"betas": (config.beta1, config.embedding_beta2), "weight_decay": 0.0}
    rest = [
        {"params": [model.embedding], "lr": lr * config.embedding_lr_ratio, **rare},
        {"params": vectors, "lr": lr * config.vector_lr_ratio, "weight_decay": 0.0},
    ]
    values, bigrams = [*model.value_embeddings], model.bigrams
    if values:
        rest.append({"params": values, "lr": lr * config.value_lr_ratio, **rare})
    if bigrams is not None and config.name != "muon":  # Adagrad has them beside Muon alone
        rest.append({"params": [bigrams], "lr": lr * config.value_lr_ratio, **rare})
    dense = {"params": matrices, "lr": lr, "weight_decay": config.weight_decay}
    if config.name == "muon":
        muon = Muon(
            matrices,
            lr=lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            dtype=getattr(torch, config.momentum_dtype),
        )
        parts = [muon, AdamW(rest, betas=betas, fused=True)]
        parts += [] if bigrams is None else [RowAdagrad([bigrams], lr=lr * config.bigram_lr_ratio)]
    elif config.name == "adamw":
        parts = [AdamW([dense, *rest], betas=betas, fused=True)]
    else:
        from schedulefree import AdamWScheduleFree

        parts = [AdamWScheduleFree([dense, *rest], betas=betas)]
        parts[0].train()
    return Optimizers(parts, config, model)


def learning_rate_factor(step: int, steps: int, loop: LoopConfig) -> float:
    """Share of the peak learning rate at `step`: linear climb, plateau, linear fall to
    `final_lr_ratio`.

    1   ,--------.
       /          `-.
    0 /              `- final_lr_ratio
    """
    warmup = max(1, round(steps * loop.warmup_share))
    decay = max(1, round(steps * loop.decay_share))
    climbing = (step + 1) / warmup
    left = min(1.0, (steps - step) / decay)
    return min(climbing, left + (1 - left) * loop.final_lr_ratio, 1.0)
