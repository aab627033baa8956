"""Which test images an evaluation keeps: always the same ones, whatever the batches."""

from pathlib import Path

import pytest
import torch

from coin.coding import Code, make_decoder
from coin.data import to_input
from coin.evaluation.examples import ExampleSamples
from coin.modules import DecodingEvaluator
from coin.networks import load_network

CLASSES = (3, 2)


def answers(samples: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (samples, 3, 16, 16), generator=draw, dtype=torch.uint8)
    expert, labels = (torch.randint(0, 4, (samples,), generator=draw) for _ in range(2))
    return images, expert, labels, torch.randint(0, 4, (samples, 2), generator=draw)


def keep(samples: int, batch: int, image_size: int = 16, **options: int):
    images, *three = answers(samples)
    metric = ExampleSamples(samples, image_size, 2, **options)
    for positions in torch.arange(samples).split(batch):
        metric.update(to_input(images[positions], image_size), positions, *(each[positions] for each in three))
    return metric.kept()


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_the_same_samples_are_kept_whatever_the_batches_and_the_answers(batch: int):
    images, expert, labels, decoded = answers(60)
    kept = keep(60, batch, count=9)
    assert kept.position.tolist() == torch.randperm(60, generator=torch.Generator().manual_seed(0))[:9].tolist()
    for own, all_of_them in ((kept.expert, expert), (kept.label, labels), (kept.decoded, decoded)):
        assert own.tolist() == all_of_them[kept.position].tolist()
    assert kept.images.equal(images[kept.position])  # back from the normalised inputs, to the last bit


def test_fewer_samples_than_places_and_large_images():
    assert sorted(keep(5, 2).position.tolist()) == [0, 1, 2, 3, 4]
    one = keep(1, 1)
    assert (one.images.shape, one.expert.shape, one.decoded.shape) == ((1, 3, 16, 16), (1,), (1, 2))
    assert keep(4, 4, image_size=120).images.shape == (4, 3, 96, 96)


def test_samples_that_were_not_seen_are_left_out():
    images, *three = answers(5)
    metric = ExampleSamples(5, 16, 2)
    metric.update(to_input(images[:3], 16), torch.arange(3), *(each[:3] for each in three))
    kept = metric.kept()
    assert sorted(kept.position.tolist()) == [0, 1, 2]
    assert kept.images.equal(images[kept.position])


def test_the_evaluator_keeps_what_every_decoder_answers(write_experts, write_coded, tasks_of, make_trainer):
    experts, code, tasks = write_experts(CLASSES), [[0.6, 0.4]], tasks_of(CLASSES)
    paths = [*write_coded(code, experts), *write_coded(code, experts, label="other")]
    evaluator = DecodingEvaluator(experts, paths, ["ridge", "linear"])
    make_trainer().test(evaluator, datamodule=tasks, verbose=False)
    assert list(evaluator.kept) == ["task0", "task1"]
    networks = [load_network(Path(path)).network for path in (*experts.values(), paths[1])]
    for place, (name, kept) in enumerate(evaluator.kept.items()):
        test = tasks.tasks[name].splits.test
        images = test.images(kept.position)
        assert kept.images.equal(images)
        assert kept.label.tolist() == test.targets[kept.position].tolist()
        with torch.no_grad():
            logits = [network(to_input(images, 16)) for network in networks]
            logits = torch.stack([torch.nn.functional.pad(own, (0, 3 - own.shape[1])) for own in logits])
        own = logits[place, :, : CLASSES[place]].argmax(1)
        assert kept.expert.tolist() == own.tolist()
        alone = evaluator.evaluation.alone(place)
        ways = [(evaluator.variants[each.variant].method, each.decoder.config.name) for each in alone]
        assert len(set(ways)) == len(ways) == kept.decoded.shape[1]
        seen = evaluator.variants[0].seen(evaluator(to_input(images, 16)))
        lost = make_decoder("linear", Code(code), [place]).decode(type(seen)(logits[:2], logits[2:]))[0]
        decoded = kept.decoded[:, ways.index(("other", "linear"))]
        assert decoded.tolist() == lost[:, : CLASSES[place]].argmax(1).tolist()
        assert kept.decoded[:, ways.index(("oracle", "linear"))].tolist() == own.tolist()
    evaluator = DecodingEvaluator(experts, decoders=["ridge"])  # without coded models nothing is kept
    make_trainer().test(evaluator, datamodule=tasks, verbose=False)
    assert evaluator.kept == {}
