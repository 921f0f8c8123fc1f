# SPDX-License-Identifier: Apache-2.0
"""Every family of examples/dreambooth_kron.py on a tiny random pipeline: objective, training, resume, export."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import dreambooth_pipelines as tiny
import tiny_families
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from examples import dreambooth_kron, generate
from examples.dreambooth import TrainingError, adapters, data, evaluate, families, objective, prompts
from examples.dreambooth.arguments import check_family, parse_args, without_effect_on

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
        try:
            return tiny_families.build(made, kind) if kind in FLOW else tiny.build(made, kind)
        except AttributeError as error:
            pytest.skip(f"diffusers is too old: {error}")

    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tiny.images(tmp_path_factory.mktemp("captioned"), len(CAPTIONS))
    for i, caption in enumerate(CAPTIONS):
        (folder / f"{i}.txt").write_text(caption)
    return folder


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


TEXT = "--train_text_encoder"


@pytest.mark.parametrize(
    ("kind", "more"), [*((kind, []) for kind in KINDS), *((kind, [TEXT]) for kind in ("sd", "sdxl", "sd3", "flux"))]
)
@torch.no_grad()
def test_the_loss_is_the_familys(pipeline, pictures, tmp_path, monkeypatch, kind, more):
    """The script's first loss, everything in float64; a new adapter changes nothing."""
    batches, losses = [], []
    collate, loss_of = data.collate, objective.loss_of
    monkeypatch.setattr(data, "collate", lambda samples: batches.append(collate(samples)) or batches[-1])
    monkeypatch.setattr(objective, "loss_of", lambda *a: losses.append(loss_of(*a)) or losses[-1])
    monkeypatch.setattr(adapters, "dtype_of", lambda _: torch.float64)
    monkeypatch.setattr(evaluate, "base_pipeline", functools.partial(evaluate.base_pipeline, dtype=torch.float64))
    with torch.enable_grad():
        train(kind, pipeline, pictures, tmp_path, "--max_train_steps", 1, *more)
    pipe = DiffusionPipeline.from_pretrained(pipeline(kind)).to(torch.float64)
    assert len({len(caption) for caption in batches[0]["caption"]}) == 2  # of different lengths
    torch.testing.assert_close(losses[0], reference_loss(kind, pipe, batches[0]), rtol=1e-7, atol=0)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "more"), [*((kind, []) for kind in FLOW), ("sd3", [TEXT]), ("flux", [TEXT])])
def test_training_resume_and_export(pipeline, pictures, tmp_path, monkeypatch, kind, more):
    """Two updates change the adapter alone, all of it; a resumed run is the same; diffusers draws the same."""
    loaded, parts, load = [], [], evaluate.load_pipeline

    def load_and_keep(*args, **more):  # also what the training lets go of when it needs it no longer
        loaded.append(load(*args, **more))
        parts.append(dict(loaded[-1].components))
        return loaded[-1]

    monkeypatch.setattr(evaluate, "load_pipeline", load_and_keep)
    out = tmp_path / "dog"
    more = ["--checkpointing_steps", 1, "--learning_rate", 0.1, *more]
    train(kind, pipeline, pictures, out, "--export", "lora", *more)
    trained = weights(out)
    trained_text = type(families.of(loaded[0])).trained_text if TEXT in more else ()
    assert {part.name for part in out.iterdir() if (part / "adapter_config.json").is_file()} == {
        "transformer",
        *trained_text,
    }
    idle = {k.rpartition(".krona_B")[0] for k, v in trained.items() if k.endswith("krona_B") and not v.any()}
    assert trained and bool(idle) == type(families.of(loaded[0])).spare, idle
    before = DiffusionPipeline.from_pretrained(pipeline(kind))
    for name, part in before.components.items():
        if isinstance(part, torch.nn.Module):
            now = {k.replace(".base_layer", ""): v for k, v in parts[0][name].state_dict().items()}
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

    common = ["--adapter", out, "--prompt", "sks", "a dog", "--num_inference_steps", 1, "--height", 16, "--width", 16]
    args = [str(a) for a in (*common, "--output_dir", tmp_path / "drawn", "--compare", "--merged", "--batch_size", 2)]
    files = generate.main(generate.build_parser().parse_args(args))  # the base model is found from the adapter's folder
    assert len(files) == 5 and all(f.is_file() for f in files)
    if not families.of(loaded[0]).negative:
        with pytest.raises(TrainingError, match=r"--negative_prompt: FLUX.* has no use for one; leave it out"):
            generate.main(generate.build_parser().parse_args([*args, "--negative_prompt", "rain"]))

    train(kind, pipeline, pictures, out, "--resume_from_checkpoint", "checkpoint-1", *more)
    again = weights(out)
    assert trained.keys() == again.keys() and all(torch.equal(v, again[k]) for k, v in trained.items())


def draw(pipe):
    family = families.of(pipe, LENGTH)
    return pipe(
        prompt=["sks dog"], num_inference_steps=2, height=16, width=16, output_type="pt",
        generator=torch.Generator().manual_seed(0), **family.sampling(None),
    ).images.double()  # fmt: skip


# -- everything else -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "adapter"), [("qwen_image", "krona"), ("z_image", "lora"), ("flux2_klein", "lokr")])
def test_everything_at_once(pipeline, pictures, tmp_path, monkeypatch, kind, adapter):
    """A mask, a list and latents in patches, with what people combine."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))  # minutes otherwise
    out = tmp_path / "dog"
    summary = train(
        kind, pipeline, pictures, out, "--gradient_checkpointing", "--random_flip", "--with_prior_preservation",
        "--class_data_dir", tmp_path / "class", "--class_prompt", "a dog", "--num_class_images", 1, "--cache_latents",
        "--caption_dropout", 0.5, "--offload", "--mixed_precision", "bf16", "--gradient_accumulation_steps", 2,
        "--validation_prompt", "a", "--num_validation_images", 2, "--validation_steps", 1, "--checkpointing_steps", 1,
        "--validation_inference_steps", 1, "--aspect_ratio_buckets", "16,24;24,16", "--weighting_scheme", "mode",
        "--resolution_shift", "--adapter_type", adapter, "--rank", 2, "--torch_compile",
    )  # fmt: skip
    assert (
        compiled
        and summary["updates"] == 2
        and sorted(p.name for p in out.glob("checkpoint-*"))
        == [
            "checkpoint-1",
            "checkpoint-2",
        ]
    )
    assert len(list((out / "validation" / "final-2").glob("[0-9]*.png"))) == 2
    assert families.known()[summary["pipeline"]].tags[0] in (out / "README.md").read_text()
    assert weights(out) and all(v.isfinite().all() for v in weights(out).values())


CHROMA = """
from examples.dreambooth.families.flux import Flux


class Chroma(Flux):
    title = "Chroma"
    pipelines = ("ChromaPipeline",)
    components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")

    def windows(self):
        return [(self.pipe.tokenizer, self.max_sequence_length)]

    def encode_prompt(self, prompts):
        hidden, _, mask, *_ = self.pipe.encode_prompt(
            prompts, device=self.text_device(), do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return [{"hidden": h, "mask": m} for h, m in zip(hidden, mask)]

    def predict(self, model, noisy, level, text):
        b, c, h, w = noisy.shape
        hidden = text["hidden"].to(noisy.dtype)
        velocity = model(
            hidden_states=self.pipe._pack_latents(noisy, b, c, h, w), timestep=level, encoder_hidden_states=hidden,
            attention_mask=self.pipe._prepare_attention_mask(b, h * w // 4, noisy.dtype, text["mask"].bool()),
            txt_ids=hidden.new_zeros(hidden.shape[1], 3),
            img_ids=self.pipe._prepare_latent_image_ids(b, h // 2, w // 2, noisy.device, noisy.dtype),
        )[0]
        return self.pipe._unpack_latents(velocity, h, w, 1)
"""


def test_a_new_file_is_a_new_family(pictures, tmp_path, monkeypatch):
    folder = tiny_families.build(tmp_path / "chroma", "chroma")
    with pytest.raises(
        TrainingError, match=r"is a ChromaPipeline: expected a text-to-image pipeline of one of the known"
    ):
        train("chroma", lambda _: folder, pictures, tmp_path / "out")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "chroma.py").write_text(CHROMA)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "more")])
    families.known.cache_clear()
    try:
        assert train("chroma", lambda _: folder, pictures, tmp_path / "out", "--resolution", 16)["updates"] == 2
    finally:
        families.known.cache_clear()
        sys.modules.pop("examples.dreambooth.families.chroma")
    assert any(v.any() for k, v in weights(tmp_path / "out").items() if k.endswith("krona_B"))


# -- noise levels and weights ----------------------------------------------------------------------------------------

SIGMAS = torch.linspace(1, 0.001, 1000)  # of a scheduler without a shift


@pytest.mark.parametrize(
    ("scheme", "density", "weight"),
    [
        ("none", lambda z, u: u, lambda s: torch.ones_like(s)),
        ("sigma_sqrt", lambda z, u: u, lambda s: s**-2),
        ("cosmap", lambda z, u: u, lambda s: 2 / (torch.pi * (1 - 2 * s + 2 * s**2))),
        ("logit_normal", lambda z, u: 1 / (1 + torch.exp(-(0.3 + 0.5 * z))), lambda s: torch.ones_like(s)),
        ("mode", lambda z, u: 1 - u - 0.7 * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u), lambda s: torch.ones_like(s)),
    ],
)
@pytest.mark.parametrize("precondition", [False, True])
def test_weighting_schemes(scheme, density, weight, precondition):
    """As the SD3 paper (arXiv 2403.03206, section 3.1) has them."""
    goal = objective.RectifiedFlow(
        FlowMatchEulerDiscreteScheduler().config, scheme, 0.3, 0.5, 0.7, precondition=precondition
    )
    x, n = torch.randn(2, 8, 4, 2, 2, dtype=torch.float64)
    times, expected = [], []
    for seed in range(8):
        shape, rng = torch.Size([4, 2, 2]), torch.Generator()
        times.append(goal.time(shape, rng.manual_seed(seed)))
        z, u = torch.randn(1, generator=rng.manual_seed(seed)), torch.rand(1, generator=rng.manual_seed(seed))
        expected.append((1000 * density(z, u)).long()[0])
    assert torch.stack(times).tolist() == torch.stack(expected).tolist()
    noisy, level, target, weights = goal.add_noise(x, n, torch.stack(times))
    s = level.double().view(-1, 1, 1, 1)
    assert level.tolist() == goal.scheduler.sigmas[torch.stack(times)].tolist()
    assert (level - SIGMAS[torch.stack(times)]).abs().max() <= 2 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(noisy, s * n + (1 - level).double().view(-1, 1, 1, 1) * x, rtol=1e-12, atol=1e-12)
    assert torch.equal(target, n - x)
    wanted = weight(level.double()) * (level.double() ** 2 if precondition else 1)
    assert ((weights - wanted).abs() <= 8 * torch.finfo(torch.float32).eps * wanted).all()


def test_densities_stay_in_the_table():
    """u of 1 is what float32 makes of a wide logit-normal, and what `mode` ends in."""
    goal = objective.RectifiedFlow(FlowMatchEulerDiscreteScheduler().config, "logit_normal", 0.0, 1000.0)
    found = {int(goal.time(torch.Size([1, 2, 2]), torch.Generator().manual_seed(i))) for i in range(32)}
    assert (min(found), max(found)) == (0, 999)


@pytest.mark.parametrize("kind", ["flux", "flux2_klein", "qwen_image", "krea2"])
def test_the_resolution_shift_is_the_pipelines(pipeline, monkeypatch, kind):
    """mu as the pipeline hands it to its scheduler for this size of image; sigma' = e^mu / (e^mu + 1 / sigma - 1)."""
    pipe = DiffusionPipeline.from_pretrained(pipeline(kind))
    pipe.set_progress_bar_config(disable=True)
    family, seen = families.of(pipe, LENGTH), []
    set_timesteps = pipe.scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def watched(*args, **kwargs):
        seen.append(kwargs["mu"])
        return set_timesteps(*args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "set_timesteps", watched)
    pipe(prompt="a", num_inference_steps=50 if "2_" in kind else 1, height=16, width=24, **family.sampling(None))
    mean, _ = family.encode_image(torch.zeros(1, 3, 16, 24))
    mu = family.shift(*mean.shape[-2:])
    assert family.shifts() and abs(mu - seen[0]) <= 1e-12
    goal = objective.RectifiedFlow(pipe.scheduler.config, shift=family.shift)
    times = torch.tensor([3, 500, 998])
    level = goal.add_noise(mean.expand(3, -1, -1, -1), mean.expand(3, -1, -1, -1), times)[1].double()
    e, s = torch.tensor(mu).exp().double(), goal.scheduler.sigmas[times].double()
    assert (level - e / (e + 1 / s - 1)).abs().max() <= 4 * torch.finfo(torch.float32).eps


# -- mistakes --------------------------------------------------------------------------------------------------------

FLUX_INDEX = {"_class_name": "FluxPipeline"} | {
    part: ["diffusers", "X"] for part in families.known()["FluxPipeline"].components
}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "KandinskyPipeline"}, r"p is a KandinskyPipeline: expected .* one of the known families: .*"
         r"FLUX\.1 \(FluxPipeline\); .*Choose such a pipeline, or add a family \(examples/README\.md\)"),
        ({}, "p is a None: expected"),
        ({"_class_name": ["pipeline_own", "OwnPipeline"]}, "p is a OwnPipeline: expected"),
        ({"_class_name": "FluxFillPipeline"}, "p is a FluxFillPipeline: expected"),
        (FLUX_INDEX | {"text_encoder_2": [None, None]}, r"p is a FluxPipeline without text_encoder_2: FLUX\.1 needs t"),
        ({k: v for k, v in FLUX_INDEX.items() if k != "vae"}, r"without vae: FLUX\.1 needs transformer, v.*complete"),
        ({"_class_name": "StableDiffusionXLPipeline"}, "without unet, vae, text_encoder, text_encoder_2, .*complete"),
    ],
)  # fmt: skip
def test_pipelines_that_are_not_trained(index, message):
    with pytest.raises(TrainingError, match=message) as raised:
        families.family_of(index, "p")
    assert "\n" not in str(raised.value)


def test_libraries_that_are_too_old_or_missing(pipeline, monkeypatch):
    monkeypatch.setattr(families, "diffusers", SimpleNamespace(__version__="0.20"))
    with pytest.raises(
        TrainingError, match=r"p is a FluxPipeline, which diffusers 0\.20 does not have: update diffusers"
    ):
        families.family_of(FLUX_INDEX, "p")
    monkeypatch.undo()

    def broken(*args, **kwargs):
        raise ImportError("PixtralProcessor requires the Torchvision library\nbut it was not found")

    monkeypatch.setattr(evaluate.DiffusionPipeline, "from_pretrained", broken)
    with pytest.raises(
        TrainingError, match=r"could not be loaded as .*: PixtralProcessor requires the Torchvision library bu"
    ):
        evaluate.load_pipeline(str(pipeline("flux")))


def test_sd3_without_t5(pipeline, pictures, tmp_path):
    """Which people leave out to save memory."""
    pipe = DiffusionPipeline.from_pretrained(pipeline("sd3"), text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "sd3")
    out = tmp_path / "out"
    assert train("sd3", lambda _: tmp_path / "sd3", pictures, out, TEXT, "--max_train_steps", 1)["updates"] == 1
    assert {key.partition(".")[0] for key in weights(out)} == {"transformer", "text_encoder", "text_encoder_2"}


def test_the_readme_names_every_family():
    table = (Path(dreambooth_kron.__file__).parent / "README.md").read_text(encoding="utf-8")
    missing = [name for name, family in families.known().items() if f"| {family.title} | `{name}`" not in table]
    assert not missing


def test_a_mistake_shows_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps(FLUX_INDEX | {"text_encoder_2": [None, None]}))
    args = [
        "--pretrained_model_name_or_path",
        tmp_path,
        "--instance_data_dir",
        tmp_path,
        "--output_dir",
        tmp_path / "o",
    ]
    assert dreambooth_kron.run([*map(str, args), "--instance_prompt", "x"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is a FluxPipeline without text_encoder_2:")
    assert not (tmp_path / "o").exists()


BASIC = ["--pretrained_model_name_or_path", "p", "--instance_data_dir", "d", "--instance_prompt", "x"]


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("QwenImagePipeline", [TEXT], r"encoders of Qwen-Image are not trained, only CLIP, which .*; drop the flag"),
        (
            "StableDiffusion3Pipeline",
            ["--max_sequence_length", "513"],
            r"513: Stable Diffusion 3 and 3\.5 reads at most",
        ),
    ],
)
def test_flags_that_a_family_refuses(name, more, message):
    with pytest.raises(TrainingError, match=message):
        check_family(parse_args([*BASIC, *more]), families.known()[name])


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("Flux", ["--snr_gamma", "5"], "--snr_gamma has no effect: FLUX.1 is trained by flow matching."),
        ("ZImage", ["--noise_offset", "0.1"], "--noise_offset has no effect: Z-Image is trained by flow matching."),
        ("StableDiffusion", ["--weighting_scheme", "mode", "--mode_scale", "1"], "--weighting_scheme, --mode_scale has "
         "no effect: Stable Diffusion 1.x and 2.x is trained to predict noise, not by flow matching."),
        ("StableDiffusionXL", ["--precondition_outputs", "1"], "--precondition_outputs has no effect: Stable Diff"),
        ("StableDiffusionXL", ["--max_sequence_length", "80"], "--max_sequence_length has no effect: Stable Diff"),
        ("QwenImage", ["--logit_std", "2"], "--logit_std has no effect: only with --weighting_scheme logit_normal."),
        ("StableDiffusion3", ["--logit_std", "2"], ""),
        ("StableDiffusion3", ["--mode_scale", "2"], "--mode_scale has no effect: only with --weighting_scheme mode."),
        ("StableDiffusion3", ["--resolution_shift"], "--resolution_shift has no effect: this pipeline"),
        ("Flux", ["--resolution_shift", "--guidance_scale", "1", "--weighting_scheme", "cosmap"], ""),
        ("Flux2Klein", ["--guidance_scale", "1"], "--guidance_scale has no effect: this model is not"),
    ],
)  # fmt: skip
def test_flags_without_effect_in_a_family(name, more, said):
    config = {"guidance_embeds": name == "Flux", "use_dynamic_shifting": not name.startswith("Stable")}
    part = SimpleNamespace(config=config)
    family = families.known()[f"{name}Pipeline"](SimpleNamespace(unet=part, transformer=part, scheduler=part))
    found = " ".join(without_effect_on(parse_args([*BASIC, *more]), family))
    assert found.startswith(said) and bool(found) == bool(said), found


@pytest.mark.parametrize(
    ("name", "few_steps", "guidance", "expected"),
    [
        ("StableDiffusion", False, None, {"guidance_scale": 7.0}),
        ("Flux", False, 2.0, {"guidance_scale": 2.0, "max_sequence_length": 512}),
        ("Flux2Klein", False, None, {"guidance_scale": 4.0, "max_sequence_length": 512}),
        ("Flux2Klein", True, None, {"guidance_scale": 1.0, "max_sequence_length": 512}),
        ("Flux2Klein", True, 3.0, {"guidance_scale": 3.0, "max_sequence_length": 512}),
        ("Krea2", True, None, {"guidance_scale": 0.0, "max_sequence_length": 512}),
        ("QwenImage", False, 2.0, {"true_cfg_scale": 2.0, "negative_prompt": " ", "max_sequence_length": 1024}),
    ],
)
def test_guidance_of_pictures(name, few_steps, guidance, expected):
    family = families.known()[f"{name}Pipeline"](SimpleNamespace(config={"is_distilled": few_steps}))
    assert family.sampling(guidance) == expected
    if name == "Krea2":
        assert family.shift(64, 64) == 1.15  # as the pipeline has it then, whatever the size


@pytest.mark.parametrize("kind", FLOW)
def test_long_prompts_are_named(pipeline, kind):
    pipe, said = DiffusionPipeline.from_pretrained(pipeline(kind)), []
    windows = families.of(pipe, LENGTH).windows()
    prompts.say_cut(windows, ["a dog"], said.append)
    assert not said
    prompts.say_cut(windows, ["a dog", "x" * LENGTH], said.append)
    (line,) = said
    assert line.startswith("warning: 1 prompts are longer than what the text encoder reads, and are cut: shorten them")
    assert f"of at most {max(limit for _, limit in windows)}, loses its end 'x" in line
    prompts.say_cut(windows, ["x" * 100], said.append)
    note = "note: one text encoder reads 77 tokens only and cuts 1 prompts; another reads them whole."
    assert said[1:] == ([note] if kind in ("sd3", "flux") else [])
    if kind not in ("sd3", "flux", "krea2"):
        with pytest.raises(TrainingError, match=r"--max_sequence_length: the text encoder's template .* need \d+ more"):
            prompts.say_cut(families.of(pipe, 4).windows(), ["a dog"], said.append)
