"""One resumable training loop for all stages: every step seeds itself, so a resumed run is the run that was killed."""

import json
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


def save_atomically(value, path: Path) -> None:
    """torch.save to a temporary name, then rename: a kill leaves the old file or the new one, never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def cosine(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """The factor of the learning rate: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup))))


class Loop:
    """Trains `model` for `steps` steps of `loss(step) -> (loss, numbers to show)` and keeps its state in `folder`.

    `ema` above 0 keeps a moving average of the weights (`self.ema`, a state dict), with a warmed-up decay.
    `deadline` (seconds since the epoch) squeezes the learning-rate schedule so that it ends by then: the schedule runs
    on the share of the steps or of the time that is used up, whichever is more.
    """

    def __init__(self, name: str, folder: Path, model: nn.Module, lr: float, steps: int, *, weight_decay=0.01,
                 warmup=100, ema=0.0, seed=0, save_seconds=90.0, deadline: float | None = None):  # fmt: skip
        self.name, self.model, self.lr, self.steps, self.warmup = name, model, lr, steps, warmup
        self.ema_decay, self.seed, self.save_seconds, self.deadline = ema, seed, save_seconds, deadline
        self.path, self.log = folder / f"{name}.ckpt", folder / f"{name}.jsonl"
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()} if ema else None
        self.step, self.seconds, self.finished = 0, 0.0, None
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema, self.step, self.seconds = state["ema"], state["step"], state["seconds"]
            self.finished = state.get("finished")

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema}
        save_atomically(state | {"step": self.step, "seconds": self.seconds, "finished": self.finished}, self.path)

    def update_ema(self) -> None:
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            pairs = [(v, self.ema[k]) for k, v in self.model.state_dict().items() if v.is_floating_point()]
            torch._foreach_lerp_([e for _, e in pairs], [v for v, _ in pairs], 1 - decay)

    def run(self, loss, after_save=None) -> None:
        if self.finished == self.steps:  # it had reached its last step or its deadline
            return
        start = last_save = time.time()
        before, started = self.seconds, self.step
        with tqdm(total=self.steps, initial=self.step, desc=self.name, dynamic_ncols=True) as bar:
            while self.step < self.steps:
                position = self.step
                if self.deadline:
                    share = (time.time() - start) / max(1.0, self.deadline - start)
                    if share >= 1:
                        break
                    position = max(position, int(started + share * (self.steps - started)))
                for group in self.optimizer.param_groups:
                    group["lr"] = self.lr * min(1, (self.step + 1) / self.warmup) * cosine(position, self.steps, 0)
                torch.manual_seed(self.seed * 1_000_003 + self.step)
                value, shown = loss(self.step)
                value.backward()
                norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1
                if self.ema is not None:
                    self.update_ema()
                self.seconds = before + time.time() - start
                bar.update()
                if self.step % 25 == 0:
                    record = {"step": self.step, "seconds": round(self.seconds, 1), "grad_norm": round(float(norm), 4)}
                    record |= {k: round(float(v), 5) for k, v in shown.items()}
                    bar.set_postfix({k: f"{float(v):.4f}" for k, v in shown.items()})
                    with self.log.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                if time.time() - last_save > self.save_seconds:
                    self.save()
                    if after_save:
                        after_save(self)
                    last_save = time.time()
        self.finished = self.steps
        self.save()


def autocast():
    """bfloat16 matrix products: about twice as fast on a CPU that has them."""
    return torch.autocast("cpu", torch.bfloat16)


def to_tensor(images) -> Tensor:
    """uint8 pictures, N x H x W x 3, as floats from -1 to 1, N x 3 x H x W."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
