import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from coin.data import Augmentation
from coin.data.transform import View, augmented, build_transforms, draw_augmentation, transform_images
from coin.errors import ConfigurationError

CROP = {"class_path": "torchvision.transforms.v2.RandomResizedCrop", "init_args": {"size": 12}}
FLIP = {"class_path": "torchvision.transforms.v2.RandomVerticalFlip", "init_args": {"p": 1.0}}
NESTED = {"class_path": "torchvision.transforms.v2.RandomApply", "init_args": {"transforms": [FLIP], "p": 1.0}}
PLAIN = View(Augmentation.none, 0, 0)


def images(count: int = 6, channels: int = 3, width: int = 16) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, channels, 16, width), generator=draw, dtype=torch.uint8)


@pytest.mark.parametrize("kind", list(Augmentation))
def test_augmentation_equals_cropping_one_by_one(kind):
    given, draws = images(40, width=24), draw_augmentation(40, 16, 24, seed=0, epoch=0)
    assert set(draws[:, 0].tolist()) <= set(range(5))
    assert set(draws[:, 2].tolist()) == {0, 1}
    padded = F.pad(given.float(), (3, 3, 2, 2), mode="replicate" if kind is Augmentation.shift else "constant").byte()
    result = augmented(given, View(kind, 0, 0), torch.arange(40), 40)
    for image, own, (top, left, flip), got in zip(padded, given, draws.tolist(), result, strict=True):
        expected = own if kind is Augmentation.none else image[:, top : top + 16, left : left + 24]
        assert torch.equal(got, expected.flip(2) if flip and kind is Augmentation.crop_flip else expected)


def test_what_is_named_is_made():
    crop, flip = build_transforms([CROP, FLIP])
    assert (type(crop), crop.size, type(flip)) == (v2.RandomResizedCrop, (12, 12), v2.RandomVerticalFlip)
    assert isinstance(build_transforms(NESTED)[0], v2.RandomApply)
    assert build_transforms(None) == []


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"class_path": "torchvision.transforms.v2.RandomCrpo"}, "has no attribute 'RandomCrpo'"),
        ({"class_path": "torchvision.transforms.v2.RandomCrop"}, "the following arguments are required: size"),
        ({**CROP, "init_args": {"sise": 3}}, "Option 'sise' is not accepted"),
        ({"class_path": "os.system"}, "os.system does not correspond to a subclass of Transform"),
        ([3], "Got value: 3"),
    ],
)
def test_what_cannot_be_made_is_told_in_one_line(spec, reason, synthetic):
    with pytest.raises(ConfigurationError, match=r"^found transform .*; name a class of torchvision") as caught:
        synthetic(transform=spec)
    assert reason in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_draws_for_itself_and_from_seed_epoch_and_position_alone(channels):
    crop, given = build_transforms([CROP]), images(channels=channels)
    positions, view = torch.tensor([7, 1, 4, 2, 9, 0]), View(Augmentation.none, 5, 2)
    whole = transform_images(given, crop, view, positions)
    assert whole.shape == (6, channels, 12, 12)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    parts = [transform_images(given[i : i + 2], crop, view, positions[i : i + 2]) for i in (4, 0, 2)]
    assert torch.equal(torch.cat([parts[1], parts[2], parts[0]]), whole)
    assert torch.equal(torch.get_rng_state(), before)
    same = transform_images(given[:1].expand(6, -1, -1, -1), crop, view, positions)
    assert len({image.numpy().tobytes() for image in same}) == 6
    for other in (view._replace(seed=6), view._replace(epoch=3)):
        assert not torch.equal(transform_images(given, crop, other, positions), whole)


def test_a_task_transforms_what_it_trains_on_after_its_augmentation_and_nothing_else(synthetic):
    plain, flipped = synthetic(augmentation="crop"), synthetic(augmentation="crop", transform=[FLIP])
    for name in ("val_dataloader", "test_dataloader", "train_dataloader"):
        ours, theirs = (next(iter(getattr(task, name)()))[0] for task in (flipped, plain))
        assert torch.equal(ours, theirs.flip(2) if name == "train_dataloader" else theirs)
    assert torch.equal(next(iter(flipped.calibration(8))), next(iter(plain.calibration(8))))


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (v2.ToDtype(torch.float32), ConfigurationError, r"the transforms give torch.float32 \[3, 16, 16\], expected"),
        (v2.ToPILImage(), ConfigurationError, "the transforms give Image, expected torch.uint8 images of one size"),
        (v2.RandomResize(8, 14), ConfigurationError, r"expected torch\.uint8 images of one size"),
        (v2.RandomCrop(99), ValueError, "Required crop size"),  # its own error is left as it is
    ],
)
def test_what_leaves_no_images_is_refused(transform, error, message):
    with pytest.raises(error, match=message):
        transform_images(images(), [transform], PLAIN, torch.arange(6))
