# SPDX-License-Identifier: Apache-2.0
"""A page to personalize a model on: `python -m examples.app`. Only `page` knows Gradio."""
