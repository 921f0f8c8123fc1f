# SPDX-License-Identifier: Apache-2.0
"""The model card, and the upload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from PIL import Image

from . import TrainingError, one_line

NAMES = {"krona": "KronA (Kronecker)", "lora": "LoRA", "lokr": "LoKr"}
BODY = """# {{ name }}

<Gallery />

{{ kind }} weights for [{{ base_model }}](https://huggingface.co/{{ base_model }}), trained with
[DreamBooth](https://dreambooth.github.io/). Text encoder trained: {{ text_encoder }}.

## Trigger

Use `{{ prompt }}` in the prompt.

## Use

```python
{{ usage }}
```

## Files

{{ files }}

## Training

| setting | value |
| --- | --- |
{{ settings }}

| result | value |
| --- | --- |
{{ summary }}
"""


def usage(args: Any) -> str:
    lines = [
        "from diffusers import DiffusionPipeline",
        "from peft_krona.pipelines import load_krona_weights",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{args.pretrained_model_name_or_path}")',
        'load_krona_weights(pipe, "path/or/id/of/this/model")',
        f'image = pipe("{trigger(args)}").images[0]',
    ]
    if args.adapter_type != "krona":
        return "# python examples/generate.py --adapter THIS_FOLDER --prompt ...   (PEFT folders, one per component)"
    return "\n".join(lines)


def trigger(args: Any) -> str:
    return args.instance_prompt or "(see the captions of the training images)"


def write_card(
    folder: Path,
    args: Any,
    images: list[Image.Image],
    prompts: list[str],
    settings: dict,
    summary: dict,
    files: list[str],
) -> Path:
    """Write README.md with the gallery's images beside it."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    widget = []
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=False)):
        image.save(folder / f"image_{i}.png")
        widget.append({"text": prompt, "output": {"url": f"image_{i}.png"}})
    data = ModelCardData(
        library_name="diffusers",
        base_model=args.pretrained_model_name_or_path,
        instance_prompt=trigger(args),
        widget=widget or None,
    )
    card = ModelCard.from_template(
        data,
        template_str="---\n{{ card_data }}\n---\n\n" + BODY,
        name=name,
        kind=NAMES[args.adapter_type],
        text_encoder=args.train_text_encoder,
        prompt=trigger(args),
        usage=usage(args),
        files="\n".join(f"- `{f}`" for f in files),
        settings=table(settings),
        summary=table(summary),
    )
    family = "stable-diffusion-xl" if summary["pipeline"].startswith("StableDiffusionXL") else "stable-diffusion"
    tags = ["text-to-image", "diffusers", "diffusers-training", "dreambooth", args.adapter_type, family]
    populate_model_card(card, tags=[*tags, "template:sd-lora"])
    path = folder / "README.md"
    card.save(path)
    return path


def table(values: dict[str, Any]) -> str:
    return "\n".join(f"| {k} | {str(v).replace('|', chr(92) + '|')} |" for k, v in values.items())


def create(folder: Path, args: Any) -> str:
    """Make the repository before the training, so that a problem shows at once; returns its id.

    Raises:
        TrainingError: if the Hub refuses or cannot be reached.
    """
    name = args.hub_model_id or folder.resolve().name
    try:
        return create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    except Exception as error:  # the Hub's client has many kinds of errors; all mean the same here
        raise TrainingError(
            f"--push_to_hub: the repository {name} could not be made ({one_line(error)}). Check `hf auth "
            "login`, --hub_model_id and the connection, or drop --push_to_hub."
        ) from error


def push(folder: Path, args: Any, repo: str) -> str:
    """Upload the folder without checkpoints and logs; returns the repository's id.

    Raises:
        TrainingError: if the Hub refuses or cannot be reached. What was trained is in `folder` all the same.
    """
    try:
        upload_folder(
            repo_id=repo, folder_path=folder, commit_message="End of training", token=args.hub_token,
            ignore_patterns=["checkpoint-*", "abandoned-*", ".tmp-*", f"{args.logging_dir}/*", "class_images/*"],
        )  # fmt: skip
    except Exception as error:  # the Hub's client has many kinds of errors; all mean the same here
        raise TrainingError(f"The upload to the Hub failed ({error}). Everything is in {folder}.") from error
    return repo
