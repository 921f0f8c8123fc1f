# SPDX-License-Identifier: Apache-2.0
"""Personalize a model in the browser.

python -m examples.app                                 # the shipped pipeline, on http://127.0.0.1:7860
python -m examples.app --pipeline my-stable-diffusion  # any folder of a Stable Diffusion pipeline
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.app", description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", help="folder of a Stable Diffusion pipeline (default: the shipped one)")
    parser.add_argument("--output", type=Path, default=Path("output/app"), help="where adapters are kept")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other computers in")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    try:
        from examples.app.page import CSS, THEME, App, build
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "pandas"):
            raise
        print('error: the page needs gradio: pip install -e ".[app]"', file=sys.stderr)
        return 2
    from examples.app.uploads import MAX_BYTES
    from examples.dreambooth import TrainingError, demo

    try:
        app = App(args.pipeline or str(demo.PIPELINE), args.output)
    except (TrainingError, OSError) as error:
        print(f"error: --pipeline {args.pipeline}: expected the folder of a Stable Diffusion pipeline: {error}",
              file=sys.stderr)  # fmt: skip
        return 2
    try:
        build(app).queue().launch(
            server_name=args.host, server_port=args.port, max_file_size=MAX_BYTES, theme=THEME, css=CSS, share=False,
            allowed_paths=[str(args.output.resolve()), str(demo.ASSETS / "subjects"), app.scratch.name],
        )  # fmt: skip
    except OSError as error:  # the port is taken
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        app.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
