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
    for number, (name, task) in enumerate(members.items()):
        own = task.calibration(10)
        assert torch.equal(tasks.calibrations()[name].inputs(), own.inputs())
        assert torch.equal(pooled.inputs((pooled.part == number).nonzero().flatten()), own.inputs())
    assert torch.bincount(pooled.part[:6]).tolist() == [3, 3]


def test_a_seed_draws_every_tasks_samples_anew_and_leaves_the_given_tasks_alone(members):
    assert (list(Tasks(members).tasks), Tasks(members).seed) == (["b", "a"], 4)
    tasks = Tasks(members, samples_per_task=10, seed=9)
    assert [tasks.seed, *(task.seed for task in tasks.tasks.values())] == [9, 9, 9]
    assert [task.seed for task in members.values()] == [4, 5]
    found = tasks.calibrations()["a"].inputs()
    assert torch.equal(found, task_with(members["a"], seed=9).calibration(10).inputs())
    assert not torch.equal(found, members["a"].calibration(10).inputs())


def test_two_processes_share_samples_without_repeats_in_the_order_of_the_data(members, on_process):
    def pair(**options):
        own = [{name: task_with(task) for name, task in members.items()} for _ in range(2)]
        return [on_process(Tasks(own[rank], 11, 4, **options), rank, 2) for rank in range(2)]

    ranks = pair()
    for place, task in enumerate(members.values()):
        images, labels = task.splits.test[:]
        for rank, tasks in enumerate(ranks):
            own_images, own_labels = (torch.cat(parts) for parts in zip(*tasks.test_dataloader()[place], strict=True))
            assert torch.equal(own_images, images[rank::2])
            assert torch.equal(own_labels, labels[rank::2])


def test_calibration_and_promise_samples_are_equal_on_any_number_of_processes(members, on_process):
    expected = Tasks(members, samples_per_task=11, promise_samples=5)
    for rank, world in ((0, 1), (0, 2), (1, 2), (2, 3)):
        own = {name: task_with(task) for name, task in members.items()}
        tasks = on_process(Tasks(own, samples_per_task=11, promise_samples=5), rank, world)
        assert torch.equal(tasks.calibration().inputs(), expected.calibration().inputs())
        assert torch.equal(tasks.promise_samples().inputs(), expected.promise_samples().inputs())


def test_options_are_checked_at_construction(members):
    wrong = {"samples_per_task": 0, "batch_size": 0, "seed": -1, "promise_samples": -1}
    for name, value in wrong.items():
        with pytest.raises(ConfigurationError, match=f"found {name}={value}, expected"):
            Tasks(members, **{name: value})


def test_tasks_that_do_not_fit_are_refused(members, synthetic):
    with pytest.raises(DataError, match="found no tasks"):
        Tasks({})
    with pytest.raises(DataError, match=r"have the image sizes \[16, 32\]; expected one common size"):
        Tasks({"b": members["b"], "c": synthetic(image_size=32)}, samples_per_task=5).calibration()
    told = "found 33 calibration samples of b, expected at most 32, its split's size; lower samples_per_task"
    with pytest.raises(DataError, match=told):
        Tasks(members, samples_per_task=33).calibration()
