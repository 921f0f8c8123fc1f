# SPDX-License-Identifier: Apache-2.0
"""DreamBooth with a Kronecker adapter, for the families of models in examples/dreambooth/families/.

    python examples/dreambooth_kron.py                          # the shipped pipeline and subject, minutes on a CPU
    accelerate launch examples/dreambooth_kron.py --mixed_precision fp16 --output_dir output/my-dog \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --instance_data_dir my-dog --instance_prompt "a photo of sks dog"

The flags are those of diffusers' train_dreambooth_lora_sdxl.py, plus the adapter's (see --help). This file reads from
top to bottom: models, data, adapter, optimizer, loop, results. The helpers lie in examples/dreambooth/.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.dreambooth.interrupts import end_at_once, exit_with, interrupts, left_to_the_main_process

if __name__ == "__main__":
    end_at_once()  # as long as it takes to import what follows

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    LoggerType,
    ProjectConfiguration,
    set_seed,
)
from diffusers.training_utils import cast_training_params, free_memory, offload_models
from diffusers.utils.import_utils import is_xformers_available
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from examples.dreambooth import (
    DivergedError,
    TrainingError,
    adapters,
    card,
    data,
    demo,
    evaluate,
    families,
    init_adapter,
    memory,
    objective,
    one_line,
    optim,
    quantized,
    sharded,
)
from examples.dreambooth.arguments import (
    adapter_config,
    adapter_name,
    check_family,
    compared,
    parse_args,
    public_settings,
    settings,
    without_effect_on,
)
from examples.dreambooth.checkpoint import Checkpoints, is_write_error, numbered
from examples.dreambooth.class_images import make_class_images
from examples.dreambooth.disk_cache import DiskCache
from examples.dreambooth.exports import export_for_other_tools, remove_exports
from examples.dreambooth.families.base import Trained
from examples.dreambooth.files import TEMPORARY, aside, clean, remove, replace_folder
from examples.dreambooth.prompts import TextEmbeddings, say_cut


def main(args: Any) -> dict[str, Any]:
    """Train as `args` say; returns the closing summary."""
    started, before = time.time(), memory.peak()
    index = evaluate.read_index(args.pretrained_model_name_or_path, args.revision, args.cache_dir)
    kind = families.family_of(index, args.pretrained_model_name_or_path)
    check_family(args, kind)
    output = Path(args.output_dir)
    name = args.hub_model_id or output.resolve().name
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=tracker(args.report_to),
        project_config=ProjectConfiguration(project_dir=output, logging_dir=output / args.logging_dir),
        kwargs_handlers=[
            # SDXL's first text encoder ends before its last layer, and skipped layers have no gradient
            DistributedDataParallelKwargs(
                find_unused_parameters=args.train_text_encoder or args.module_dropout != 0 or kind.spare
            )
        ],
    )
    sharded.load_whole(accelerator)
    device, say = accelerator.device, accelerator.print
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if accelerator.is_main_process:
        make_output(output)
        for folder in (output, output / "validation"):
            clean(folder)
            interrupts.take_back.append(functools.partial(clean, folder))
    checkpoints = Checkpoints(accelerator, output, vars(args), args.checkpoints_total_limit, args.overwrite_output_dir)
    resumed = checkpoints.find(args.resume_from_checkpoint)  # before the slow parts, so that a mistake shows at once
    repo = card.create(name, args.hub_token) if args.push_to_hub and accelerator.is_main_process else None

    # -- models --------------------------------------------------------------------------------------------------------
    weight_dtype = adapters.dtype_of(accelerator.mixed_precision)
    if accelerator.distributed_type == DistributedType.FSDP:
        weight_dtype = adapters.dtype_of("no")  # FSDP keeps one dtype a module and casts by itself
    load_base = functools.partial(
        evaluate.base_pipeline, args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path,
        revision=args.revision, variant=args.variant, cache_dir=args.cache_dir,
        quantize=quantized.for_pipelines(
            args.bnb_quantization_config_path, args.bnb_quantize_text_encoders, weight_dtype, device
        ),
    )  # fmt: skip
    pipe = load_base(dtype=weight_dtype, vae_dtype=adapters.dtype_of("no"))
    family = families.of(pipe, args.max_sequence_length, args.guidance_scale)
    for note in without_effect_on(args, family):
        say(f"warning: {note}")
    base, encoders = family.model, family.text_encoders()
    if family.objective == "noise":
        goal = objective.NoisePrediction(pipe.scheduler.config, args.snr_gamma, args.noise_offset)
    else:
        goal = objective.RectifiedFlow(
            pipe.scheduler.config, args.weighting_scheme or family.weighting, args.logit_mean, args.logit_std,
            args.mode_scale, shift=family.shift if args.resolution_shift and family.shifts() else None,
            precondition=family.precondition if args.precondition_outputs is None else bool(args.precondition_outputs),
        )  # fmt: skip
    resolution = args.resolution or family.resolution()
    evaluate.check_area(pipe, family.resolution(), {"--resolution": resolution})
    if args.validation_prompt:
        evaluate.check_steps(pipe, "--validation_inference_steps", args.validation_inference_steps)
    buckets = data.choose_buckets(args.aspect_ratio_buckets, resolution, family.multiple())

    # -- data ----------------------------------------------------------------------------------------------------------
    if args.dataset_name:
        pictures = data.read_dataset(
            args.dataset_name, config=args.dataset_config_name, split=args.dataset_split, cache_dir=args.cache_dir,
            image_column=args.image_column, caption_column=args.caption_column, default_caption=args.instance_prompt,
            say=say,
        )  # fmt: skip
    else:
        pictures = data.read_folder(args.instance_data_dir, args.instance_prompt, args.caption_column, say=say)
    class_pictures = []
    if args.with_prior_preservation:
        make_class_images(
            load_base, Path(args.class_data_dir), args.class_prompt, args.num_class_images, (resolution, resolution),
            accelerator, seed=args.seed, batch=args.sample_batch_size, precision=args.prior_generation_precision,
            sampling={} if family.objective == "noise" else family.sampling(None),  # as diffusers' scripts have it
        )  # fmt: skip
        found = data.read_folder(args.class_data_dir, args.class_prompt, captions=False, say=say)
        class_pictures = found[: args.num_class_images]
        if len(found) > len(class_pictures):
            say(f"note: {len(found) - len(class_pictures)} class images more than --num_class_images are not used.")
    dataset = data.DreamBoothDataset(
        pictures, buckets, class_pictures, seed=args.seed, center_crop=args.center_crop, random_flip=args.random_flip,
        caption_dropout=args.caption_dropout, interpolation=args.image_interpolation_mode,
    )  # fmt: skip
    small = data.enlarged(pictures, buckets)
    if small:
        say(f"note: {len(small)} images ({small[0]}, ...) are smaller than what they are brought to: enlarged.")
    captions = [p.caption for p in (*pictures, *class_pictures)]
    say_cut(family.windows(), [*captions, *(args.validation_prompt or ())], say)
    batches = data.Batches(
        dataset, args.train_batch_size, accelerator.process_index, accelerator.num_processes, args.repeats, args.seed
    )

    resting = torch.device("cpu") if args.offload else device
    quantized.prepare(base, resting, weight_dtype)
    pipe.vae.requires_grad_(False).to(resting)  # stays in fp32: half precision makes NaN with SDXL's VAE
    trained_text = family.trained_text if args.train_text_encoder else ()
    for part, encoder in encoders.items():
        quantized.prepare(encoder, device if part in trained_text else resting, weight_dtype)
    movable = [encoder for encoder in encoders.values() if not quantized.is_quantized(encoder)]

    denoiser = Trained(family)
    folder = args.cache_to_disk
    texts = DiskCache(folder, encoders.values(), family.title, family.max_sequence_length) if folder else None
    embed = TextEmbeddings(family, args.train_text_encoder, device, texts)
    if set(encoders) > set(trained_text):
        with offload_models(*movable, device=device, offload=args.offload):
            embed.precompute(captions + [""] * (args.caption_dropout > 0))
    if not trained_text:
        denoiser.encoders = torch.nn.ModuleList()  # no longer needed: out of the wrapper's sight
    if args.cache_latents:
        with offload_models(pipe.vae, device=device, offload=args.offload):
            dataset.cache_latents(
                family.encode_image,
                lambda x: tqdm(x, desc="Latents", disable=not accelerator.is_local_main_process),
                DiskCache(folder, [pipe.vae], family.title) if folder else None,
            )
    if not args.validation_prompt:  # nothing asks for these again: the final images are of a pipeline of their own
        unused = [part for part in encoders if part not in trained_text] + ["vae"] * args.cache_latents
        for part in unused:
            encoders.pop(part, None)
            setattr(pipe, part, None)
        movable = []
    free_memory()
    if not quantized.is_quantized(base):
        base.to(device)  # after the encoders' turn, so that the two need not be there at once

    # -- adapter -------------------------------------------------------------------------------------------------------
    set_seed(args.seed)  # the same start, whether or not class images were made just now
    if args.init_adapter:  # a checkpoint has the layers and factors that it has
        source = str(resumed or args.init_adapter)
        trained = init_adapter.begin(pipe, source, family.denoiser, vars(args), args.train_text_encoder, say)
    else:
        text_config = adapter_config(args, "text_encoder") if args.train_text_encoder else None
        trained = adapters.add(pipe, adapter_config(args, family.denoiser, family.targets()), text_config, trained_text)
    cast_training_params(list(trained.values()), dtype=torch.float32)
    if args.enable_xformers_memory_efficient_attention:
        if not is_xformers_available():
            raise TrainingError("--enable_xformers_memory_efficient_attention needs xformers: pip install xformers")
        base.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        base.enable_gradient_checkpointing()
        for part in trained_text:
            encoders[part].gradient_checkpointing_enable({"use_reentrant": False})
    if args.torch_compile:
        # the transformer blocks, where diffusers names them: most of the work, a fraction of the compile time
        (base.compile_repeated_blocks if getattr(base, "_repeated_blocks", None) else base.compile)()

    # -- optimizer -----------------------------------------------------------------------------------------------------
    scale = batches.global_batch * args.gradient_accumulation_steps if args.scale_lr else 1
    lr, text_lr = args.learning_rate * scale, args.text_encoder_lr * scale
    groups = optim.parameter_groups(
        trained,
        {part: lr if part == family.denoiser else text_lr for part in trained},
        {
            part: args.adam_weight_decay if part == family.denoiser else args.adam_weight_decay_text_encoder
            for part in trained
        },
        *(1.0 if own is None else own / args.learning_rate for own in (args.learning_rate_a, args.learning_rate_b)),
    )
    optimizer = optim.build_optimizer(
        groups, args.optimizer, lr, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
        eight_bit=args.use_8bit_adam, warmup_steps=args.lr_warmup_steps, more=args.optimizer_args,
        prodigy={k: getattr(args, f"prodigy_{k}") for k in optim.PRODIGY},
    )  # fmt: skip
    # as in diffusers, an epoch shows each instance image and as many class images as there are
    epoch = max(batches.per_epoch, math.ceil(len(class_pictures) / batches.global_batch))
    steps_per_epoch = math.ceil(epoch / args.gradient_accumulation_steps)
    total = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    if args.lr_warmup_steps > total:
        say(f"warning: --lr_warmup_steps {args.lr_warmup_steps} is longer than the training of {total} updates.")
    lr_scheduler = optim.build_schedule(
        optimizer, args.lr_scheduler, total, warmup_steps=args.lr_warmup_steps, cycles=args.lr_num_cycles,
        power=args.lr_power, step_rules=args.lr_step_rules,
    )  # fmt: skip

    # -- accelerate ----------------------------------------------------------------------------------------------------
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it asks the data loader otherwise
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    is_sharded = sharded.is_sharded(accelerator)
    sharded.announce_factors(accelerator, trained.values())
    parameters = [p for p in model.parameters() if p.requires_grad]
    base_model = card.base_model_name(args.pretrained_model_name_or_path, output)
    metadata = {k: str(v) for k, v in public_settings(args).items()}
    if args.instance_prompt:
        metadata["trigger_words"] = args.instance_prompt  # the key that the exports and `convert` know

    def save_adapters(folder: Path) -> None:
        """Called by every process; the main one writes."""
        whole = denoiser.by_component(sharded.trained_state(accelerator, model)) if is_sharded else None
        if accelerator.is_main_process:
            adapters.save(pipe, trained, folder, base_model, metadata, whole)

    def diverged(what: str) -> DivergedError:
        return DivergedError(
            f"{what} update {step}: try a lower --learning_rate, or --mixed_precision bf16 or no. Checkpoints of "
            f"earlier updates are in {output}."
        )

    def check_weights() -> None:
        """Before they are saved: the loss tells of the last update at the next one."""
        finite = torch.tensor(sharded.all_finite(parameters), device=device)
        if not accelerator.gather(finite).all():
            raise diverged("The adapter's weights are NaN or infinite after")

    def on_save(models: list, weights: list, folder: str) -> None:
        weights.clear()  # not the frozen base model, only the adapters
        save_adapters(Path(folder))

    def on_load(models: list, folder: str) -> None:
        models.clear()
        if accelerator.is_fsdp2 or not is_sharded:
            adapters.load_state(trained, Path(folder))

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.register_load_state_pre_hook(on_load)
    accelerator.register_for_checkpointing(lr_scheduler)
    accelerator.init_trackers("dreambooth_kron", config=settings(args))

    step = first_step = checkpoints.resume(resumed)
    if step >= total:
        say(f"note: the checkpoint is of update {step} and {total} were asked for: nothing is left to train.")
    batches.start = step * args.gradient_accumulation_steps
    batches.stop = total * args.gradient_accumulation_steps
    loader = DataLoader(
        dataset, batch_sampler=batches, collate_fn=data.collate, num_workers=args.dataloader_num_workers,
        generator=torch.Generator().manual_seed(args.seed), worker_init_fn=left_to_the_main_process,
    )  # fmt: skip
    count = sum(adapters.trainable(m) for m in trained.values())
    name_of_class = index["_class_name"]
    say(f"{name_of_class}: {len(pictures)} images, {len(class_pictures)} class images, {len(batches.groups)} shape(s)")
    say(f"{args.adapter_type} on {', '.join(trained)}: {count:,} trainable parameters")
    global_batch = batches.global_batch * args.gradient_accumulation_steps
    say(f"{total} updates of {global_batch} images, {weight_dtype}, on {device}")
    loaded = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    caches = {"text embeddings": embed.known, "latents": [p.latents for p in (*pictures, *class_pictures)]}
    counted = memory.estimate(loaded, parameters, optimizer, caches)
    say("\n".join(memory.described(counted)) + "; not counted: activations, and what Python and libraries take")

    def validate(phase: str, pipeline: Any, at: int) -> list:
        """Fixed-seed images to trackers and disk (main process)."""
        settings = families.of(pipeline, args.max_sequence_length).sampling(args.validation_guidance_scale)
        images = evaluate.validation(
            pipeline, args.validation_prompt, args.num_validation_images, args.seed, buckets[0], accelerator.autocast(),
            num_inference_steps=args.validation_inference_steps, **settings,
        )  # fmt: skip
        evaluate.track(accelerator, phase, images, shown_prompts, at)
        evaluate.save_images(images, output / "validation" / f"{phase}-{at}", args.num_validation_images)
        return images

    shown_prompts = evaluate.repeat(args.validation_prompt or [], args.num_validation_images)
    validating = bool(shown_prompts)
    if validating and sharded.hides_parameters(accelerator):
        say("note: the model is spread over the processes: validation images are made after the training only.")
    every = args.validation_steps or args.validation_epochs * steps_per_epoch

    # -- the loop ------------------------------------------------------------------------------------------------------
    model.train()
    optim.set_train_mode(optimizer, True)
    losses: list[torch.Tensor] = []
    loop_started = time.time()
    progress = tqdm(total=total, initial=step, desc="Steps", disable=not accelerator.is_local_main_process)
    with interrupts.deferred(), progress as bar:  # Ctrl-C: after the update at hand
        for micro_step, batch in enumerate(loader, start=batches.start):
            # everything random in a micro-step follows from its number: nothing depends on what ran before it
            torch.manual_seed(
                data.torch_rng(args.seed, micro_step, data.DROPOUT).initial_seed() + accelerator.process_index
            )
            with accelerator.accumulate(model):
                with offload_models(pipe.vae, device=device, offload=args.offload and "pixels" in batch):
                    mean, std = data.latents_of(batch, family.encode_image, device)
                posterior, noise, times = objective.draw(batch, mean.shape[1:], args.seed, goal, device)
                noisy, level, target, weight = goal.add_noise(mean + std * posterior, noise, times)
                text = embed(batch["caption"]) | family.conditions(batch, device)

                prediction = model(noisy.to(weight_dtype), level, text)

                own = len(prediction) // 2 if class_pictures else len(prediction)  # instances first, then class images
                loss = objective.loss_of(prediction[:own], target[:own], weight[:own])
                if class_pictures:
                    loss = loss + args.prior_loss_weight * objective.loss_of(
                        prediction[own:], target[own:], weight[own:]
                    )
                accelerator.backward(loss)
                losses.append(accelerator.gather(loss.detach()).mean())
                if accelerator.sync_gradients and args.max_grad_norm:
                    norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue

            lr_scheduler.step()
            step += 1
            shown = {"loss": torch.stack(losses).mean().item(), "lr": lr_scheduler.get_last_lr()[0]}
            losses.clear()
            if not math.isfinite(shown["loss"]):
                raise diverged(f"The loss is {shown['loss']} at")
            bar.update()
            bar.set_postfix(loss=f"{shown['loss']:.4f}", lr=f"{shown['lr']:.1e}")
            if args.max_grad_norm:
                shown["grad_norm"] = float(sharded.whole(norm))
            shown["it_per_s"] = (step - first_step) / (time.time() - loop_started)
            accelerator.log(shown, step=step)

            # images first: schedule-free optimizers swap their weights for them, and a resumed run must see the same
            if validating and step % every == 0 and step < total and not sharded.hides_parameters(accelerator):
                optim.set_train_mode(optimizer, False)
                if accelerator.is_main_process:
                    with offload_models(pipe.vae, *movable, device=device, offload=args.offload):
                        validate("validation", pipe, step)
                optim.set_train_mode(optimizer, True)
                accelerator.wait_for_everyone()
            if step % args.checkpointing_steps == 0:
                check_weights()
                checkpoints.save(step)
            if interrupts.requested:
                accelerator.set_trigger()
            if accelerator.check_trigger():
                break
        seconds = time.time() - loop_started
        check_weights()
        if interrupted := step < total:
            saved = checkpoints.save(step)
            say(f"Interrupted after {step} of {total} updates.")
            if saved:
                say(f"Saved {saved}; the same command with --resume_from_checkpoint latest goes on from there.")

    # -- results -------------------------------------------------------------------------------------------------------
    optim.set_train_mode(optimizer, False)
    accelerator.wait_for_everyone()
    final = output / f"{TEMPORARY}final"
    try:
        with interrupts.deferred(second_ends=False):  # all of it or nothing
            save_adapters(final)
            if accelerator.is_main_process:
                checkpoints.set_aside()
                for old in remove_exports(output):
                    say(f"Removed {old}: it was made of earlier weights.")
                for part in trained:
                    replace_folder(final / part, output / part)
                final.rmdir()
                remove_untrained(output, trained, say)
    except Exception as error:
        if is_write_error(error):
            clean(output)
            raise TrainingError(checkpoints.write_message(output, error)) from error
        raise
    if not interrupted:
        interrupts.check()
    summary = {
        "pipeline": name_of_class,
        "adapter": args.adapter_type,
        "trainable parameters": count,
        "adapter file, bytes": adapters.file_size(output) if accelerator.is_main_process else 0,
        "updates": step,
        "updates per second": round((step - first_step) / seconds, 3) if seconds else 0.0,
        "training time, s": round(seconds, 1),
        "memory before the models, MiB": before // memory.MIB,
        "peak memory, MiB": memory.peak() // memory.MIB,
    }
    if accelerator.is_main_process:
        files = [str(output / part) for part in trained]
        say(f"Adapter saved in {', '.join(files)}")
        if args.export != "none" and not interrupted:
            wanted = args.adapter_type if args.export == "auto" and args.adapter_type != "krona" else args.export
            files += export_for_other_tools(output, wanted, args.pretrained_model_name_or_path, say)
        images = []
        if validating and not interrupted:  # from the saved file, in a pipeline that has seen no training
            family.pipe = None
            del pipe, base, denoiser, model, optimizer, embed
            free_memory()
            saved_pipe = load_base(dtype=weight_dtype)
            adapters.load(saved_pipe, output)
            saved_pipe.vae.to(torch.float32)
            images = validate("final", saved_pipe.to(device), step)
        card.write_card(
            output, name, args.adapter_type, base_model, args.instance_prompt, images, shown_prompts,
            public_settings(args), summary, [Path(f).name for f in files], family.tags, args.train_text_encoder,
        )  # fmt: skip
        summary["total time, s"] = round(time.time() - started, 1)
        with aside(output / "training_summary.json") as path:
            path.write_text(json.dumps(summary, indent=1) + "\n")
        width = max(map(len, summary))
        say(
            "\n".join(
                f"  {k:<{width}}  {v:,}" if isinstance(v, int) else f"  {k:<{width}}  {v}" for k, v in summary.items()
            )
        )
        if args.push_to_hub and not interrupted:
            say(f"Uploaded to {card.push(output, repo, args.hub_token, args.logging_dir)}")
    accelerator.end_training()
    summary["interrupted"] = interrupted
    return summary


def tracker(wanted: str) -> str | None:
    if wanted == "none":
        return None
    known = [kind.value for kind in LoggerType]
    if wanted not in known:
        raise TrainingError(f"--report_to {wanted}: expected none or one of {', '.join(known)}.")
    if wanted not in ("all", *(kind.value for kind in get_available_trackers())):
        print(f"note: {wanted} is missing (pip install {wanted}): losses are not logged; see --report_to.")
        return None
    return wanted


def make_output(folder: Path) -> None:
    """The output folder, which must not be a pipeline: the adapter's folders have its components' names."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = {name: {p.name for p in (folder / name).glob("*")} for name in adapters.COMPONENTS}
    except OSError as error:
        raise TrainingError(f"--output_dir {folder} cannot be created: {error}.") from error
    taken = [name for name, files in inside.items() if files and "adapter_config.json" not in files]
    if (folder / "model_index.json").exists() or taken:
        found = "model_index.json" if not taken else f"{', '.join(taken)} without adapter_config.json"
        raise TrainingError(
            f"--output_dir {folder} holds a pipeline ({found}), which the adapter would replace: expected a new folder "
            "or one of an earlier training; choose another."
        )
    folders = [*(folder / name for name in (*adapters.COMPONENTS, "validation")), *numbered(folder)]
    files = [folder / name for name in ("README.md", "training_summary.json")]
    misplaced = [p for p in folders if os.path.lexists(p) and not p.is_dir()] + [p for p in files if p.is_dir()]
    if misplaced:
        kind, other = ("folder", "file") if misplaced[0] in files else ("file", "folder")
        raise TrainingError(
            f"{misplaced[0]} is a {kind}, where the training writes a {other}: move it, or choose another --output_dir."
        )


def remove_untrained(output: Path, trained: Iterable[str], say: Callable[[str], None]) -> None:
    """Adapters of an earlier run on models that this run did not train: they would be loaded with its own."""
    for name in set(adapters.COMPONENTS) - set(trained):
        if (output / name / "adapter_config.json").is_file():
            remove(output / name)
            say(f"Removed {output / name}: an earlier run's adapter, which this run did not train.")


def run(argv: list[str]) -> int:
    """The command line: arguments, training, demo; mistakes end in one line, not in a traceback."""
    with interrupts.handled():
        try:
            args = parse_args(argv or ["--demo", demo.DEFAULT_SUBJECT], demo.settings)
            trained = {}
            for one in (args, compared(args, demo.LEARNING_RATES)):
                if one is None:
                    continue
                summary = main(one)
                if summary["interrupted"]:
                    return interrupts.ended()
                trained[adapter_name(one)] = {
                    "folder": Path(one.output_dir),
                    "parameters": summary["trainable parameters"],
                    "bytes": summary["adapter file, bytes"],
                }
            if args.demo and int(os.environ.get("RANK", 0)) == 0:
                demo.judge_and_show(
                    args.demo, args.pretrained_model_name_or_path, Path(args.instance_data_dir), args.instance_prompt,
                    trained, Path(args.output_dir), args.resolution,
                )  # fmt: skip
            return 0
        except TrainingError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            print(f"error: {error}: free some disk space. What was saved before is whole.", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as error:
            if not memory.is_too_little(error):
                raise
            print(
                f"error: not enough memory ({one_line(error)[:200]}): try --gradient_checkpointing, --train_batch_size "
                "1 or --mixed_precision bf16, or see memory in examples/README.md. What was saved before is whole.",
                file=sys.stderr,
            )
            return 2
        except KeyboardInterrupt:
            return interrupts.ended()


if __name__ == "__main__":
    exit_with(run)
