# SPDX-License-Identifier: Apache-2.0
"""One run: train an adapter as the example script does, draw with it, and judge."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from examples import dreambooth_kron
from examples.dreambooth import DivergedError, adapters, demo, evaluate
from examples.dreambooth.arguments import USUAL_DECAY, parse_args
from examples.dreambooth.images import image_files, open_image
from examples.emoji_sd.export import concepts
from examples.emoji_sd.judge import Judge, background_colour
from examples.emoji_sd.render import COLOURS, article
from examples.measure.encoder import Encoder
from examples.measure.pictures import drift

from .plan import TRAINING, Run, Sizes
from .summary import SHARES

GUIDANCE = 4.0
SIZE = (64, 64)
TIMED = 2  # of these the quickest counts
# of {thing} and {colour}; the long ones use words that the pipeline was trained on, all that a caption can have
LONG = (
    "a photo of a small {thing} on a gradient {colour} background",
    "a picture of a large {thing} on a striped {colour} background",
    "a photo of a {thing} on a gradient {colour} background on the left",
    "a picture of a {thing} on a striped {colour} background on the right",
)


@lru_cache(maxsize=1)
def judges() -> tuple[Judge, Encoder]:
    return Judge.load(), Encoder.load()


@lru_cache(maxsize=1)
def fingerprint(pipeline: Path) -> str:
    """The first digits of the hash of all weights of a pipeline."""
    total = hashlib.sha256()
    for path in sorted(pipeline.rglob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return {
        "torch": torch.__version__, "peft": peft.__version__, "diffusers": diffusers.__version__,
        "commit": found.stdout.strip() or "unknown",
    }  # fmt: skip


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Let the training take attention without a fused kernel: on a CPU, 256 tokens at most, a sixth of its time."""
    original = evaluate.base_pipeline

    def base_pipeline(*args: Any, **kwargs: Any) -> Any:
        pipe = original(*args, **kwargs)
        pipe.unet.set_attn_processor(AttnProcessor())
        return pipe

    evaluate.base_pipeline = base_pipeline
    try:
        yield
    finally:
        evaluate.base_pipeline = original


def load(pipeline: Path) -> Any:
    """In bf16 as it was trained; the VAE in fp32."""
    pipe = evaluate.load_pipeline(str(pipeline), torch.bfloat16, vae_dtype=torch.float32)
    pipe.unet.set_attn_processor(AttnProcessor())
    return pipe


def unrelated_prompts(pipeline: Path, count: int) -> list[str]:
    """Prompts of other things that the base model draws; the same for every run."""
    rng = np.random.default_rng(4242)
    names = rng.permutation(concepts(pipeline))[:count]
    return [f"{article(str(n))} on {article(str(rng.choice(list(COLOURS))))} background" for n in names]


def draw(pipe: Any, prompts: list[str], seeds: list[int], sizes: Sizes) -> list:
    """One picture a prompt, all in one batch."""
    settings = {"num_inference_steps": sizes.sampler_steps, "guidance_scale": GUIDANCE}
    with evaluate.for_sampling(pipe):
        return evaluate.sample(pipe, prompts, seeds, SIZE, batch=len(prompts), **settings)


@lru_cache(maxsize=4)
def unrelated_features(pipeline: Path, sizes: Sizes) -> Tensor:
    """What the base model makes of the unrelated prompts, N x 1280."""
    prompts = unrelated_prompts(pipeline, sizes.unrelated)
    pictures = draw(load(pipeline), prompts, [9000 + i for i in range(len(prompts))], sizes)
    return judges()[1].features(pictures)


@lru_cache(maxsize=32)
def instances(subject: str) -> tuple[tuple, Tensor]:
    """The subject's pictures and their features, N x 1280."""
    pictures = tuple(open_image(path) for path in image_files(demo.ASSETS / "subjects" / subject / "input"))
    return pictures, judges()[1].features(pictures)


def layers_of(model: torch.nn.Module) -> list[BaseTunerLayer]:
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


def update_norm(model: torch.nn.Module) -> float:
    """The Frobenius norm of the change of all adapted weights together."""
    squares = [
        m.get_delta_weight(n).detach().double().square().sum() for m in layers_of(model) for n in m.active_adapters
    ]
    return float(torch.stack(squares).sum().sqrt())


def quickest(function: Any) -> float:
    """CPU seconds."""
    found = []
    for _ in range(TIMED):
        started = time.process_time()
        function()
        found.append(time.process_time() - started)
    return min(found)


class Costs:
    """What an adapter costs a U-Net, on made-up inputs of the training's batch."""

    def __init__(self, unet: torch.nn.Module, batch: int):
        generator = torch.Generator().manual_seed(0)
        config = unet.config
        self.unet = unet
        self.inputs = (
            torch.randn(batch, config.in_channels, *[config.sample_size] * 2, generator=generator).to(unet.dtype),
            torch.full((batch,), 500),
            torch.randn(batch, 16, config.cross_attention_dim, generator=generator).to(unet.dtype),
        )

    @torch.no_grad()
    def forward(self) -> None:
        self.unet(*self.inputs)

    def update(self) -> None:
        self.unet(*self.inputs).sample.float().square().mean().backward()

    def adapted(self) -> dict[str, float]:
        """Once the U-Net has its adapter, which is merged afterwards: CPU seconds of an update (forward and backward)
        and of a forward pass with the adapter beside the weights and in them; bytes kept for the backward pass,
        parameters apart."""
        own = {p.untyped_storage().data_ptr() for p in self.unet.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        layers = layers_of(self.unet)
        for layer in layers:
            for name in layer.adapter_layer_names:
                getattr(layer, name).requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.update()
        found = {"activation_bytes": float(sum(kept.values())), "seconds_update": quickest(self.update)}
        found["seconds_unmerged"] = quickest(self.forward)
        for layer in layers:
            layer.merge()
        return found | {"seconds_merged": quickest(self.forward)}


def some_images(subject: str, count: int, folder: Path) -> list[str]:
    """Flags for a training on the first `count` of the subject's pictures."""
    source = demo.ASSETS / "subjects" / subject / "input"
    files = image_files(source)
    if count == len(files):
        return []
    if not 1 <= count < len(files):
        raise ValueError(f"{count} images of {subject}: expected 1 to {len(files)}, as many as there are")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in files[:count]:
        shutil.copy2(path, folder / path.name)
    return ["--instance_data_dir", str(folder), "--repeats", str(8 * len(files))]  # so that a batch is as full


def execute(run: Run, folder: Path, pipeline: Path = demo.PIPELINE) -> dict[str, Any]:
    """Train, draw and judge; what the training writes goes to `folder`, over what was there.

    Returns the run's fields with
        subject_right: share of pictures that the judge names after the subject, first of all names
        background_right: share of pictures with the prompt's background colour
        both_right: share of pictures with both
        similarity: mean cosine between the pictures and the instance pictures, by the encoder that is not ours
        own_similarity: the same by the judge, in its space that knows no names
        alignment: mean cosine, by the judge, between the pictures and their prompts with the subject's name
        long_right: both_right of the long prompts
        drift: mean feature distance of the unrelated prompts' pictures from the base model's
        update_norm, parameters, file_bytes, seconds_training (CPU, with what is done before the first step),
        those of `Costs` and seconds_base, seconds_run (CPU, of all this), versions
    A training that ends in no numbers, or in weights that draw none, draws no right picture: its shares are 0, and what
    was not measured is missing.
    """
    begun = time.process_time()
    flags = [
        "--demo", run.subject, "--output_dir", str(folder / "adapter"), "--seed", str(run.seed),
        "--adam_weight_decay", str(USUAL_DECAY), *TRAINING, *run.flags,  # the demo's own decay is for `default` alone
        "--learning_rate", str(run.learning_rate), "--max_train_steps", str(run.sizes.steps),
        "--train_batch_size", str(run.sizes.batch), "--checkpointing_steps", "1000000", "--export", "none",
        "--report_to", "none", "--pretrained_model_name_or_path", str(pipeline),
        *some_images(run.subject, run.images, folder / "images"),
    ]  # fmt: skip
    args = parse_args(flags, demo.settings)
    own = {k: v for k, v in asdict(run).items() if k not in ("sizes", "method")} | asdict(run.sizes)
    own |= {"key": run.key(fingerprint(pipeline)), "base": fingerprint(pipeline), "versions": versions()}

    def zero() -> dict[str, Any]:
        shares = dict.fromkeys(SHARES, 0.0)
        return own | {"diverged": True} | shares | {"seconds_run": round(time.process_time() - begun, 2)}

    try:
        with plain_attention():
            summary = dreambooth_kron.main(args)
    except DivergedError:
        return zero()
    seconds = time.process_time() - begun
    if summary["interrupted"]:
        raise KeyboardInterrupt

    judge, encoder = judges()
    sizes = run.sizes
    concept, thing = demo.subjects()[run.subject]["concept"], args.instance_prompt.split(" ", 1)[1]
    short = list(demo.prompts_of(run.subject, args.instance_prompt).items())[: sizes.backgrounds]
    long = [(c, text) for (c, _), text in zip(short, LONG, strict=False)]
    colours = [c for c, _ in short for _ in range(sizes.each)]
    prompts = [prompt for _, prompt in short for _ in range(sizes.each)]
    prompts += [text.format(thing=thing, colour=c) for c, text in long]
    seeds = [1000 * (run.seed + 1) + i for i in range(len(prompts))]
    unrelated = unrelated_prompts(pipeline, sizes.unrelated)
    pipe = load(pipeline)
    costs = Costs(pipe.unet, sizes.batch)
    seconds_base = quickest(costs.forward)
    adapters.load(pipe, folder / "adapter")
    try:
        drawn = draw(pipe, prompts + unrelated, seeds + [9000 + i for i in range(len(unrelated))], sizes)
    except DivergedError:
        return zero()
    pictures, others = drawn[: len(prompts)], drawn[len(prompts) :]

    named = [judge.names[i] == concept for i in judge.concept_scores(pictures).argmax(1).tolist()]
    wanted = colours + [c for c, _ in long]
    found = [a == b for a, b in zip(wanted, background_colour(pictures), strict=True)]
    both = [a and b for a, b in zip(named, found, strict=True)]
    n = len(colours)
    texts = [f"{article(concept)} on {article(c)} background" for c in colours]
    originals, features = instances(run.subject)
    drawn_features = encoder.features(pictures[:n] + others)
    unit = partial(torch.nn.functional.normalize, dim=1)
    mean_cosine = unit(drawn_features[:n]) @ unit(features).T
    record = own | {
        "subject_right": sum(named[:n]) / n,
        "background_right": sum(found[:n]) / n,
        "both_right": sum(both[:n]) / n,
        "similarity": float(mean_cosine.mean()),
        "own_similarity": float(judge.subject_similarity(pictures[:n], originals).mean()),
        "alignment": float(judge.text_similarity(pictures[:n], texts).diagonal().mean()),
        "long_right": sum(both[n:]) / len(long),
        "drift": float(drift(unrelated_features(pipeline, sizes), drawn_features[n:]).mean()),
        "update_norm": update_norm(pipe.unet),
        "parameters": summary["trainable parameters"],
        "file_bytes": summary["adapter file, bytes"],
        "seconds_training": round(seconds, 2),
    }  # fmt: skip
    record |= {"seconds_base": seconds_base} | costs.adapted()
    return record | {"seconds_run": round(time.process_time() - begun, 2)}
