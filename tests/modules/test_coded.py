"""A coded system: what it decodes and accepts, which networks run, how it is saved, and what it refuses."""

import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from coin.coding import Code, DecoderKind, answer_score, make_decoder
from coin.errors import ConfigurationError, DataError, DecodingError, FileError, StateError
from coin.files.safetensors import save_state
from coin.merging import Average, merge_networks
from coin.modules import Coded

HALVES = [[0.5, 0.5]]
ROWS = [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]]
CODES = {"two": HALVES, "three": [[0.2, 0.3, 0.5]], "two rows": ROWS}
CLASSES = (3, 2, 3)


class Net(nn.Module):
    """A head on a body that all experts share."""

    def __init__(self, body, classes):
        super().__init__()
        self.body = body
        self.head = nn.Linear(4, classes).double()

    def forward(self, x):
        return self.head(self.body(x))


class Gone(nn.Linear):
    def forward(self, x):
        raise RuntimeError("a network ran that nobody reads")


@pytest.fixture
def inputs():
    return torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make_system(matrix=ROWS, noise=0.1):
    """Return experts on one body, one of two classes, and coded models that are their sums but for noise."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 4), nn.ReLU()).double()
    experts = [Net(body, classes) for classes in CLASSES[: len(matrix[0])]]
    coded = merge_networks(Average(), experts, matrix)
    for network in coded:
        for parameter in network.head.parameters():
            parameter.data += noise * torch.randn_like(parameter)
    return Coded(matrix, experts, coded, names="abc"[: len(experts)])


def own_logits(system, inputs):
    """Return the experts' own logits [N, B, C], −∞ for classes that they do not have."""
    logits = system.answers(inputs).experts
    for own, classes in zip(logits, CLASSES, strict=False):
        own[:, classes:] = -torch.inf
    return logits


@pytest.mark.parametrize("matrix", CODES.values(), ids=CODES.keys())
@pytest.mark.parametrize("kind", DecoderKind)
def test_lost_experts_are_decoded_and_never_run(matrix, kind, inputs):
    tolerance = 1e-4 if kind.needs_fit else 1e-10
    for erased in Code(matrix).erasures():
        system = make_system(matrix, noise=0)
        backwards = list(erased[::-1])
        expected = own_logits(system, inputs)[backwards]
        system.fit_decoder(inputs.split(7), backwards, kind)
        for expert in erased:
            system.experts[expert] = Gone(1, 1)
        decoded = system.decode(inputs)
        width = max(CLASSES[expert] for expert in erased)
        torch.testing.assert_close(decoded, expected[..., :width], rtol=tolerance, atol=tolerance)


def test_without_survivors_one_fit_serves_every_loss_and_only_what_is_read_runs(inputs):
    system = make_system(noise=0)
    expected = own_logits(system, inputs)
    system.fit_decoder([], [0], "expert_head")
    system.fit_decoder(inputs.split(9), [0, 1, 2], "expert_head")
    system.experts = nn.ModuleList([Gone(1, 1) for _ in range(3)])
    for erased in ([0], [1], [2], [0, 1], [2, 0]):
        decoded = system.decode(inputs, erased)
        width = decoded.shape[2]
        torch.testing.assert_close(decoded, expected[erased, :, :width], rtol=0, atol=1e-12)
    system.coded[1] = Gone(1, 1)
    # By the decoder of this loss alone, from the coded model that weighs it most.
    system.decode(inputs, [0])
    with pytest.raises(RuntimeError, match="nobody reads"):
        system.decode(inputs, [2])


def test_a_system_runs_in_eval_mode_and_leaves_its_networks_as_found(inputs, make_trainer):
    linear = nn.Linear(5, 3).double()
    linear.bias.requires_grad_(False)
    experts = [nn.Linear(5, 3).double(), nn.Sequential(nn.Dropout(), linear)]
    system = Coded(HALVES, experts, [nn.Linear(5, 3).double().eval()])
    modes = [module.training for module in system.modules()]
    make_trainer().predict(system, DataLoader(inputs, 7))
    answers = system.answers(inputs).experts
    torch.testing.assert_close(answers[1], linear(inputs))
    decoded = system.fit_decoder(inputs.split(7), [1], "ridge").decode(inputs)
    for found in (answers, system(inputs), decoded):
        assert not found.requires_grad
    assert [module.training for module in system.modules()] == modes
    assert (linear.weight.requires_grad, linear.bias.requires_grad) == (True, False)


def test_it_is_called_as_the_coded_models_which_are_padded(inputs, make_trainer):
    experts = [nn.Linear(5, 3).double() for _ in range(3)]
    coded = [nn.Linear(5, 3).double(), nn.Linear(5, 2).double()]
    system = Coded(ROWS, experts, coded)
    assert system.names == ("0", "1", "2")
    found = system(inputs)
    torch.testing.assert_close(found[0], coded[0](inputs))
    torch.testing.assert_close(found[1, :, :2], coded[1](inputs))
    assert not found[1, :, 2].any()
    predicted = torch.cat(make_trainer().predict(system, DataLoader(inputs, 7)), dim=1)
    torch.testing.assert_close(predicted, found)
    system.to("meta")
    assert system(inputs).device.type == "meta"


def spoil(network, arguments):
    """Change the inputs in place as soon as the network has its own copy of them."""
    copied = arguments[0].clone()
    arguments[0].sub_(1)
    return (copied,)


@pytest.mark.parametrize("kind", ["linear", "ridge", "expert_head"])
def test_networks_that_change_their_inputs_answer_as_others(kind, inputs):
    system = make_system()
    expected = system.fit_decoder(inputs.split(7), [0, 2], kind).decode(inputs)
    for network in (*system.experts, *system.coded):
        network.register_forward_pre_hook(spoil)
    given = inputs.clone()
    decoded = system.fit_decoder(given.split(7), [0, 2], kind).decode(given)
    assert torch.equal(decoded, expected)
    assert torch.equal(given, inputs)


def test_several_losses_are_ready_at_once_and_say_their_score(inputs):
    system = make_system(noise=0)
    expected = own_logits(system, inputs)
    for erased in system.code.erasures():
        system.fit_decoder(inputs.split(7), erased, "linear")
    for erased in system.code.erasures():
        decoded = system.decode(inputs, erased)
        width = decoded.shape[2]
        torch.testing.assert_close(decoded, expected[list(erased), :, :width])
        scores = system.score(decoded, erased)
        for expert, score, logits in zip(erased, scores, decoded, strict=True):
            assert torch.equal(score, answer_score(logits[:, : CLASSES[expert]]))
    assert torch.equal(system.decode(inputs), decoded)  # by default of the last
    assert torch.equal(system.decode(inputs, [2, 1]), decoded[[1, 0]])


def test_of_two_decoders_of_a_loss_the_later_answers(inputs):
    system = make_system()
    first = system.fit_decoder([inputs], [0, 1], "linear").decode(inputs, [0, 1])
    later = system.fit_decoder([inputs], [1, 0], "ridge").decode(inputs, [0, 1])
    assert torch.equal(system.decode(inputs)[[1, 0]], later)
    assert not torch.allclose(first[0], later[0])


def test_experts_are_given_by_name_and_calibration_as_pairs_too(inputs):
    system = make_system()
    expected = system.fit_decoder(inputs.split(7), [1], "ridge").decode(inputs)
    pairs = DataLoader(list(zip(inputs, torch.zeros(60), strict=True)), batch_size=7)
    assert torch.equal(system.fit_decoder(pairs, ["b"], "ridge").decode(inputs, ["b"]), expected)
    assert list(system.decoders) == [(1,)]
    lost = system.answers(inputs, erased=["c"]).experts.isnan().flatten(1).all(1)
    assert lost.tolist() == [False, False, True]


def test_answers_are_accepted_as_promised_by_inputs_of_each_experts_own_task(inputs):
    system = make_system(noise=0.02).fit_decoder(inputs.split(7), [0, 2], "linear")
    new = torch.randn(400, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tasks = torch.arange(400) % 3
    answers = replace(system.answers(new), tasks=tasks)
    decoder = make_decoder("linear", system.code, [0, 2])
    expected = decoder.accept(answers, 0.2, 0.9, CLASSES)
    promises = system.accept(0.2, 0.9, inputs=new.split(150), erased=[2, 0], tasks=tasks)
    assert promises == [expected[2], expected[0]]
    decoded = system.decode(new, [2, 0])
    scores = system.score(decoded, [2, 0])
    accepted = [decoder.accepted(2, scores[0]), decoder.accepted(0, scores[1])]
    assert torch.equal(system.accepted(decoded, [2, 0]), torch.stack(accepted))
    assert system.accept(0.2, 0.9, inputs=new.split(150), tasks=tasks.tolist()) == promises[::-1]
    assert system.accept(0.001, inputs=[new])[0].samples == 400
    assert not system.accepted(decoded, [2, 0]).any()


class Own(nn.Module):
    """BatchNorm's statistics, a mask of infinities, a buffer in no state dict, and a child called `body`."""

    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))
        self.register_buffer("mask", torch.full((6,), -torch.inf))
        self.register_buffer("scale", torch.linspace(0.5, 1, 6), persistent=False)

    def forward(self, x):
        return self.body(torch.maximum(x * self.scale, self.mask))


def own_system(dtype=torch.float32, matrix=HALVES, **options):
    """Return a merged system of networks that hold all of that, and calibration samples."""
    torch.manual_seed(0)
    experts = [Own(2).to(dtype).eval(), Own(3).to(dtype).eval()]
    experts[1].body[1].running_mean += 1
    batch = {"x": torch.randn(60, 6, dtype=dtype)}
    method = Average(batchnorm="average", **options)
    coded = merge_networks(method, experts, matrix, calibration=[[batch], [batch]])
    return Coded(matrix, experts, coded), batch


RANK_2 = {"adapters": {"rank": 2}}
SAVED = {  # the decoder and the system
    "linear": ("linear", {}),
    "three rows": ("ridge", {"matrix": [[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]]}),
    "float64": ("feature_ridge", {"dtype": torch.float64}),
    "heads": ("expert_head", {}),
    "adapters": ("expert_head", RANK_2),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_system_in_a_file_answers_as_before(name, tmp_path):
    kind, options = SAVED[name]
    system, batch = own_system(**options)
    tasks = [0] * 60
    for erased in system.code.erasures():
        system.fit_decoder([batch], erased, kind)
        system.accept(0.2, inputs=[batch], tasks=tasks if system.is_adapted else None)
    path = tmp_path / "system.safetensors"
    system.save(path)
    again = Coded.load(path, deepcopy(list(system.experts)))
    for attribute in ("names", "classes", "nbytes", "method"):
        assert getattr(again, attribute) == getattr(system, attribute)
    for erased in system.code.erasures():
        decoded = system.decode(batch, erased)
        assert torch.equal(again.decode(batch, erased), decoded)
        assert torch.equal(again.accepted(decoded, erased), system.accepted(decoded, erased))


def test_a_file_of_other_experts_or_of_something_else_is_refused(tmp_path):
    system = make_system()
    experts = list(system.experts)
    path = tmp_path / "system.safetensors"
    system.save(path)
    with pytest.raises(StateError, match="expert 0 is not the one that the system was saved with"):
        Coded.load(path, experts[::-1])
    with pytest.raises(ConfigurationError, match="found 0 experts, expected the 3 that the system"):
        Coded.load(path, [])
    (tmp_path / "system.row-1.safetensors").unlink()
    with pytest.raises(FileError, match="is not the coded model that"):
        Coded.load(path, experts)
    save_state(path, {}, {})
    message = r"holds no coded system, expected a file that Coded\.save wrote"
    with pytest.raises(FileError, match=message):
        Coded.load(path, experts)


@pytest.mark.parametrize("training", [False, True])
def test_threads_decode_at_once(training):
    system, batch = own_system(**RANK_2)
    system.fit_decoder([batch], [0, 1], "expert_head").train(training)
    few = batch["x"][:4]
    expected = [system.decode(few, [expert]) for expert in range(2)]

    def decodes(expert):
        found = [system.decode(few, [expert]) for _ in range(60)]
        return all(torch.allclose(each, expected[expert], atol=1e-6) for each in found)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(decodes, [0, 1, 0]))
    finally:
        sys.setswitchinterval(interval)
    assert {module.training for module in system.modules()} == {training}


REFUSED = {
    "found 2 experts and 2 coded models, expected 3 and 2, as the code has": (
        ConfigurationError,
        lambda system, x: Coded(ROWS, system.experts[:2], system.coded),
    ),
    "expected a name each": (
        ConfigurationError,
        lambda system, x: Coded(ROWS, system.experts, system.coded, "aab"),
    ),
    r"no decoder of the loss of \[\], only of \[\]; call": (
        ConfigurationError,
        lambda system, x: system.decode(x),
    ),
    r"no decoder of the loss of \[0\], only of \[\(0, 1\)\]": (
        ConfigurationError,
        lambda system, x: system.fit_decoder([], [0, 1], "linear").decode(x, [0]),
    ),
    "found lost expert 'd', expected 0 to 2, or": (
        ConfigurationError,
        lambda system, x: system.fit_decoder([], ["d"], "ridge"),
    ),
    "found a Tensor, expected batches": (
        DataError,
        lambda system, x: system.fit_decoder(x, [0], "linear"),
    ),
    "found a Tensor, .*; give .inputs.": (
        DataError,
        lambda system, x: system.fit_decoder([], [0], "linear").accept(0.2, inputs=x),
    ),
    "found no batch of inputs": (
        DataError,
        lambda system, x: system.fit_decoder([], [0], "ridge"),
    ),
    "found no batch of inputs, expected at least one": (
        DataError,
        lambda system, x: system.fit_decoder([], [0], "linear").accept(0.2, inputs=[]),
    ),
    "promised nothing; call accept with new inputs": (
        DecodingError,
        lambda system, x: system.fit_decoder([], [0], "linear").accepted(system.decode(x)),
    ),
    "found no tasks for a body with adapters": (
        ConfigurationError,
        lambda system, x: own_system(**RANK_2)[0](x),
    ),
    "ridge cannot read a body with adapters": (
        ConfigurationError,
        lambda system, x: own_system(**RANK_2)[0].fit_decoder([x], [0], "ridge"),
    ),
    "an answer of Net is not finite: tensor 'logits' holds a NaN": (
        StateError,
        lambda system, x: system.fit_decoder([x / 0], [0], "expert_head"),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message, inputs):
    error, use = REFUSED[message]
    with pytest.raises(error, match=message):
        use(make_system(), inputs)
