# SPDX-License-Identifier: Apache-2.0
"""Keys of adapter files that are no Kronecker update of a layer's weight: what they are, and who reads them."""

from __future__ import annotations

import re

# (pattern, what it is, who reads it)
_KINDS = tuple(
    (re.compile(pattern), what, readers)
    for pattern, what, readers in (
        (r"\.[wb]_norm$", "the weight of a normalisation layer (LyCORIS' train_norm)", "LyCORIS, ComfyUI and A1111"),
        (r"\.diff_b$", "the update of a bias", "LyCORIS, ComfyUI and A1111"),
        (r"\.lora_(?:B|up|A|down)(?:\.\w+)?\.bias$", "a bias that belongs to a LoRA layer (lora_bias=True)", "PEFT"),
        (r"lora_magnitude_vector|\.dora_scale$|\.magnitude$", "DoRA's magnitude, which rescales the base weights",
         "PEFT, diffusers, LyCORIS and ComfyUI"),
        (r"trainable_tokens_delta", "embeddings of single tokens (trainable_token_indices)", "PEFT"),
        (r"^bundle_emb\.|^emb_params$|^string_to_param|^(?:clip_[lg]|t5(?:xxl)?)$|^<.+>$|\.token_embedding\.\w+$",
         "embeddings of trained words (textual inversion)", "kohya's tools, OneTrainer, A1111 and ComfyUI"),
        (r"\.oft_(?:blocks|diag|R|r)\b|\.boft_",
         "an orthogonal transform (OFT, BOFT), which multiplies the base weights", "PEFT, LyCORIS and ComfyUI"),
        (r"\.(?:a[12]|b[12]|bm[12])\.weight$", "GLoRA, whose update depends on the base weights",
         "LyCORIS and ComfyUI"),
        (r"\.ia3_l\b|\.on_input$", "IA3, which rescales activations", "PEFT, LyCORIS and A1111"),
        (r"\.hada_t[12]$", "the core of a LoHa in Tucker form", "LyCORIS, ComfyUI and A1111"),
        (r"\.(?:set_weight|reshape_weight)$", "a whole weight that replaces the base model's", "ComfyUI"),
        (r"\.(?:vera_lambda_[bd]|fourierft_spectrum|hra_u|bone_|miss_block|road_|shira_|c3a_|lora_diag)",
         "of another PEFT method that is no Kronecker update", "PEFT"),
    )
)  # fmt: skip


def what_is(key: str) -> str | None:
    """What a known foreign key is and who reads it, as the end of a sentence that begins with the key; else None.

    >>> what_is("lora_unet_out_0.w_norm").split(",")[0]
    "is the weight of a normalisation layer (LyCORIS' train_norm)"
    """
    for pattern, what, readers in _KINDS:
        if pattern.search(key):
            return (
                f"is {what}, and no Kronecker update of a layer's weight. It is read by {readers}. Take such keys out "
                "of the file, or merge the file with that tool and extract the difference of the two models."
            )
    return None
