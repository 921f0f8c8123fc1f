# SPDX-License-Identifier: Apache-2.0
"""The page itself: what is shown, and what each button calls."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from examples.dreambooth import TrainingError, demo
from examples.dreambooth.arguments import LEARNING_RATES
from examples.dreambooth.data import image_files

from . import takeaway, uploads
from .models import Counter, Studio
from .training import Settings, Training, is_shipped

KINDS = {"KronA": "krona", "LoRA": "lora", "LoKr": "lokr"}
OWN = "my own pictures"
SECONDS_BETWEEN_UPDATES = 0.4  # of the page during a training
ROWS = 3  # adapters that can be combined
CSS = """
.picture img { width: 100% !important; height: 100% !important; object-fit: contain }
footer { display: none !important }
"""
# fonts of the computer: nothing is fetched from outside
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class App:
    """The state behind the page: one base pipeline, adapters in `root`, at most one training at a time.

    `pipeline`: folder of a Stable Diffusion pipeline. `root`: where adapters are kept, a folder for each name.
    """

    def __init__(self, pipeline: str, root: Path):
        self.pipeline, self.root = pipeline, root
        self.shipped = is_shipped(pipeline)
        self.scratch = tempfile.TemporaryDirectory(prefix="peft-krona-app-")  # uploads and files to take away
        self.counter, self.studio = Counter(pipeline), Studio(pipeline)
        self.trainings: dict[str, Training] = {}  # by the visitor's session

    def close(self) -> None:
        """Stop what runs (each with a checkpoint) and remove the temporary files."""
        for training in self.trainings.values():
            training.stop()
        self.scratch.cleanup()

    # -- training ------------------------------------------------------------------------------------------------------
    def learning_rate(self, kind: str) -> float:
        """Where to start: the demo's for the small shipped model (LoKr's as KronA's), else the script's own."""
        rates = demo.LEARNING_RATES if self.shipped else LEARNING_RATES
        return rates.get(kind, rates["krona"])

    def count(self, kind: str, a_out: float, a_in: float, rank: float) -> str:
        try:
            n = self.counter.count(KINDS[kind], int(a_out or 0), int(a_in or 0), int(rank or 0))
        except TrainingError as error:
            return f"⚠️ {error}"
        return f"**{n:,}** trainable parameters, {n * 4 / 2**20:.2f} MiB in a file"

    def settings(self, visitor: str, subject: str, files: list[str] | None, noun: str, name: str, kind: str,
                 a_out: float, a_in: float, rank: float, steps: float, rate: float, seed: float,
                 previews: float) -> Settings:  # fmt: skip
        """The visitor's words and numbers, checked; uploads are copied out of the browser's folder.

        Raises:
            TrainingError: names what is missing or wrong.
        """
        if not noun.strip():
            raise TrainingError("Say what the subject is in a word or two, such as “dog”.")
        slug = re.sub(r"[^\w-]+", "-", name.strip()).strip("-")[:60]
        if not slug:
            raise TrainingError("Give the adapter a name.")
        if not steps or steps < 1 or not rate or rate <= 0:
            raise TrainingError(f"Expected at least one update and a positive learning rate, got {steps} and {rate}.")
        if subject == OWN:
            pictures = Path(self.scratch.name) / f"pictures-{visitor}-{slug}"
            fresh = pictures.with_name(f"{pictures.name}-new")
            shutil.rmtree(fresh, ignore_errors=True)  # a check that failed half way
            uploads.take(files or [], fresh)
            shutil.rmtree(pictures, ignore_errors=True)
            fresh.rename(pictures)
        else:
            pictures = demo.ASSETS / "subjects" / subject
        self.counter.count(KINDS[kind], int(a_out), int(a_in), int(rank))  # refuses factors before a process starts
        return Settings(
            pipeline=self.pipeline, pictures=pictures, noun=noun.strip(), output=self.root / slug, kind=KINDS[kind],
            a_out=int(a_out), a_in=int(a_in), rank=int(rank), steps=int(steps), learning_rate=float(rate),
            seed=int(seed or 0), previews=int(previews or 0),
        )  # fmt: skip

    def train(self, request: gr.Request, *values: Any) -> Iterator[tuple]:
        """Start a training and show it until it ends. Others wait in the page's queue meanwhile."""
        try:
            settings = self.settings(request.session_hash, *values)
        except TrainingError as error:
            gr.Warning(str(error))
            yield f"error: {error}", *[gr.skip()] * 4
            return
        yield from self._show(request, Training(settings), resume=False)

    def go_on(self, request: gr.Request) -> Iterator[tuple]:
        """Continue the visitor's stopped training from its checkpoint."""
        before = self.trainings.get(request.session_hash)
        if before is None or not before.code:
            raise gr.Error("There is no stopped training of yours to go on with.", print_exception=False)
        yield from self._show(request, Training(before.settings, losses=dict(before.losses)), resume=True)

    def _show(self, request: gr.Request, training: Training, resume: bool) -> Iterator[tuple]:
        self.trainings[request.session_hash] = training
        shown = 0.0
        for state in training.follow(resume):
            if state.code is not None or time.monotonic() - shown > SECONDS_BETWEEN_UPDATES:
                shown = time.monotonic()
                yield self.view(state)

    @staticmethod
    def view(training: Training) -> tuple:
        """(status, bar, loss curve, previews, log) for the page."""
        share = training.step / training.settings.steps
        bar = (
            '<div style="background:#ddd;border-radius:6px">'
            f'<div style="background:#6366f1;border-radius:6px;height:12px;width:{min(share, 1):.1%}"></div></div>'
        )
        curve = pd.DataFrame({"update": list(training.losses), "loss": list(training.losses.values())})
        pictures = [(str(path), label) for path, label in training.previews()[:8]]
        return training.state(), bar, curve, pictures, "\n".join(training.log)

    def stop(self, request: gr.Request) -> None:
        training = self.trainings.get(request.session_hash)
        if training is None or training.code is not None:
            raise gr.Error("No training of yours is running.", print_exception=False)
        training.stop()

    def leave(self, request: gr.Request) -> None:
        """The browser's tab was closed: nobody could stop the training or see its end."""
        training = self.trainings.pop(request.session_hash, None)
        if training is not None:
            training.stop()

    # -- adapters ------------------------------------------------------------------------------------------------------
    def adapters(self) -> list[str]:
        return sorted({path.parents[1].name for path in self.root.glob("*/*/adapter_config.json")})

    def folder(self, name: str | None) -> Path:
        """Only folders that are listed: a name from a browser is no path."""
        if name not in self.adapters():
            raise gr.Error("Choose an adapter; train one first if there is none.", print_exception=False)
        return self.root / name

    def refresh(self) -> list[Any]:
        """New choices for every list of adapters."""
        names = self.adapters()
        newest = max(names, key=lambda n: (self.root / n).stat().st_mtime, default=None)
        rows = [gr.Dropdown(choices=["", *names], value=newest if i == 0 else "") for i in range(ROWS)]
        return [*rows, gr.Dropdown(choices=names, value=newest), gr.Dropdown(choices=names, value=newest)]

    def draw(self, prompt: str, seed: float, steps: float, guidance: float, *rows: Any) -> tuple:
        weights = [(self.folder(name), float(w)) for name, w in zip(rows[::2], rows[1::2], strict=True) if name]
        if len({folder for folder, _ in weights}) < len(weights):
            raise gr.Error("An adapter is chosen twice: choose each once.", print_exception=False)
        try:
            return self.studio.draw(
                prompt, int(seed or 0), weights, steps=int(steps or 0), guidance=float(guidance or 0)
            )
        except TrainingError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def learned(self, name: str | None) -> tuple[str, str]:
        folder = self.folder(name)
        picture = Path(self.scratch.name) / f"learned-{folder.name}.png"
        try:
            return str(picture), takeaway.learned(folder, self.pipeline, picture)
        except TrainingError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def export(self, name: str | None, tool: str) -> tuple[list[str], str]:
        folder = self.folder(name)
        place = Path(tempfile.mkdtemp(dir=self.scratch.name))
        try:
            files, words = takeaway.export(folder, self.pipeline, tool, place / f"{folder.name}.safetensors")
        except TrainingError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return [str(file) for file in files], words


def build(app: App) -> gr.Blocks:
    """The page: four tabs over one `App`."""
    shipped = demo.subjects() if app.shipped else {}

    def chosen(subject: str) -> tuple:
        """(pictures, noun, name, whether to show the upload) for a subject from the list."""
        if subject == OWN:
            return [], "", "", gr.update(visible=True)
        pictures = [str(p) for p in image_files(demo.ASSETS / "subjects" / subject)]
        return pictures, shipped[subject]["class_noun"], f"my-{subject}", gr.update(visible=False)

    def uploaded(files: list[str] | None) -> list[str]:
        """What of the upload a browser can show; what is no picture is named when the training is asked for."""
        return [file for file in files or [] if uploads.is_picture(Path(file))]

    with gr.Blocks(title="peft-krona", delete_cache=(600, 3600), analytics_enabled=False) as page:
        gr.Markdown(
            f"# Personalize a model\nBase model: `{Path(app.pipeline).name}`. Everything stays on this computer."
        )
        with gr.Tabs():
            with gr.Tab("Personalize", id="train"), gr.Row():
                with gr.Column(scale=2):
                    first = demo.DEFAULT_SUBJECT if shipped else OWN
                    subject = gr.Dropdown([OWN, *shipped], value=first, label="Subject", elem_id="subject")
                    files = gr.File(
                        file_count="multiple", file_types=["image"], visible=not shipped, elem_id="upload",
                        label=f"1 to {uploads.MAX_PICTURES} pictures of one subject",
                    )  # fmt: skip
                    own = [str(p) for p in image_files(demo.ASSETS / "subjects" / first)] if shipped else []
                    pictures = gr.Gallery(own, label="Pictures", columns=5, height=150, interactive=False)
                    noun = gr.Textbox(shipped[first]["class_noun"] if shipped else "", label="What is it? (one word)")
                    name = gr.Textbox(f"my-{first}" if shipped else "", label="Name of the adapter", elem_id="name")
                    kind = gr.Radio(list(KINDS), value="KronA", label="Adapter")
                    with gr.Row():
                        a_out = gr.Number(64, label="a_out", precision=0, minimum=1)
                        a_in = gr.Number(4, label="a_in", precision=0, minimum=1)
                        rank = gr.Number(1, label="terms (r)", precision=0, minimum=1)
                    count = gr.Markdown(app.count("KronA", 64, 4, 1), elem_id="count")
                    with gr.Accordion("More settings", open=False):
                        steps = gr.Number(400 if app.shipped else 500, label="Updates", precision=0, minimum=1)
                        rate = gr.Number(app.learning_rate("krona"), label="Learning rate", minimum=0)
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                        previews = gr.Number(100, label="A preview every so many updates (0: none)", precision=0)
                    with gr.Row():
                        start = gr.Button("Train", variant="primary", elem_id="start")
                        stop = gr.Button("Stop", elem_id="stop")
                        go_on = gr.Button("Go on", elem_id="go-on")
                with gr.Column(scale=3):
                    status = gr.Textbox("No training yet.", label="Now", interactive=False, elem_id="status")
                    bar = gr.HTML()
                    curve = gr.LinePlot(pd.DataFrame({"update": [], "loss": []}), x="update", y="loss", height=230)
                    seen = gr.Gallery(label="Previews", columns=4, height=320, interactive=False, object_fit="contain")
                    with gr.Accordion("What the training prints", open=False):
                        log = gr.Textbox(lines=12, show_label=False, interactive=False)
            with gr.Tab("Draw", id="draw") as draw_tab, gr.Row():
                with gr.Column(scale=2):
                    prompt = gr.Textbox(
                        f"a {demo.IDENTIFIER} {shipped[first]['class_noun']} on a blue background" if shipped else "",
                        label="Prompt", elem_id="prompt",
                    )  # fmt: skip
                    rows = []
                    for i in range(ROWS):
                        with gr.Row():
                            rows.append(gr.Dropdown([""], label=f"Adapter {i + 1}", elem_id=f"adapter-{i}"))
                            rows.append(gr.Slider(-1, 2, 1, step=0.05, label="Strength"))
                    with gr.Row():
                        draw_seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                        draw_steps = gr.Number(30, label="Steps", precision=0, minimum=1)
                        guidance = gr.Number(4.0 if app.shipped else 7.0, label="Guidance")
                    draw = gr.Button("Draw", variant="primary", elem_id="draw")
                with gr.Column(scale=3), gr.Row():
                    before = gr.Image(label="Base model", height=380, elem_classes="picture", interactive=False)
                    after = gr.Image(label="With the adapter", height=380, elem_classes="picture", interactive=False)
            with gr.Tab("What was learned", id="learned") as learned_tab:
                shown = gr.Dropdown([], label="Adapter", elem_id="learned-adapter")
                look = gr.Button("Look", variant="primary", elem_id="look")
                gr.Markdown(
                    "Size of the change by block and projection, the factors A and B of the strongest layers, and the "
                    "singular values of the change. The effective rank says how many directions share it evenly: "
                    "exp of the entropy of the normalised singular values."
                )
                picture = gr.Image(show_label=False, elem_id="learned-picture", interactive=False)
                table = gr.Textbox(label="Layer by layer", lines=14, interactive=False)
            with gr.Tab("Take it with you", id="take") as take_tab:
                taken = gr.Dropdown([], label="Adapter", elem_id="take-adapter")
                tool = gr.Radio(list(takeaway.TOOLS), value="ComfyUI", label="Where will you use it?")
                take = gr.Button("Make the file", variant="primary", elem_id="take")
                made = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="made")
                advice = gr.Textbox(label="What to do with it", lines=6, interactive=False, elem_id="advice")

        subject.change(chosen, subject, [pictures, noun, name, files], show_progress="hidden")
        files.change(uploaded, files, pictures, show_progress="hidden")
        gr.on(
            [kind.change, a_out.change, a_in.change, rank.change, page.load], app.count, [kind, a_out, a_in, rank],
            count, concurrency_limit=1, show_progress="hidden",
        )  # fmt: skip
        kind.change(
            lambda k: (
                gr.Number(visible=k == "KronA"), gr.Number(visible=k == "KronA"),
                gr.Number(1 if k == "KronA" else 4, label="terms (r)" if k == "KronA" else "rank"),
                app.learning_rate(KINDS[k]),
            ),
            kind, [a_out, a_in, rank, rate], show_progress="hidden",
        )  # fmt: skip
        words = [subject, files, noun, name, kind, a_out, a_in, rank, steps, rate, seed, previews]
        views = [status, bar, curve, seen, log]
        lists = [*rows[::2], shown, taken]
        start.click(app.train, words, views, concurrency_limit=1, concurrency_id="training").then(
            app.refresh, None, lists
        )
        go_on.click(app.go_on, None, views, concurrency_limit=1, concurrency_id="training").then(
            app.refresh, None, lists
        )
        stop.click(app.stop, None, None, queue=False)
        draw.click(app.draw, [prompt, draw_seed, draw_steps, guidance, *rows], [before, after], concurrency_limit=1)
        look.click(app.learned, shown, [picture, table], concurrency_limit=1)
        take.click(app.export, [taken, tool], [made, advice], concurrency_limit=1)
        gr.on([page.load, draw_tab.select, learned_tab.select, take_tab.select], app.refresh, None, lists)
        page.unload(app.leave)
    return page
