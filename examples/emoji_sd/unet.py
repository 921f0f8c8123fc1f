"""The diffusion model: a U-Net on cached latents, trained with its text encoder; v-prediction, zero terminal SNR."""

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from .loop import Loop, adamw, autocast

STEPS, BATCH, LR, EMA, DROPOUT = 18_500, 32, 1e-3, 0.999, 0.1
WIDTHS = (64, 128, 192)


def build(latent_size: int, latent_channels: int, text_width: int) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=latent_size, in_channels=latent_channels, out_channels=latent_channels,
        block_out_channels=WIDTHS, layers_per_block=1, cross_attention_dim=text_width,
        attention_head_dim=tuple(width // 64 for width in WIDTHS),  # diffusers takes it for the number of heads
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def build_scheduler() -> DDIMScheduler:
    """v-prediction from pure noise, so that the mean colour of a picture is the model's to choose."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip


def train(folder, latents: tuple[Tensor, Tensor], weights: Tensor, text_encoder: nn.Module, ids: Tensor, empty: Tensor,
          steps: int = STEPS, deadline=None, after_save=None) -> Loop:  # fmt: skip
    """`latents` scaled means and deviations, N x C x H x W; `ids` N x K x L, the tokens of K captions each; `empty` L,
    those of the empty prompt; `weights` N, how often each picture is taken.  The text encoder learns on with
    the U-Net: it is small and costs next to nothing.
    The averaged weights, `split(loop.averaged())`, are the result."""
    mean, std = latents
    unet = build(mean.shape[-1], mean.shape[1], text_encoder.config.hidden_size)
    unet.set_attn_processor(AttnProcessor())  # on 16 to 64 tokens a fifth less time a step than the fused kernel
    noise_scheduler = DDPMScheduler.from_config(build_scheduler().config)
    timesteps = noise_scheduler.config.num_train_timesteps

    def loss(step):
        pick = torch.multinomial(weights, BATCH, replacement=True)
        x = mean[pick].float()
        x = x + std[pick].float() * torch.randn_like(x)
        words = ids[pick, torch.randint(ids.shape[1], (BATCH,))]
        words[torch.rand(BATCH) < DROPOUT] = empty
        noise = torch.randn_like(x)
        t = ((torch.rand(()) + torch.arange(BATCH) / BATCH) % 1 * timesteps).long()  # stratified
        with autocast():
            context = text_encoder(words).last_hidden_state
            prediction = unet(noise_scheduler.add_noise(x, noise, t), t, context).sample.float()
        value = mse_loss(prediction, noise_scheduler.get_velocity(x, noise, t))
        return value, {"loss": value}

    both = nn.ModuleDict({"unet": unet, "text": text_encoder})
    # SOAP learns more a step, but here a step costs more than twice as much: AdamW is ahead at equal time
    optimizer = adamw(list(both.parameters()), LR)
    loop = Loop("unet", folder, both, optimizer, steps, seed=3, ema=EMA, warmup=500, deadline=deadline)
    return loop.run(loss, after_save)


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the U-Net and those of the text encoder."""
    return tuple({k[len(p):]: v for k, v in state.items() if k.startswith(p)} for p in ("unet.", "text."))  # fmt: skip
