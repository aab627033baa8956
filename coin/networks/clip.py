"""CLIP's vision tower as a classifier: its head is computed from class names by the text tower, and never trained."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin.errors import ConfigurationError, FileError, first_line
from coin.files.packaged import extra_module

ZERO_SHOT = (
    "zero_shot"  # the value of network.options.head for a vision tower with a zero-shot head
)

# CLIP's normalisation of images in [0, 1], for folders without a preprocessor_config.json.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipTower(nn.Module):
    """CLIP's vision tower under a zero-shot head: logits s · t_k·φ(x) with φ(x) = v(x)/‖v(x)‖.

    v(x) ``[B, F]`` is the projected class token, t_k the unit text vector of class k, and s CLIP's scale, so that the
    features are those that CLIP compares. The head's weight ``[C, F]`` is s·t (`zero_shot_head`), zero until it is
    filled, and is not trained. The `config` is a `CLIPVisionConfig` with ``projection_dim``.
    """

    head_name = "head"
    frozen_head = True

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__()
        transformers = extra_module("transformers", "text")
        self.vision = transformers.CLIPVisionModelWithProjection(config)
        self.head = nn.Linear(config.projection_dim, num_classes, bias=False).requires_grad_(False)
        nn.init.zeros_(self.head.weight)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Return the logits ``[B, C]`` of images ``[B, 3, S, S]`` in CLIP's normalisation."""
        vision = self.vision(
            pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding
        )
        features = F.normalize(vision.image_embeds, dim=-1)  # [B, F]
        return self.head(features)  # type: ignore[no-any-return]


def vision_config(found: Any, name: str) -> Any:
    """Return the configuration of a CLIP's vision tower; a ConfigurationError for what is no CLIP."""
    kind = getattr(found, "model_type", None)
    if kind not in ("clip", "clip_vision_model"):
        raise ConfigurationError(
            f"found network.options.head '{ZERO_SHOT}' and network.name '{name}', a {type(found).__name__}, expected a "
            "CLIP; name one, such as hf/openai/clip-vit-base-patch32, or none"
        )
    own = getattr(found, "vision_config", found)
    own.projection_dim = found.projection_dim
    return own


def load_tower(tower: ClipTower, place: str) -> None:
    """Fill a tower from a folder or ID; a missing projection stays as it is, a ValueError for another tensor."""
    own: Any = tower.vision
    found, info = type(own).from_pretrained(place, config=own.config, output_loading_info=True)
    state = found.state_dict()
    for name in info["missing_keys"]:
        if name != "visual_projection.weight":
            raise ValueError(f"'{place}' has no tensor '{name}': it is no CLIP vision tower")
        state[name] = own.state_dict()[name]
    own.load_state_dict(state)


@torch.no_grad()
def zero_shot_head(place: str, prompts: Sequence[str], classes: Sequence[str]) -> Tensor:
    """Return the zero-shot head s·t ``[C, F]`` of a `CLIPModel` with its tokenizer, float32, s = exp(logit_scale).

    t_k is the mean of the unit vectors of class k's prompts, scaled to length 1 again; ``{}`` stands for the class.
    With one prompt the logits are `CLIPModel`'s own ``logits_per_image``. Raises FileError for what cannot be read.
    Source: Radford et al. (ICML 2021), section 3.1.4, prompt ensembling.
    """
    transformers = extra_module("transformers", "text")
    try:
        model = transformers.CLIPModel.from_pretrained(place).float().eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, RuntimeError) as error:
        found = (
            f"cannot read CLIP's text tower and tokenizer of '{place}' ({first_line(error)[:150]})"
        )
        raise FileError(
            f"{found}; give a folder or ID of a whole CLIPModel with its tokenizer"
        ) from error
    longest = model.config.text_config.max_position_embeddings
    rows = []
    for name in classes:
        texts = [prompt.replace("{}", name) for prompt in prompts]
        tokens = tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        vectors = model.text_projection(model.text_model(**tokens).pooler_output)  # [prompts, F]
        mean = F.normalize(vectors, dim=-1).mean(0)
        rows.append(F.normalize(mean, dim=-1))
    scale = model.logit_scale.exp()
    return torch.stack(rows) * scale  # type: ignore[no-any-return]
