# SPDX-License-Identifier: Apache-2.0
"""Every family of examples/dreambooth_kron.py on a tiny random pipeline: objective, training, resume, export."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import dreambooth_pipelines as tiny
import tiny_families
from accelerate.state import AcceleratorState, PartialState
from diffusers import DDPMScheduler, DiffusionPipeline

from examples import dreambooth_kron
from examples.dreambooth import adapters, data, evaluate, families, objective
from examples.dreambooth.arguments import parse_args

FLOW = list(tiny_families.MAKERS)
KINDS = ["sd", "sdxl", *FLOW]
LENGTH = 320  # tokens of a prompt: the tiny tokenizers read templates letter by letter
CAPTIONS = ["a dog", "a sks dog on a hill", "sks"]


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Folder of a kind's pipeline, made once."""

    @functools.cache
    def folder(kind):
        made = tmp_path_factory.mktemp(kind)
        return tiny_families.build(made, kind) if kind in FLOW else tiny.build(made, kind)

    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tiny.images(tmp_path_factory.mktemp("captioned"), len(CAPTIONS))
    for i, caption in enumerate(CAPTIONS):
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


def train(kind, pipeline, pictures, output, *more):
    size = ["--resolution", "16", "--max_sequence_length", str(LENGTH)] if kind in FLOW else []
    args = [
        "--pretrained_model_name_or_path", pipeline(kind), "--instance_data_dir", pictures, "--output_dir", output,
        "--max_train_steps", 2, "--train_batch_size", 2, "--report_to", "none", "--krona_a_out", 4, "--krona_a_in", 4,
        "--export", "none", *size, *more,
    ]  # fmt: skip
    try:
        return dreambooth_kron.main(parse_args([str(a) for a in args]))
    finally:
        AcceleratorState._reset_state(True)


def weights(output):
    return {
        f"{f.parent.name}.{k}": v for f in output.glob("*/adapter_model.safetensors") for k, v in load_file(f).items()
    }


# -- the objective, written again ------------------------------------------------------------------------------------
# One sample at a time and without padding, so that batches, masks and lists are checked too.


def patches(x):
    """c x h x w -> tokens of 2 x 2 pixels."""
    c, h, w = x.shape
    return x.view(c, h // 2, 2, w // 2, 2).permute(1, 3, 0, 2, 4).reshape(1, -1, 4 * c)


def unpatched(tokens, shape):
    c, h, w = shape
    return tokens.reshape(h // 2, w // 2, c, 2, 2).permute(2, 0, 3, 1, 4).reshape(shape)


def positions(height, width, before=1, after=0):
    zeros = [torch.arange(1)]
    return torch.cartesian_prod(*zeros * before, torch.arange(height), torch.arange(width), *zeros * after)


def latents(kind, pipe, pixels, noise):
    vae, config = pipe.vae, pipe.vae.config
    if kind in ("qwen_image", "krea2"):
        posterior = vae.encode(pixels[None, :, None]).latent_dist
        x = (posterior.mean + posterior.std * noise[:, None])[0, :, 0]
        mean, std = (torch.tensor(config[k]).view(-1, 1, 1) for k in ("latents_mean", "latents_std"))
        return (x - mean) / std
    posterior = vae.encode(pixels[None]).latent_dist
    if kind in ("flux2", "flux2_klein"):
        c, h, w = posterior.mean.shape[1:]
        x = posterior.mean[0].view(c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3).reshape(4 * c, h // 2, w // 2)
        mean, variance = (t.view(-1, 1, 1) for t in (vae.bn.running_mean, vae.bn.running_var))
        return (x - mean) / (variance + config.batch_norm_eps).sqrt()
    x = posterior.mean[0] if kind == "z_image" else (posterior.mean + posterior.std * noise)[0]
    return (x - (config.shift_factor or 0)) * config.scaling_factor


def velocity(kind, pipe, x, sigma, prompt):
    model, length = pipe.transformer, {"max_sequence_length": LENGTH}
    h, w = x.shape[1:]
    if kind == "sd3":
        hidden, _, pooled, _ = pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False, **length)
        return model(x[None], timestep=1000 * sigma, encoder_hidden_states=hidden, pooled_projections=pooled)[0][0]
    if kind == "flux":
        hidden, pooled, ids = pipe.encode_prompt(prompt, **length)
        out = model(
            patches(x), timestep=sigma, guidance=torch.tensor([3.5]), encoder_hidden_states=hidden, txt_ids=ids,
            pooled_projections=pooled, img_ids=positions(h // 2, w // 2),
        )[0]  # fmt: skip
        return unpatched(out, x.shape)
    if kind in ("flux2", "flux2_klein"):
        hidden, ids = pipe.encode_prompt(prompt, **length)
        guidance = torch.tensor([3.5]) if kind == "flux2" else None
        out = model(
            x.flatten(1).T[None], timestep=sigma, guidance=guidance, encoder_hidden_states=hidden, txt_ids=ids,
            img_ids=positions(h, w, 1, 1)[None],
        )[0]  # fmt: skip
        return out[0].T.reshape(x.shape)
    if kind == "qwen_image":
        hidden, mask = pipe.encode_prompt(prompt, **length)
        assert mask is None
        return unpatched(model(patches(x), hidden, timestep=sigma, img_shapes=[[(1, h // 2, w // 2)]])[0], x.shape)
    if kind == "krea2":
        hidden, mask = pipe.encode_prompt(prompt, **length)
        hidden = hidden[mask][None]  # without the padding in its middle
        ids = torch.cat([torch.zeros(hidden.shape[1], 3), positions(h // 2, w // 2)])
        return unpatched(model(patches(x), hidden, timestep=sigma, position_ids=ids)[0], x.shape)
    (hidden,), _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, **length)
    return -model([x[:, None]], 1 - sigma, [hidden])[0][0][:, 0]


def noise_prediction(kind, pipe, x, t, prompt, view):
    if kind == "sd":
        hidden, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        return pipe.unet(x[None], t, hidden)[0][0]
    hidden, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    ids = torch.tensor([[*view["original_size"], *view["crop"], *view["target_size"]]])
    return pipe.unet(x[None], t, hidden, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids})[0][0]


def reference_loss(kind, pipe, batch):
    """Mean over the samples, from the pixels, captions and seeds of a batch."""
    losses = []
    for i, (number, purpose) in enumerate(batch["noise_key"]):
        rng = data.torch_rng(0, number, purpose)
        pixels, prompt = batch["pixels"][i].double(), batch["caption"][i]
        shape = latents(kind, pipe, pixels, torch.zeros(1, 1, 1)).shape
        x0 = latents(kind, pipe, pixels, torch.randn(shape, generator=rng))
        noise = torch.randn(shape, generator=rng)
        if kind in FLOW:
            density = (
                torch.normal(0.0, 1.0, (1,), generator=rng).sigmoid() if kind == "sd3" else torch.rand(1, generator=rng)
            )
            sigma = pipe.scheduler.sigmas[(1000 * density).long()]
            noisy = (1 - sigma) * x0 + sigma * noise
            prediction, target = velocity(kind, pipe, noisy, sigma, prompt), noise - x0
            if kind == "sd3":  # the error in the image
                prediction, target = noisy - sigma * prediction, x0
        else:
            torch.randn(shape[0], 1, 1, generator=rng)  # for --noise_offset, which is 0
            t = torch.randint(1000, (), generator=rng)
            alpha = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.double()[t]
            view = {k: batch[k][i] for k in ("original_size", "crop", "target_size")}
            prediction = noise_prediction(kind, pipe, alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, t, prompt, view)
            target = noise
        losses.append(((prediction - target) ** 2).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loss_is_the_familys(pipeline, pictures, tmp_path, monkeypatch, kind):
    """The script's first loss, everything in float64; a new adapter changes nothing."""
    batches, losses = [], []
    collate, loss_of = data.collate, objective.loss_of
    monkeypatch.setattr(data, "collate", lambda samples: batches.append(collate(samples)) or batches[-1])
    monkeypatch.setattr(objective, "loss_of", lambda *a: losses.append(loss_of(*a)) or losses[-1])
    monkeypatch.setattr(adapters, "dtype_of", lambda _: torch.float64)
    monkeypatch.setattr(evaluate, "base_pipeline", functools.partial(evaluate.base_pipeline, dtype=torch.float64))
    with torch.enable_grad():
        train(kind, pipeline, pictures, tmp_path, "--max_train_steps", 1)
    pipe = DiffusionPipeline.from_pretrained(pipeline(kind)).to(torch.float64)
    assert len({len(caption) for caption in batches[0]["caption"]}) == 2  # of different lengths
    torch.testing.assert_close(losses[0], reference_loss(kind, pipe, batches[0]), rtol=1e-7, atol=0)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FLOW)
def test_training_resume_and_export(pipeline, pictures, tmp_path, monkeypatch, kind):
    """Two updates change the adapter alone, all of it; a resumed run is the same; diffusers draws the same."""
    loaded, load = [], evaluate.load_pipeline
    monkeypatch.setattr(evaluate, "load_pipeline", lambda *a, **kw: loaded.append(load(*a, **kw)) or loaded[-1])
    out = tmp_path / "dog"
    train(kind, pipeline, pictures, out, "--checkpointing_steps", 1, "--export", "lora", "--learning_rate", 0.1)
    trained = weights(out)
    idle = {k.rpartition(".krona_B")[0] for k, v in trained.items() if k.endswith("krona_B") and not v.any()}
    assert trained and bool(idle) == type(families.of(loaded[0])).spare, idle
    before = DiffusionPipeline.from_pretrained(pipeline(kind))
    for name, part in before.components.items():
        if isinstance(part, torch.nn.Module):
            now = {k.replace(".base_layer", ""): v for k, v in getattr(loaded[0], name).state_dict().items()}
            assert all(torch.equal(v, now[k]) for k, v in part.state_dict().items()), name
    assert not trained.keys() & before.transformer.state_dict().keys()

    exported = out / "dog.safetensors"
    drawn = {}
    for source in ("base", "folder", "file"):
        pipe = DiffusionPipeline.from_pretrained(pipeline(kind))
        pipe.set_progress_bar_config(disable=True)
        if source == "folder":
            adapters.load(pipe, out)
        elif source == "file":
            pipe.load_lora_weights(str(exported))
        drawn[source] = draw(pipe.to(torch.float64))
    moved = (drawn["folder"] - drawn["base"]).norm()
    assert moved > 0 and (drawn["file"] - drawn["folder"]).norm() <= 4 * torch.finfo(torch.float16).eps * moved

    train(kind, pipeline, pictures, out, "--resume_from_checkpoint", "checkpoint-1", "--learning_rate", 0.1)
    again = weights(out)
    assert trained.keys() == again.keys() and all(torch.equal(v, again[k]) for k, v in trained.items())


def draw(pipe):
    family = families.of(pipe, LENGTH)
    return pipe(
        prompt=["sks dog"], num_inference_steps=2, height=16, width=16, output_type="pt",
        generator=torch.Generator().manual_seed(0), **family.sampling(None),
    ).images.double()  # fmt: skip
