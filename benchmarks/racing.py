"""What card.py and recipe.py share: nanoGPT and nanochat as sides of a race, and its clock.

In: a clone of a rival's repository, a shape, a learning rate. Out: its own model, optimizer and
schedule as an object with `step` and `nats`; none of its code stands here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import statistics
import sys
from pathlib import Path
from typing import Any

# of its base_train.py
NANOCHAT_RATES = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "matrix_lr": 0.02, "scalar_lr": 0.5}


class NanoGPT:
    """nanoGPT: its model and AdamW groups, compiled; warm-up, then a cosine to a tenth, as its
    train.py has it. shape: fields of its GPTConfig.
    """

    def __init__(self, path: str, shape: dict[str, int], *, lr: float, seed: int) -> None:
        import torch

        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(path) / "model.py")
        theirs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        torch.manual_seed(seed)
        with contextlib.redirect_stdout(sys.stderr):
            self.model = theirs.GPT(theirs.GPTConfig(dropout=0.0, bias=False, **shape))
            self.optimizer = self.model.configure_optimizers(0.1, lr, (0.9, 0.95), "cpu")
        self.compiled, self.lr = torch.compile(self.model), lr

    def step(self, block: Any, n: int, n_steps: int) -> None:
        import torch

        warm = max(1, n_steps // 50)
        share = (n - warm) / max(1, n_steps - warm)
        factor = (n + 1) / warm if n < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * share))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        _, loss = self.compiled(block[:, :-1].contiguous(), block[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def nats(self, block: Any) -> float:
        _, loss = self.model(block[:, :-1].contiguous(), block[:, 1:].contiguous())
        return float(loss) * block[:, 1:].numel()


class Nanochat:
    """nanochat: its model, compiled, and its own Muon and AdamW; every layer whole, as it
    advises where FlashAttention-3 is missing; warm-up, plateau, linear fall and momentum as its
    base_train.py has them, its horizons of 40 and 400 steps cut for a short run. The weight decay
    that base_train.py makes from the tokens is left out: for so few it would be above 1.

    shape: fields of its GPTConfig. lr: times all its rates.
    """

    def __init__(self, path: str, shape: dict[str, int], *, lr: float, seed: int) -> None:
        import torch

        sys.path.insert(0, path)
        from nanochat.gpt import GPT, GPTConfig

        torch.manual_seed(seed)
        with contextlib.redirect_stdout(sys.stderr):
            self.model = GPT(GPTConfig(window_pattern="L", **shape))
            self.model.init_weights()
            self.optimizer = self.model.setup_optimizer(
                **{name: rate * lr for name, rate in NANOCHAT_RATES.items()}
            )
        self.compiled = torch.compile(self.model, dynamic=False)

    def step(self, block: Any, n: int, n_steps: int) -> None:
        warm, fall = max(1, min(40, n_steps // 50)), round(0.65 * n_steps)
        left = min(1.0, (n_steps - n) / fall)
        factor = min((n + 1) / warm, left + (1 - left) * 0.05)
        climb = min(1.0, n / min(400, max(1, n_steps // 4)))
        momentum = (
            0.97 * left + 0.90 * (1 - left) if left < 1 else 0.85 * (1 - climb) + 0.97 * climb
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if group["kind"] == "muon":
                group["momentum"] = momentum
        self.compiled(block[:, :-1].contiguous(), block[:, 1:].contiguous()).backward()
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def nats(self, block: Any) -> float:
        loss = self.model(
            block[:, :-1].contiguous(), block[:, 1:].contiguous(), loss_reduction="sum"
        )
        return float(loss)


SKIPPED = 3  # steps that are not timed: they compile


def training_seconds(taken: list[float]) -> float:
    """Time of all steps, the first ones, which compile, counted as the median of the others."""
    timed = taken[SKIPPED:] or taken
    return sum(timed) + SKIPPED * statistics.median(timed)
