# SPDX-License-Identifier: Apache-2.0
"""The model card, and the upload."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from PIL import Image

from . import TrainingError, one_line
from .files import aside

NAMES = {"krona": "KronA (Kronecker)", "lora": "LoRA", "lokr": "LoKr"}
BODY = """# {{ name }}

<Gallery />

{{ kind }} weights for {{ base_link }}, trained with
[DreamBooth](https://dreambooth.github.io/). Text encoder trained: {{ text_encoder }}.

## Trigger

Use `{{ prompt }}` in the prompt.

## Use

```python
{{ usage }}
```
{% if needs_import %}
The import of `peft_krona` is needed in every program that loads it, with PEFT's own functions too; without, PEFT ends
in `KeyError: 'KRONA'`.
{% endif %}
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


def base_model_name(path: str, output: Path) -> str:
    """How the adapter's files name their base model: a Hub id as it is, a folder relative to the adapter's.

    An absolute path would be of use to nobody else, and tell where this machine keeps its files. What has only the
    root in common with `output` is named by its last part.
    """
    if not os.path.isdir(path):
        return path
    folder = Path(path).resolve()
    snapshot = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", folder.as_posix() + "/")
    if snapshot:  # the Hub's cache
        return f"{snapshot[1]}/{snapshot[2]}"
    try:
        common = Path(os.path.commonpath([folder, output.resolve()]))
    except ValueError:  # two drives
        return folder.name
    if common == Path(folder.anchor):
        return folder.name
    return Path(os.path.relpath(folder, output.resolve())).as_posix()


def link(base_model: str) -> str:
    """To the Hub, if that is where it is."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base_model)
    return f"[{base_model}](https://huggingface.co/{base_model})" if is_id else f"`{base_model}`"


def usage(kind: str, base_model: str, prompt: str) -> str:
    lines = [
        "from diffusers import DiffusionPipeline",
        "from peft_krona.pipelines import load_krona_weights",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{base_model}")',
        'load_krona_weights(pipe, "path/or/id/of/this/model")',
        f'image = pipe("{prompt}").images[0]',
    ]
    if kind != "krona":
        return "# python examples/generate.py --adapter THIS_FOLDER --prompt ...   (PEFT folders, one per component)"
    return "\n".join(lines)


def write_card(
    folder: Path,
    name: str,
    kind: str,
    base_model: str,
    trigger: str | None,
    images: list[Image.Image | None],
    prompts: list[str],
    settings: dict,
    summary: dict,
    files: list[str],
    tags: Sequence[str] = (),
    text_encoder: bool = False,
) -> Path:
    """Write README.md with the gallery's images beside it.

    `kind`: a key of NAMES. `trigger`: the instance prompt. `tags`: of the family. `text_encoder`: whether it was
    trained.
    """
    trigger = trigger or "(see the captions of the training images)"
    widget = []
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=False)):
        if image is None:
            continue
        with aside(folder / f"image_{i}.png") as temporary:
            image.save(temporary)
        widget.append({"text": prompt, "output": {"url": f"image_{i}.png"}})
    data = ModelCardData(
        library_name="diffusers",
        base_model=base_model,
        instance_prompt=trigger,
        widget=widget or None,
    )
    card = ModelCard.from_template(
        data,
        template_str="---\n{{ card_data }}\n---\n\n" + BODY,
        name=name,
        base_link=link(base_model),
        kind=NAMES[kind],
        text_encoder=text_encoder,
        prompt=trigger,
        usage=usage(kind, base_model, trigger),
        needs_import=kind == "krona",
        files="\n".join(f"- `{f}`" for f in files),
        settings=table(settings),
        summary=table(summary),
    )
    common = ("text-to-image", "diffusers", "diffusers-training", "dreambooth", kind)
    populate_model_card(card, tags=[*common, *tags, "template:sd-lora"])
    path = folder / "README.md"
    with aside(path) as temporary:
        card.save(temporary)
    return path


def table(values: dict[str, object]) -> str:
    return "\n".join(f"| {k} | {str(v).replace('|', chr(92) + '|')} |" for k, v in values.items())


def create(name: str, token: str | None) -> str:
    """Make the repository `name` before the training, so that a problem shows at once; returns its id.

    Raises:
        TrainingError: if the Hub refuses or cannot be reached.
    """
    try:
        return create_repo(name, exist_ok=True, token=token).repo_id
    except Exception as error:  # the Hub's client has many kinds of errors; all mean the same here
        raise TrainingError(
            f"--push_to_hub: the repository {name} could not be made ({one_line(error)}). Check `hf auth "
            "login`, --hub_model_id and the connection, or drop --push_to_hub."
        ) from error


def push(folder: Path, repo: str, token: str | None, logs: str) -> str:
    """Upload the folder without checkpoints and logs (in `logs`, relative to it); returns the repository's id.

    Raises:
        TrainingError: if the Hub refuses or cannot be reached. What was trained is in `folder` all the same.
    """
    try:
        upload_folder(
            repo_id=repo, folder_path=folder, commit_message="End of training", token=token,
            ignore_patterns=["checkpoint-*", "abandoned-*", ".tmp-*", f"{logs}/*", "class_images/*"],
        )  # fmt: skip
    except Exception as error:  # the Hub's client has many kinds of errors; all mean the same here
        raise TrainingError(f"The upload to the Hub failed ({error}). Everything is in {folder}.") from error
    return repo
