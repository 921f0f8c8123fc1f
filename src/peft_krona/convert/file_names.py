# SPDX-License-Identifier: Apache-2.0
"""What the layer names in a file stand for: which part of the pipeline, and which of its layers.

A name is containers (`unet.`, `lora_te1_`, `base_model.model.`, ...) and the layer's own name, dotted or flat (dots as
underscores), diffusers' or the original code's. The part of the pipeline is decided once for a whole file, and flat
names are looked up among the model's layers where these are known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache

from ..errors import FormatError
from .families import Family, Target, families
from .names import flatten, to_file_name
from .unet_names import TOP_NAMES, is_unet_layer, ldm_to_diffusers

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # {component: {module: (out, in, *kernel)}}

# -- containers --------------------------------------------------------------------------------------------------------

_DENOISER = "denoiser"  # a UNet or a transformer: the layers' names tell
_WRAPPERS = ("base_model.model.", "_orig_mod.", "module.")
_CONTAINERS = {
    "unet": "unet",
    "transformer": "transformer",
    "transformer_2": "transformer_2",
    "prior": "prior",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
    "text_encoders.clip_l.transformer": "text_encoder",
    "text_encoders.clip_l": "text_encoder",
    "text_encoders.clip_g.transformer": "text_encoder_2",
    "text_encoders.clip_g": "text_encoder_2",
    "model.diffusion_model": _DENOISER,
    "diffusion_model": _DENOISER,
    "lora_unet": _DENOISER,
    "lora_transformer": "transformer",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lycoris": _DENOISER,
}
# A dotted container ends in a dot; kohya's kinds end in an underscore, or in a dot before a dotted name.
_CONTAINER = re.compile(
    r"^(?:(?P<dotted>{})\.|(?P<flat>{})[._])(?=.)".format(
        "|".join(re.escape(name) for name in sorted(_CONTAINERS, key=len, reverse=True)),
        "|".join(name for name in sorted(_CONTAINERS, key=len, reverse=True) if name.startswith(("lora_", "lycoris"))),
    )
)
# What diffusers' first LoRA format puts at the end of a layer's name, or in it, and what stands there in the model.
_OLD_ENDS = (
    (re.compile(r"\.processor\.(to_[qkv])_lora$"), r".\1"),
    (re.compile(r"\.processor\.to_out_lora$"), ".to_out.0"),
    (re.compile(r"\.(?:lora_linear_layer|lora_layer|lora)$"), ""),
    (re.compile(r"\.processor\.to_out$"), ".to_out.0"),
    (re.compile(r"\.processor\."), "."),
)
_OLD_FORMAT = re.compile(
    r"^(?:unet|text_encoder|text_encoder_2)\..+(?:\.attn[12]?\.processor\.to_(?:[qkv]|out)_lora|\.lora_linear_layer"
    r"|\.lora_layer)$"
)


def is_old_diffusers_name(name: str) -> bool:
    """Whether a layer's name is of diffusers' first LoRA format, which the released DiffuseKronA code has too.

    >>> is_old_diffusers_name("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora")
    True
    """
    return _OLD_FORMAT.match(name) is not None


def without_wrappers(key: str) -> str:
    """The key without what PEFT, `torch.compile` and data-parallel wrappers put before and into it.

    >>> without_wrappers("base_model.model._orig_mod.conv_in.krona_A")
    'conv_in.krona_A'
    """
    while True:
        wrapper = next((wrapper for wrapper in _WRAPPERS if key.startswith(wrapper)), None)
        if wrapper is None:
            return key.replace("._orig_mod.", ".")
        key = key.removeprefix(wrapper)


def _strip(name: str) -> tuple[set[str], str, bool]:
    """(components that the containers name, the rest, whether they stand before diffusers' own names)."""
    rest, components, own = name, set(), False
    while True:
        wrapper = next((w for w in _WRAPPERS if rest.startswith(w) and len(rest) > len(w)), None)
        match = None if wrapper else _CONTAINER.match(rest)
        if match is not None:
            container = match["dotted"] or match["flat"]
            components.add(_CONTAINERS[container])
            own = own or container in ("transformer", "lora_transformer", "lycoris")
            rest = rest[match.end() :]
        elif wrapper is not None:
            rest = rest[len(wrapper) :]
        else:
            break
    rest = rest.replace("._orig_mod.", ".")
    for pattern, replacement in _OLD_ENDS:
        rest = pattern.sub(replacement, rest)
    if components & {"unet", "transformer", "transformer_2", "prior"}:
        components.discard(_DENOISER)
    return components, rest, own


# -- layers ------------------------------------------------------------------------------------------------------------

# Words with an underscore inside, or a dot before them: everything that a flat name of a UNet or a text encoder is cut
# into, with the integers, where its model is not known.
_WORDS = """
down_blocks mid_block up_blocks attentions resnets downsamplers upsamplers transformer_blocks attn1 attn2 attn ff net
to_q to_k to_v to_qkv to_kv to_out proj_in proj_out proj conv conv1 conv2 conv_in conv_out conv_norm_out conv_shortcut
norm norm1 norm2 norm3 group_norm time_emb_proj time_embedding add_embedding class_embedding linear linear_1 linear_2
time_proj cond_proj motion_modules
model language_model text_model text_projection encoder layers self_attn q_proj k_proj v_proj o_proj out_proj mlp fc1
fc2 gate_proj up_proj down_proj layer_norm1 layer_norm2 embeddings token_embedding position_embedding final_layer_norm
block layer SelfAttention DenseReluDense q k v o wi wi_0 wi_1 wo
in_layers out_layers emb_layers skip_connection op input_blocks middle_block output_blocks time_embed label_emb out
single_transformer_blocks ff_context norm1_context norm2_context norm_out x_embedder context_embedder time_text_embed
timestep_embedder guidance_embedder text_embedder add_q_proj add_k_proj add_v_proj to_add_out proj_mlp pos_embed
caption_projection adaln_single emb
""".split()
_WORD = re.compile(rf"(?:{'|'.join(sorted(set(_WORDS), key=len, reverse=True))}|\d+)(?=_|$)")
_UNET_BLOCKS = ("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks")
_UNET_BLOCK = re.compile(rf"(?:{'|'.join(_UNET_BLOCKS)})[._]")
_TRANSFORMER_BLOCKS = re.compile(
    r"^(?:single_transformer_blocks|transformer_blocks|double_blocks|single_blocks|joint_blocks|joint_transformer_blocks"
    r"|layers|blocks|noise_refiner|context_refiner)[._]\d"
)
_TEXT_MODELS = re.compile(r"^(?:text_model[._]|encoder[._](?:layers|block)[._])")


@lru_cache(maxsize=65536)
def unflatten(flat: str) -> str | None:
    """The dotted name of a flat one, or None if it is not made of the words known here.

    >>> unflatten("down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0")
    'down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0'
    """
    parts, position = [], 0
    while position < len(flat):
        match = _WORD.match(flat, position)
        if match is None:
            return None
        parts.append(match[0])
        position = match.end() + 1
    return ".".join(parts) if parts and not flat.endswith("_") else None


def resolve(
    names: Mapping[str, tuple[int, ...] | None], known: Shapes | None = None, layers_per_block: int = 2
) -> dict[str, Target]:
    """What every layer name of a file stands for.

    Args:
        names: {name in the file: shape (out, in, ...) of its update, None if not known}.
        known: the base model's layers. Names are looked up there, and a name that no layer has is an error.
        layers_per_block: of the UNet, which the original code's numbers depend on.

    Raises:
        FormatError: names the layer: an unknown container, one of two models, one that no model has, or ambiguous.
    """
    stripped = {name: _strip(name) for name in names}
    components = _components(stripped, known)
    transformer = {
        stripped[name][1]: names[name] for name, component in components.items() if component == "transformer"
    }
    own = all(stripped[name][2] for name, component in components.items() if component == "transformer")
    family = _family(transformer, known, own)
    flats = {component: _by_flat_name(modules) for component, modules in (known or {}).items()}
    targets = {}
    for name, component in components.items():
        rest = stripped[name][1]
        if known is not None and component in known:
            exact = _look_up(name, component, rest, flats[component])
            targets[name] = exact or _target(name, component, rest, names[name], family, layers_per_block, True)
            missing = [module for module in targets[name].modules if module not in known[component]]
            if missing:
                raise FormatError(
                    f"{component}.{missing[0]}: the base model has no such layer. Is the adapter for another model?"
                )
        else:
            targets[name] = _target(name, component, rest, names[name], family, layers_per_block, False)
    return targets


def from_name(name: str) -> tuple[str, str]:
    """(component, module) of one layer name in a file, see `resolve`.

    Raises:
        FormatError: if its model or layer cannot be told.

    >>> from_name("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    ('text_encoder', 'text_model.encoder.layers.0.mlp.fc1')
    """
    target = resolve({name: None})[name]
    return target.component, target.modules[0]


def _components(stripped: Mapping[str, tuple[set[str], str, bool]], known: Shapes | None) -> dict[str, str]:
    """The part of the pipeline that each layer is of; a denoiser's is the same for all."""
    found: dict[str, str] = {}
    denoiser: dict[str, set[str]] = {}
    for name, (components, rest, _) in stripped.items():
        if len(components) > 1:
            raise FormatError(
                f"The layer name '{name}' names two parts of a pipeline, {' and '.join(sorted(components))}."
            )
        component = next(iter(components), "")
        if component.startswith("text_encoder") and _UNET_BLOCK.match(rest):
            raise FormatError(f"The layer name '{name}' is of a text encoder by its start, and of a UNet by its end.")
        if component in ("unet", "transformer") and _TEXT_MODELS.match(rest) and rest.startswith("text_model"):
            raise FormatError(f"The layer name '{name}' is of a {component} by its start, and of CLIP by its end.")
        if not component:
            component = "text_encoder" if _TEXT_MODELS.match(rest) else _DENOISER
            if component == _DENOISER and _kind(rest) is None:
                raise FormatError(
                    f"The layer name '{name}' does not begin with a part of a pipeline such as 'unet.', 'transformer.',"
                    " 'text_encoder.', 'diffusion_model.', 'lora_unet_', 'lora_te1_' or 'lycoris_', nor as the layers "
                    "of a UNet or transformer do."
                )
        if component in (_DENOISER, "unet", "transformer"):
            denoiser[name] = {component}
        else:
            found[name] = component
    if not denoiser:
        return found
    evidence: dict[str, str] = {}
    for name in denoiser:
        kind = _kind(stripped[name][1])
        if kind is not None:
            evidence.setdefault(kind, name)
    said = {component for components in denoiser.values() for component in components} - {_DENOISER}
    if len(evidence) > 1 or said == {"transformer", "unet"} or (said == {"transformer"} and "unet" in evidence):
        examples = evidence if len(evidence) > 1 else dict.fromkeys(said) | evidence
        raise FormatError(
            "The file has layers of a UNet and of a transformer"
            + "".join(f", '{name}'" for name in examples.values() if name)
            + "; expected those of one denoiser. Split it."
        )
    if evidence:
        (decided,) = evidence
    elif known is not None and len(set(known) & {"unet", "transformer"}) == 1:
        (decided,) = set(known) & {"unet", "transformer"}
    elif said:
        (decided,) = said
    else:
        raise FormatError(
            f"Nothing in the layer names tells whether '{next(iter(denoiser))}' is of a UNet or of a transformer. Give "
            "the base model's folder (base_model), or its layers' shapes."
        )
    return {name: found.get(name, decided) for name in stripped}


def _kind(rest: str) -> str | None:
    """ "unet" or "transformer", if a denoiser's layer name (dotted or flat) tells."""
    if _UNET_BLOCK.match(rest):
        return "unet"
    if rest in TOP_NAMES or rest in {flatten(name) for name in TOP_NAMES}:
        return "unet"
    if _TRANSFORMER_BLOCKS.match(rest) or any(family.target(rest) is not None for family in families().values()):
        return "transformer"
    return None


def _family(transformer: Mapping[str, tuple[int, ...] | None], known: Shapes | None, own: bool) -> Family | None:
    """The family that has all of these layers, or the first of several that mean the same by them.

    Args:
        own: the names stand where diffusers' own do, which go before the original code's.

    Raises:
        FormatError: if several have them, and they mean different layers.
    """
    candidates = list(families().values())
    if known is not None and "transformer" in known:
        modules = set(known["transformer"])
        candidates = [family for family in candidates if any(_in(family, module, modules) for module in modules)]
    complete = []
    for family in candidates:
        found = (family.target(name, shape) for name, shape in transformer.items())
        targets = [target for target in found if target is not None]
        if len(targets) == len(transformer):
            complete.append((family, targets))
    if own or any(re.match(r"(?:single_)?transformer_blocks[._]", name) for name in transformer):
        complete = [pair for pair in complete if all(map(pair[0].has, transformer))] or complete
    meanings = {tuple(targets) for _, targets in complete}
    if len(meanings) > 1 and known is not None:
        fitting = [
            (family, targets)
            for family, targets in complete
            if all(module in known["transformer"] for target in targets for module in target.modules)
        ]
        complete, meanings = fitting, {tuple(targets) for _, targets in fitting}
    if len(meanings) > 1:
        names = " and ".join(family.name for family, _ in complete)
        raise FormatError(
            f"The transformer's layer names (such as '{next(iter(transformer))}') are those of {names}, which mean "
            "different layers by them. Give the base model's folder (base_model), or its layers' shapes."
        )
    return complete[0][0] if complete else None


def _in(family: Family, module: str, modules: Collection[str]) -> bool:
    target = family.target(module)
    return target is not None and target.modules[0] in modules


def _target(
    name: str,
    component: str,
    rest: str,
    shape: tuple[int, ...] | None,
    family: Family | None,
    layers_per_block: int,
    checked: bool,
) -> Target:
    """What a layer is by its name. `checked`: it is looked up in the model afterwards."""
    if component == "transformer":
        target = family.target(rest, shape) if family else _of_any_family(rest, shape)
        if target is None:
            module = rest if "." in rest else unflatten(rest)
            if module is None or not (checked or _is_plausible(name, module)):
                raise _unknown(name, rest)
            if not checked:
                _check_containers(name, module, _is_transformer_block)
            target = Target(component, (module,))
    elif component == "unet":
        module = _unet_module(name, rest, layers_per_block)
        if not (checked or is_unet_layer(module)):
            _check_containers(name, module, is_unet_layer)
            raise _unknown(name, rest)
        target = Target(component, (module,))
    else:
        module = rest if "." in rest or rest == "text_projection" else unflatten(rest)
        if module is None:
            raise _unknown(name, rest)
        if not checked:
            _check_containers(name, module, _is_text_block)
        target = Target(component, (to_file_name(component, module),))
    return _parts_of_fused(target)


def _check_containers(name: str, module: str, is_layer: Callable[[str], bool]) -> None:
    """Refuse a name in which something unknown stands before a layer's whole name.

    Args:
        is_layer: whether a dotted name is that of a layer in a numbered block of a known model.

    Raises:
        FormatError: names what stands there.
    """
    words = module.split(".")
    for n in range(1, len(words)):
        before, layer = words[:n], ".".join(words[n:])
        if words[n - 1].isdigit():
            return  # blocks in blocks, of a model that is not known here
        if is_layer(layer) and not set(before) <= _TEXT_CONTAINERS:
            raise FormatError(
                f"The layer name '{name}' has '{'.'.join(before)}' before '{layer}': no part of a pipeline, and no "
                "wrapper, that is known here. Take it out of the file's keys, or give the base model's folder "
                "(base_model), or its layers' shapes, among which the name is looked up."
            )


_TEXT_CONTAINERS = {
    *("model", "language_model", "text_model", "text_encoder", "vision_model", "vision_tower", "visual", "transformer"),
    *("encoder", "decoder", "thinker", "gpt_neox"),
}
_TEXT_BLOCK = re.compile(
    r"^(?:text_model\.)?(?:encoder\.)?layers\.\d+\.(?:self_attn|mlp|layer_norm)|^encoder\.block\.\d+\.layer\."
)


def _is_text_block(module: str) -> bool:
    return bool(_TEXT_BLOCK.match(module))


def _is_transformer_block(module: str) -> bool:
    numbered = re.match(r"^\w+\.\d+\.", module) is not None
    return is_unet_layer(module) or (numbered and any(family.target(module) for family in families().values()))


def _is_plausible(name: str, module: str) -> bool:
    """Whether a transformer's layer of no known family is taken as its name says: dotted, and not of `diffusion_model.`
    alone, where original names of any code stand."""
    return not re.match(r"^(?:model\.)?diffusion_model\.", name) or bool(
        re.match(r"^(?:single_)?transformer_blocks\.\d", module)
    )


def _of_any_family(rest: str, shape: tuple[int, ...] | None) -> Target | None:
    """The target if only one family, or several with one meaning, know this name."""
    found = {family.target(rest, shape) for family in families().values()} - {None}
    return found.pop() if len(found) == 1 else None


def _by_flat_name(modules: Collection[str]) -> dict[str, list[str]]:
    """{flat name: the model's layers of that name}."""
    table: dict[str, list[str]] = {}
    for module in modules:
        table.setdefault(flatten(module), []).append(module)
    return table


def _look_up(name: str, component: str, rest: str, flats: Mapping[str, list[str]]) -> Target | None:
    """The model's layer of this dotted or flat name."""
    if "." in rest:
        module = to_file_name(component, rest)
        return Target(component, (module,)) if module in flats.get(flatten(module), ()) else None
    found = flats.get(rest) or flats.get(f"text_model_{rest}") or []
    if len(found) > 1:
        raise FormatError(f"The layer name '{name}' may be {' or '.join(found)} of the base model; it is ambiguous.")
    return Target(component, (found[0],)) if found else None


def _unet_module(name: str, rest: str, layers_per_block: int) -> str:
    module = rest if "." in rest or rest in TOP_NAMES else unflatten(rest)
    if module is None:
        raise _unknown(name, rest)
    if module.startswith(("input_blocks.", "middle_block.", "output_blocks.")):
        module = ldm_to_diffusers(module, layers_per_block)
    return re.sub(r"(\.attn[12])\.to_out$", r"\1.to_out.0", TOP_NAMES.get(module, module))


_FUSED_ENDS = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}


def _parts_of_fused(target: Target) -> Target:
    """Diffusers' own fused projections (`fuse_qkv_projections`) as their parts."""
    stem, _, end = target.modules[0].rpartition(".")
    if len(target.modules) > 1 or end not in _FUSED_ENDS:
        return target
    parts = tuple(f"{stem}.{part}" for part in _FUSED_ENDS[end])
    return Target(target.component, parts, (1,) * len(parts))


def _unknown(name: str, rest: str) -> FormatError:
    return FormatError(
        f"The layer name '{name}' is not one of a model known here: '{rest}' cannot be read. Give the base model's "
        "folder (base_model), or its layers' shapes, among which it is looked up."
    )
