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


def test_without_a_seed_each_task_has_its_own(members):
    tasks = Tasks(members)
    assert [task.seed for task in tasks.tasks.values()] == [4, 5]
    assert tasks.seed == 4


def test_a_seed_draws_every_tasks_samples_anew_and_leaves_the_given_tasks_alone(members):
    tasks = Tasks(members, samples_per_task=10, seed=9)
    assert tasks.seed == 9
    assert [task.seed for task in members.values()] == [4, 5]
    found = tasks.calibrations()["a"].inputs()
    expected = task_with(members["a"], seed=9).calibration(10).inputs()
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, members["a"].calibration(10).inputs())


def test_tasks_take_the_networks_image_size_and_make_inputs_of_it(members):
    tasks = Tasks(members, samples_per_task=5)
    tasks.resize(24)
    assert tasks.calibration().inputs().shape == (10, 3, 24, 24)
    for place, loader in enumerate(tasks.test_dataloader()):
        images, labels = next(iter(loader))
        inputs, same = tasks.on_after_batch_transfer((images, labels), place)
        assert inputs.shape[1:] == (3, 24, 24)
        assert torch.equal(same, labels)


def on_each_process(members, on_process, world, **options):
    """Return the tasks as the processes of a Trainer see them."""
    found = []
    for rank in range(world):
        own = {name: task_with(task) for name, task in members.items()}
        found.append(on_process(Tasks(own, **options), rank, world))
    return found


def test_processes_share_the_test_samples_without_repeats_in_the_order_of_the_data(
    members, on_process
):
    for rank, tasks in enumerate(on_each_process(members, on_process, 2)):
        for task, loader in zip(members.values(), tasks.test_dataloader(), strict=True):
            images, labels = task.splits.test[:]
            found = list(loader)
            assert torch.equal(torch.cat([batch for batch, _ in found]), images[rank::2])
            assert torch.equal(torch.cat([of_batch for _, of_batch in found]), labels[rank::2])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_calibration_and_promise_samples_are_equal_on_every_process(world, members, on_process):
    options = {"samples_per_task": 11, "promise_samples": 5}
    expected = Tasks(members, **options)
    for tasks in on_each_process(members, on_process, world, **options):
        torch.testing.assert_close(tasks.calibration().inputs(), expected.calibration().inputs())
        torch.testing.assert_close(
            tasks.promise_samples().inputs(), expected.promise_samples().inputs()
        )


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


def test_tasks_of_different_image_sizes_or_with_too_few_samples_are_refused(members, synthetic):
    larger = {**members, "c": synthetic(image_size=32)}
    with pytest.raises(
        DataError, match=r"have the image sizes \[16, 32\]; expected one common size"
    ):
        Tasks(larger, samples_per_task=5).calibration()
    with pytest.raises(DataError, match="found 33 calibration samples of b, expected at most 32"):
        Tasks(members, samples_per_task=33).calibration()
