"""A coded system: what it decodes and accepts, which networks run, how it is saved, and what it refuses."""

import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from coin.coding import Code, DecoderKind, answer_score, make_decoder, promised_threshold, uniform
from coin.errors import ConfigurationError, DataError, DecodingError, FileError, StateError
from coin.files.safetensors import save_state
from coin.merging import Average, merge_networks
from coin.modules import Coded

CODES = {
    "two": [[0.5, 0.5]],
    "three": [[0.2, 0.3, 0.5]],
    "two rows": [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]],
}
ROWS = CODES["two rows"]
CLASSES = (3, 2, 3)


class Net(nn.Module):
    """A head on a body that all networks share."""

    def __init__(self, body, outputs):
        super().__init__()
        self.body = body
        self.head = nn.Linear(4, outputs).double()

    def forward(self, x):
        return self.head(self.body(x))


class Gone(nn.Linear):
    def forward(self, x):
        raise RuntimeError("a network ran that nobody reads")


@pytest.fixture
def inputs():
    return torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make_system(matrix=ROWS, noise=0.0):
    """Return experts on one body, one of two classes, and coded models that are their sums but for noise."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 4), nn.ReLU()).double()
    experts = [Net(body, CLASSES[place]) for place in range(len(matrix[0]))]
    coded = []
    for row in matrix:
        network = Net(body, 3)
        state = {
            name: torch.zeros_like(tensor) for name, tensor in network.head.state_dict().items()
        }
        for weight, expert in zip(row, experts, strict=True):
            for name, tensor in expert.head.state_dict().items():
                state[name][: len(tensor)] += weight * tensor
        for name, tensor in state.items():
            state[name] = tensor + noise * torch.randn(tensor.shape, dtype=torch.float64)
        network.head.load_state_dict(state)
        coded.append(network)
    return Coded(Code(matrix), experts, coded, names=["a", "b", "c"][: len(experts)])


@pytest.mark.parametrize("matrix", CODES.values(), ids=CODES.keys())
@pytest.mark.parametrize("kind", list(DecoderKind))
def test_lost_experts_are_decoded_and_never_run(matrix, kind, inputs):
    close = {"rtol": 1e-4, "atol": 1e-4} if kind.needs_fit else {"rtol": 1e-10, "atol": 1e-10}
    system = make_system(matrix)
    wanted = [expert(inputs) for expert in system.experts]
    experts = list(system.experts)
    for erased in system.code.erasures():
        backwards = erased[::-1]
        system.experts = nn.ModuleList(experts)
        system.fit_decoder(inputs.split(7), backwards, kind)
        for expert in erased:
            system.experts[expert] = Gone(1, 1)
        decoded = system.decode(inputs)
        for logits, expert in zip(decoded, backwards, strict=True):
            own = logits[:, : CLASSES[expert]]
            torch.testing.assert_close(own, wanted[expert], **close)
            assert logits[:, CLASSES[expert] :].isneginf().all()


def test_without_survivors_one_fit_serves_every_loss_and_only_what_is_read_runs(inputs):
    system = make_system()
    wanted = system.answers(inputs).experts
    system.fit_decoder([], [0], "expert_head")
    system.fit_decoder(inputs.split(9), [0, 1, 2], "expert_head")
    system.experts = nn.ModuleList([Gone(1, 1) for _ in range(3)])
    for erased in ([0], [1], [2], [0, 1], [2, 0]):
        for logits, expert in zip(system.decode(inputs, erased), erased, strict=True):
            own = slice(0, CLASSES[expert])
            torch.testing.assert_close(logits[:, own], wanted[expert, :, own], rtol=0, atol=1e-12)
    system.coded[1] = Gone(1, 1)
    system.decode(
        inputs, [0]
    )  # by the decoder of this loss alone, from the coded model that weighs it most
    with pytest.raises(RuntimeError, match="nobody reads"):
        system.decode(inputs, [2])


def test_a_system_runs_in_eval_mode_and_leaves_its_networks_as_found(inputs, make_trainer):
    linear = nn.Linear(5, 3).double()
    linear.bias.requires_grad_(False)
    dropping = nn.Sequential(nn.Dropout(), linear)
    stand_in = nn.Linear(5, 3).double().eval()
    system = Coded([[0.5, 0.5]], [nn.Linear(5, 3).double(), dropping], [stand_in])
    modes = {module: module.training for module in system.modules()}
    make_trainer().predict(system, DataLoader(inputs, 7))
    answers = system.answers(inputs)
    torch.testing.assert_close(answers.experts[1], linear(inputs))
    decoded = system.fit_decoder(inputs.split(7), [1], "ridge").decode(inputs)
    for found in (answers.experts, system(inputs), decoded):
        assert not found.requires_grad
    assert {module: module.training for module in system.modules()} == modes
    assert [parameter.requires_grad for parameter in dropping.parameters()] == [True, False]


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
    system = make_system(noise=0.1)
    wanted = system.fit_decoder(inputs.split(7), [0, 2], kind).decode(inputs)
    for network in (*system.experts, *system.coded):
        network.register_forward_pre_hook(spoil)
    given = inputs.clone()
    decoded = system.fit_decoder(given.split(7), [0, 2], kind).decode(given)
    assert torch.equal(decoded, wanted)
    assert torch.equal(given, inputs)


def test_several_losses_are_ready_at_once_and_say_their_score(inputs):
    system = make_system(noise=0.1)
    for erased in system.code.erasures():
        system.fit_decoder(inputs.split(7), erased, "ridge")
    answers = system.answers(inputs)
    for erased in system.code.erasures():
        expected = make_decoder("ridge", system.code, erased).fit(answers).decode(answers)
        decoded = system.decode(inputs, erased)
        scores = system.score(decoded, erased)
        for place, expert in enumerate(erased):
            own = slice(0, CLASSES[expert])
            torch.testing.assert_close(decoded[place, :, own], expected[place, :, own])
            torch.testing.assert_close(scores[place], answer_score(decoded[place, :, own]))
    assert torch.equal(system.decode(inputs), decoded)  # by default of the last
    assert torch.equal(system.decode(inputs, [2, 1]), decoded[[1, 0]])


def test_experts_are_given_by_name_and_calibration_as_pairs_too(inputs):
    system = make_system(noise=0.1)
    wanted = system.fit_decoder(inputs.split(7), [1], "ridge").decode(inputs)
    pairs = DataLoader(list(zip(inputs, torch.zeros(60), strict=True)), batch_size=7)
    assert torch.equal(system.fit_decoder(pairs, ["b"], "ridge").decode(inputs, ["b"]), wanted)
    assert list(system.decoders) == [(1,)]
    lost = system.answers(inputs, erased=["c"]).experts.isnan().flatten(1).all(1)
    assert lost.tolist() == [False, False, True]


def test_answers_are_accepted_as_promised_by_inputs_of_each_experts_own_task(inputs):
    system = make_system(noise=0.02)
    system.fit_decoder(inputs.split(7), [0, 2], "linear")
    new = torch.randn(400, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tasks = torch.arange(400) % 3
    promises = system.accept(0.2, 0.9, inputs=new.split(150), erased=[2, 0], tasks=tasks)
    decoded = system.decode(new, [2, 0])
    scores = system.score(decoded, [2, 0])
    answers = system.answers(new).experts
    accepted = system.accepted(decoded, [2, 0])
    for place, expert in enumerate([2, 0]):
        is_own = tasks == expert
        differs = decoded[place, is_own].argmax(1) != answers[expert, is_own].argmax(1)
        assert promises[place] == promised_threshold(scores[place, is_own], differs, 0.2, 0.9)
        assert torch.equal(accepted[place], scores[place] <= promises[place].threshold)
    assert system.accept(0.2, 0.9, inputs=new.split(150), tasks=tasks.tolist()) == promises[::-1]
    assert system.accept(0.001, inputs=[new])[0].samples == 400
    assert not system.accepted(decoded, [2, 0]).any()


def test_a_file_of_other_experts_or_of_something_else_is_refused(tmp_path):
    system = make_system()
    path = tmp_path / "system.safetensors"
    system.save(path)
    others = deepcopy(list(system.experts))
    nn.init.zeros_(others[1].head.bias)
    with pytest.raises(StateError, match="expert 1 is not the one that the system was saved with"):
        Coded.load(path, others)
    with pytest.raises(ConfigurationError, match="found 0 experts, expected the 3 that the system"):
        Coded.load(path, [])
    (tmp_path / "system.row-1.safetensors").unlink()
    with pytest.raises(FileError, match="is not the coded model that"):
        Coded.load(path, list(system.experts))
    save_state(path, {"x": torch.ones(2)}, {})
    with pytest.raises(
        FileError, match=r"holds no coded system, expected a file that Coded\.save wrote"
    ):
        Coded.load(path, list(system.experts))


class Own(nn.Module):
    """BatchNorm's statistics, a mask of infinities, a buffer in no state dict, and a child called `body`."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.register_buffer("mask", torch.full((6,), -torch.inf))
        self.register_buffer("scale", torch.rand(6), persistent=False)

    def forward(self, x):
        return self.body(torch.maximum(x * self.scale, self.mask))


def own_system(dtype, matrix, **options):
    """Return a system of networks that hold all of that, merged, and calibration samples."""
    torch.manual_seed(0)
    experts = [Own().to(dtype).eval() for _ in range(2)]
    experts[1].body[1].running_mean += 1
    experts[1].scale.copy_(experts[0].scale)
    inputs = torch.randn(60, 6, dtype=dtype)
    batches = [[{"x": batch}] for batch in inputs.split(30)]
    coded = merge_networks(
        Average(batchnorm="average", **options), experts, matrix, calibration=batches
    )
    return Coded(matrix, experts, coded), {"x": inputs}


SAVED = {  # the system, and its decoder
    "linear": (lambda x: (make_system(noise=0.1), x), "linear"),
    "ridge": (lambda x: (make_system(noise=0.1), x), "ridge"),
    "feature_ridge": (lambda x: (make_system(noise=0.1), x), "feature_ridge"),
    "expert_head": (lambda x: (make_system(noise=0.1), x), "expert_head"),
    "float32": (lambda x: own_system(torch.float32, [[0.5, 0.5]]), "linear"),
    "three rows": (
        lambda x: own_system(torch.float64, [[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]]),
        "ridge",
    ),
    "adapters": (
        lambda x: own_system(torch.float32, [[0.5, 0.5]], adapters={"rank": 2}),
        "expert_head",
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_system_in_a_file_answers_as_before(name, inputs, tmp_path):
    make, kind = SAVED[name]
    system, batch = make(inputs)
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


@pytest.mark.parametrize("training", [False, True])
def test_threads_decode_at_once(training):
    torch.manual_seed(0)
    experts = [
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).eval() for _ in range(3)
    ]
    inputs = [[torch.randn(50, 6)] for _ in experts]
    bodies = merge_networks(Average(adapters={"rank": 2}), experts, uniform(3), calibration=inputs)
    system = Coded(uniform(3), experts, bodies)
    system.fit_decoder(inputs[0], [0, 1, 2], "expert_head").train(training)
    batch = torch.randn(4, 6)
    expected = [system.decode(batch, [expert]) for expert in range(3)]

    def decodes(expert):
        found = [system.decode(batch, [expert]) for _ in range(60)]
        return all(torch.allclose(each, expected[expert], atol=1e-6) for each in found)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(decodes, range(3)))
    finally:
        sys.setswitchinterval(interval)
    assert {module.training for module in system.modules()} == {training}


def ended():
    batches = iter([1])
    next(batches)
    return batches


def adapted():
    """Return a system of bodies with adapters."""
    experts = [nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double() for _ in range(2)]
    inputs = [[torch.randn(9, 5, dtype=torch.float64)] for _ in experts]
    bodies = merge_networks(
        Average(adapters={"rank": 1}), experts, [[0.5, 0.5]], calibration=inputs
    )
    return Coded([[0.5, 0.5]], experts, bodies)


REFUSED = {
    "an expert too few": (
        lambda s, x: Coded(s.code, s.experts[:2], s.coded),
        ConfigurationError,
        "found 2 experts and 2 coded models, expected 3 and 2, as the code has",
    ),
    "a name too few": (
        lambda s, x: Coded(s.code, s.experts, s.coded, "ab"),
        ConfigurationError,
        "expected a name each",
    ),
    "a name twice": (
        lambda s, x: Coded(s.code, s.experts, s.coded, "aab"),
        ConfigurationError,
        "expected a name each",
    ),
    "no decoder": (
        lambda s, x: s.decode(x),
        ConfigurationError,
        r"no decoder of the loss of \[\], only of \[\]; call",
    ),
    "another loss": (
        lambda s, x: s.fit_decoder([], [0, 1], "linear").decode(x, [0]),
        ConfigurationError,
        r"no decoder of the loss of \[0\], only of \[\(0, 1\)\]",
    ),
    "past the code": (
        lambda s, x: s.fit_decoder([], [0, 1, 2], "linear"),
        DecodingError,
        "loss of experts 0, 1, 2",
    ),
    "an unknown kind": (
        lambda s, x: s.fit_decoder([], [0], "cubic"),
        ConfigurationError,
        "found decoder='cubic'",
    ),
    "an unknown name": (
        lambda s, x: s.fit_decoder([], ["d"], "ridge"),
        ConfigurationError,
        "'d', expected 0 to 2, or",
    ),
    "an unknown place": (
        lambda s, x: s.fit_decoder([], [3], "ridge"),
        ConfigurationError,
        "found lost expert 3",
    ),
    "one batch to fit": (
        lambda s, x: s.fit_decoder(x, [0], "linear"),
        DataError,
        "found a Tensor, expected batches",
    ),
    "one batch to accept": (
        lambda s, x: s.fit_decoder([], [0], "linear").accept(0.2, inputs=x),
        DataError,
        "found a Tensor, .*; give .inputs.",
    ),
    "an ended iterator": (
        lambda s, x: s.fit_decoder(ended(), [0], "ridge"),
        DataError,
        "found no batch of inputs",
    ),
    "no batch": (
        lambda s, x: s.fit_decoder([], [0], "linear").accept(0.2, inputs=[]),
        DataError,
        "found no batch of inputs, expected at least one",
    ),
    "nothing promised": (
        lambda s, x: s.fit_decoder([], [0], "linear").accepted(s.decode(x)),
        DecodingError,
        "promised nothing; call accept with new inputs",
    ),
    "no task": (
        lambda s, x: adapted()(x),
        ConfigurationError,
        "found no tasks for a body with adapters",
    ),
    "adapters": (
        lambda s, x: adapted().fit_decoder([x], [0], "ridge"),
        ConfigurationError,
        "cannot read a body with",
    ),
    "NaN": (
        lambda s, x: s.fit_decoder([x / 0], [0], "expert_head"),
        StateError,
        "an answer of Net is not finite: tensor 'logits' holds a NaN",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name, inputs):
    use, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        use(make_system(), inputs)


def test_of_two_decoders_of_a_loss_the_later_answers(inputs):
    system = make_system(noise=0.3)
    system.fit_decoder([inputs], [0, 1], "linear")
    first = system.decode(inputs, [0, 1])
    system.fit_decoder([inputs], [1, 0], "ridge")
    later = system.decode(inputs, [0, 1])
    torch.testing.assert_close(system.decode(inputs)[[1, 0]], later)
    assert not torch.allclose(first[0], later[0])
