"""One resumable training loop for all stages: every step seeds itself, so a resumed run is the run that was killed."""

import json
import os
import time
from pathlib import Path

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from pytorch_optimizer import SOAP
from torch import Tensor, nn
from tqdm import tqdm


def save_atomically(value, path: Path) -> None:
    """torch.save to a temporary name, then rename: a kill leaves the old file or the new one, never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def adamw(parameters: list[nn.Parameter], lr: float, weight_decay: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def soap(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Adam in the eigenbasis of Shampoo (Vyas et al., arXiv 2409.11321): a step costs a quarter more here and is worth
    several of AdamW's."""
    return SOAP(parameters, lr=lr, betas=(0.95, 0.95), weight_decay=0, max_precondition_dim=1200)


class Loop:
    """Trains `model` for `steps` steps of `loss(step) -> (loss, numbers to show)` and keeps its state in `folder`.

    The learning rate warms up, then falls along one cosine to 0 at `steps`.  `ema` above 0 keeps a moving average of
    the weights with that decay, see `averaged`.  At `deadline` (seconds since the epoch) `run` stops, its state saved;
    the next run goes on from there, to the numbers that an unbroken run would have had.
    """

    def __init__(self, name: str, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *,
                 warmup=100, ema=0.0, seed=0, save_seconds=90.0, deadline: float | None = None):  # fmt: skip
        self.name, self.model, self.optimizer, self.steps = name, model, optimizer, steps
        self.seed, self.save_seconds, self.deadline = seed, save_seconds, deadline
        self.path, self.log = folder / f"{name}.ckpt", folder / f"{name}.jsonl"
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        self.ema = EMAModel(self.parameters, decay=ema, foreach=True) if ema else None
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if state["steps"] != steps:
                raise ValueError(
                    f"{self.path} is of a run of {state['steps']} {name} steps, not {steps}: its learning rate would "
                    f"jump.  Ask for {state['steps']} again, or remove the file to start anew."
                )
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            if self.ema:
                self.ema.load_state_dict(state["ema"])
            self.step, self.seconds = state["step"], state["seconds"]

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"schedule": self.schedule.state_dict(), "ema": self.ema.state_dict() if self.ema else None}
        save_atomically(state | {"step": self.step, "steps": self.steps, "seconds": self.seconds}, self.path)

    def averaged(self) -> dict[str, Tensor]:
        """The model's state dict with the moving averages in place of its parameters."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        state = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.ema.restore(self.parameters)
        return state

    def run(self, loss, after_save=None) -> "Loop":
        start = last_save = time.process_time()
        before = self.seconds
        with tqdm(total=self.steps, initial=self.step, desc=self.name, dynamic_ncols=True) as bar:
            while not self.finished and not (self.deadline and time.time() >= self.deadline):
                torch.manual_seed(self.seed * 1_000_003 + self.step)
                value, shown = loss(self.step)
                value.backward()
                norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1
                if self.ema:
                    self.ema.step(self.parameters)
                self.seconds = before + time.process_time() - start
                bar.update()
                if self.step % 25 == 0:
                    record = {"step": self.step, "seconds": round(self.seconds, 1), "grad_norm": round(norm.item(), 4)}
                    record |= {k: round(v.item(), 5) for k, v in shown.items()}
                    bar.set_postfix({k: f"{v.item():.4f}" for k, v in shown.items()})
                    with self.log.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                if time.process_time() - last_save > self.save_seconds:
                    self.save()
                    if after_save:
                        after_save(self)
                    last_save = time.process_time()
        self.save()
        return self


def autocast():
    """bfloat16 matrix products: about twice as fast on a CPU that has them."""
    return torch.autocast("cpu", torch.bfloat16)


def to_tensor(images) -> Tensor:
    """uint8 pictures, N x H x W x 3, as floats from -1 to 1, N x 3 x H x W."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
