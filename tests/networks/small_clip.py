"""A CLIP of two layers on captions of digits, and its fine-tuned vision towers, as folders of Hugging Face's."""

import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from coin.data import MNIST5k
from coin.data.task import TaskData
from coin.networks.clip import MEAN, STD

SIDE = 32
PROMPTS = ["a photo of the character {}.", "a small {}"]
_VISION = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 8}
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 48}


def tokenizer() -> Any:
    """Return CLIP's byte-pair tokenizer with a tiny vocabulary: single characters."""
    characters = string.ascii_lowercase + string.digits + "."
    pieces = [*characters, *(f"{each}</w>" for each in characters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[])


def small_clip(layers: int = 2) -> Any:
    words = tokenizer()
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = transformers.CLIPConfig(
        text_config={**_TEXT, **ends, "num_hidden_layers": layers, "vocab_size": len(words)},
        vision_config={**_VISION, "num_hidden_layers": layers, "projection_dim": 24},
        projection_dim=24,
    )
    return transformers.CLIPModel(config).eval()


def pixels(images: Tensor) -> Tensor:
    size = (SIDE, SIDE)
    scaled = F.interpolate(images.float() / 255, size, mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    return (scaled - mean) / std


def texts(classes: Sequence[str], prompts: Sequence[str] = PROMPTS[:1]) -> Any:
    return tokenizer()(
        [prompt.replace("{}", name) for name in classes for prompt in prompts], padding=True, return_tensors="pt"
    )


def similarities(model: Any, images: Tensor, classes: Sequence[str]) -> Tensor:
    """Return CLIP's own logits ``[B, C]`` of images, uint8, and the first prompt."""
    found: Tensor = model(pixel_values=pixels(images), **texts(classes)).logits_per_image
    return found


def fit(model: Any, task: TaskData, classes: Sequence[str], trained: Iterable[nn.Parameter], steps: int) -> None:
    """Train parameters of a CLIP on the classes of a task, by its own similarities."""
    optimizer = torch.optim.Adam(list(trained), 1e-3)
    images, labels = task.splits.train.images(), task.splits.train.targets
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (64,), generator=draw)
        loss = F.cross_entropy(similarities(model, images[chosen], classes), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def write_clip(folder: Path, steps: int = 0) -> Any:
    """Write a CLIP with its tokenizer, trained for some steps on captions of handwritten digits; return it."""
    torch.manual_seed(0)
    model = small_clip()
    if steps:
        task = MNIST5k(image_size=SIDE)
        fit(model, task, task.classes, model.parameters(), steps)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def write_digits(folder: Path, digits: str, turns: int) -> None:
    """Write a folder of some of MNIST's digits, turned by so many right angles, as `ImageFolder` reads it."""
    splits = MNIST5k(image_size=SIDE).splits
    for name, samples, count in (("train", splits.train, 40), ("test", splits.test, 20)):
        images, labels = samples.images(), samples.targets
        for digit in digits:
            place = folder / name / digit
            place.mkdir(parents=True)
            for number, image in enumerate(images[labels == int(digit)][:count]):
                Image.fromarray(image[0].rot90(turns).numpy()).save(place / f"{number}.png")


def write_expert(folder: Path, base: Path, task: TaskData, classes: Sequence[str], steps: int) -> None:
    """Write a vision tower fine-tuned to a task, as FusionBench's are: without projection, the text tower frozen."""
    model = transformers.CLIPModel.from_pretrained(base)
    fit(model, task, classes, model.vision_model.parameters(), steps)
    model.save_pretrained(folder)
    transformers.CLIPVisionModel.from_pretrained(folder).save_pretrained(folder)
