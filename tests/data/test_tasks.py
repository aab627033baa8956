import pytest
import torch

from coin.data.tasks import Tasks, task_with
from coin.errors import ConfigurationError, DataError


@pytest.fixture
def members(synthetic):
    return {"b": synthetic(3, test=23, key=1, seed=4), "a": synthetic(2, test=17, key=2, seed=5)}


def test_calibration_pools_each_tasks_own_samples_in_equal_shares(members):
    tasks = Tasks(members, samples_per_task=10, batch_size=6)
    pooled = tasks.calibration()
    assert [len(batch) for batch in pooled] == [6, 6, 6, 2]
    assert pooled.part[:6].bincount().tolist() == [3, 3]
    for part, (name, task) in enumerate(members.items()):
        own = task.calibration(10).inputs()
        torch.testing.assert_close(tasks.calibrations()[name].inputs(), own)
        torch.testing.assert_close(pooled.inputs()[pooled.part == part], own)


@pytest.mark.parametrize(("seed", "of_tasks"), [(None, [4, 5]), (9, [9, 9])])
def test_a_seed_is_every_tasks_and_leaves_the_given_tasks_alone(seed, of_tasks, members):
    tasks = Tasks(members, samples_per_task=10, seed=seed)
    assert tasks.seed == of_tasks[0]
    assert [task.seed for task in members.values()] == [4, 5]
    found = tasks.calibrations()["a"].inputs()
    expected = task_with(members["a"], seed=of_tasks[1]).calibration(10).inputs()
    torch.testing.assert_close(found, expected)


def test_tasks_take_the_networks_image_size_and_make_inputs_of_it(members):
    tasks = Tasks(members, samples_per_task=5)
    tasks.resize(24)
    assert tasks.calibration().inputs().shape == (10, 3, 24, 24)
    for place, loader in enumerate(tasks.test_dataloader()):
        images, labels = next(iter(loader))
        inputs, same = tasks.on_after_batch_transfer((images, labels), place)
        assert inputs.shape[1:] == (3, 24, 24)
        assert torch.equal(same, labels)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 2), (1, 2)])
def test_processes_share_the_test_samples_in_their_order_and_have_all_others(
    rank, world, members, on_process
):
    options = {"samples_per_task": 11, "promise_samples": 5}
    alone = Tasks(members, **options)
    calibration = alone.calibration().inputs()
    promise_samples = alone.promise_samples().inputs()
    tasks = on_process(Tasks(members, **options), rank, world)
    for task, loader in zip(members.values(), tasks.test_dataloader(), strict=True):
        expected = task.splits.test[rank::world]
        for found, own in zip(zip(*loader, strict=True), expected, strict=True):
            assert torch.equal(torch.cat(found), own)
    torch.testing.assert_close(tasks.calibration().inputs(), calibration)
    torch.testing.assert_close(tasks.promise_samples().inputs(), promise_samples)


def test_nothing_is_promised_without_samples_for_it(members):
    assert Tasks(members).promise_samples() is None


@pytest.mark.parametrize(
    ("option", "value"),
    [("samples_per_task", 0), ("batch_size", 0), ("seed", -1), ("promise_samples", -1)],
)
def test_options_are_checked_at_construction(option, value, members):
    with pytest.raises(ConfigurationError, match=f"found {option}={value}, expected"):
        Tasks(members, **{option: value})


def test_no_tasks_are_refused():
    with pytest.raises(DataError, match="found no tasks"):
        Tasks({})


@pytest.mark.parametrize(
    ("image_size", "samples", "message"),
    [
        (32, 5, r"have the image sizes \[16, 32\]; expected one common size"),
        (16, 33, "found 33 calibration samples of b, expected at most 32"),
    ],
)
def test_tasks_of_different_image_sizes_or_with_too_few_samples_are_refused(
    image_size, samples, message, members, synthetic
):
    members["c"] = synthetic(image_size=image_size)
    with pytest.raises(DataError, match=message):
        Tasks(members, samples).calibration()
