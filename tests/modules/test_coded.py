import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from closeness import close
from torch import nn
from torch.utils.data import DataLoader

from coin.coding import (
    Answers,
    Code,
    DecoderKind,
    answer_score,
    make_decoder,
    promised_threshold,
    uniform,
)
from coin.errors import ConfigurationError, DataError, DecodingError, FileError, StateError
from coin.files.safetensors import save_state
from coin.merging import Average, merge_networks
from coin.modules import Coded

CODES = [[[0.5, 0.5]], [[0.2, 0.3, 0.5]], [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]]]


class Lost(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.fc = nn.Linear(1, 1)
        self.network = [network]

    def forward(self, x):
        raise RuntimeError("a lost expert ran")


def linear(seed, outputs=3):
    torch.manual_seed(seed)
    return nn.Linear(5, outputs).double()


def encoded(experts, row):
    """A linear network that is exactly Σ_i β_i f_i."""
    network = nn.Linear(5, max(expert.out_features for expert in experts)).double()
    with torch.no_grad():
        network.weight.zero_()
        network.bias.zero_()
        for expert, weight in zip(experts, row, strict=True):
            network.weight[: expert.out_features] += weight * expert.weight
            network.bias[: expert.out_features] += weight * expert.bias
    return network


def pair_system(names=None):
    return Coded(Code(CODES[0]), [linear(0), linear(1)], [linear(2)], names)


def triple_system(matrix=CODES[2]):
    """Three experts, one of two classes, whose coded models are only nearly their sums."""
    experts = [linear(seed, outputs) for seed, outputs in enumerate((3, 2, 3))]
    stand_ins = [encoded(experts, row) for row in matrix]
    for network in stand_ins:
        network.weight.data += 0.1 * torch.randn(3, 5, dtype=torch.float64)
    return Coded(Code(matrix), experts, stand_ins, names=["a", "b", "c"])


@pytest.fixture
def inputs():
    return torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("matrix", CODES)
@pytest.mark.parametrize("kind", list(DecoderKind))
def test_linear_networks_decode_exactly_and_lost_experts_never_run(inputs, matrix, kind):
    code = Code(matrix)
    # A regression's ridge is chosen from a grid whose least value is not zero; class counts are padded.
    tolerance, last = (1e-12, 2) if kind == DecoderKind.linear else (1e-4, 3)
    experts = [linear(seed, last if seed == code.num_experts - 1 else 3) for seed in range(code.num_experts)]
    stand_ins = [encoded(experts, row) for row in matrix]
    wanted = [expert(inputs) for expert in experts]
    for erased in code.erasures():
        coded = Coded(code, experts, stand_ins).fit_decoder(inputs.split(7), erased, kind)
        for index in erased:
            coded.experts[index] = Lost(experts[index])
        for decoded, index in zip(coded.decode(inputs), erased, strict=True):  # a class that it has not is never it
            own = decoded[:, : experts[index].out_features]
            torch.testing.assert_close(own, wanted[index], rtol=tolerance, atol=tolerance)
            assert torch.equal(decoded.argmax(1), own.argmax(1))


def test_it_is_called_as_the_coded_models(inputs, make_trainer):
    coded = Coded(Code(CODES[2]), [linear(seed) for seed in range(3)], [linear(7), linear(8, outputs=2)])
    found = coded(inputs)
    predicted = make_trainer().predict(coded, DataLoader(inputs, 7))
    assert close(torch.cat(predicted, dim=1), found, sums=inputs.shape[1])
    assert found.shape == (2, 30, 3)
    assert torch.equal(found[0], coded.coded[0](inputs))
    assert torch.equal(found[1, :, :2], coded.coded[1](inputs))
    assert torch.equal(found[1, :, 2], torch.zeros(30, dtype=torch.float64))
    coded.to("meta")
    assert coded(inputs).device.type == coded.answers(inputs).experts.device.type == "meta"


def test_a_coded_system_runs_in_eval_mode_and_leaves_its_networks_as_found(inputs, make_trainer):
    dropping, stand_in = nn.Sequential(nn.Dropout(), nn.Linear(5, 3).double()), linear(2).eval()
    dropping[1].bias.requires_grad_(False)
    coded = Coded(Code(CODES[0]), [linear(0), dropping], [stand_in], ["a", "b"])
    make_trainer().predict(coded, DataLoader(inputs, 7))
    assert [dropping.training, dropping[0].training, stand_in.training] == [True, True, False]
    assert [p.requires_grad for p in coded.parameters()] == [True] * 3 + [False] + [True] * 2
    answers = coded.answers(inputs)
    assert torch.equal(answers.experts[1], dropping[1](inputs))
    assert not answers.experts.requires_grad
    assert not coded(inputs).requires_grad
    assert not coded.fit_decoder(inputs.split(7), [1], "ridge").decode(inputs).requires_grad
    assert [dropping.training, dropping[0].training, stand_in.training] == [True, True, False]
    assert (coded.names, pair_system().names) == (("a", "b"), ("0", "1"))


@pytest.mark.parametrize("kind", ["linear", "ridge", "expert_head"])
def test_networks_that_change_their_inputs_answer_as_others(inputs, kind):
    def decoded(system, given):
        system.fit_decoder(given.split(7), [0, 2], kind)
        return system.decode(given)

    wanted = decoded(triple_system(), inputs)
    changing = triple_system()
    for network in [*changing.experts, *changing.coded]:
        network.register_forward_pre_hook(spoil)
    given = inputs.clone()
    assert torch.equal(decoded(changing, given), wanted)
    assert torch.equal(given, inputs)


def spoil(network, arguments):
    """Change the inputs in place as soon as the network has its own copy of them."""
    copied = arguments[0].clone()
    arguments[0].sub_(1)
    return (copied,)


def test_what_does_not_fit_is_refused(inputs):
    with pytest.raises(ConfigurationError, match="1 experts and 1 coded models, expected 2 and 1, as the code has"):
        Coded(Code(CODES[0]), [linear(0)], [linear(1)])
    coded = pair_system(["a", "b"])
    for use, error, message in (
        (lambda: pair_system(["a"]), ConfigurationError, "of 2 experts, expected a name each"),
        (lambda: pair_system(["a", "a"]), ConfigurationError, "of 2 experts, expected a name each"),
        (
            lambda: coded.decode(inputs),
            ConfigurationError,
            r"found no decoder of the loss of \[\], only of \[\]; call fit_decoder",
        ),
        (lambda: coded.fit_decoder([], [0, 1], "linear"), DecodingError, "cannot decode the loss of experts 0, 1"),
        (lambda: coded.fit_decoder([], [0], "cubic"), ConfigurationError, "found decoder='cubic'"),
        (lambda: coded.fit_decoder([], ["d"], "ridge"), ConfigurationError, "lost expert 'd', expected 0 to 1, or one"),
        (lambda: coded.fit_decoder([], [3], "ridge"), ConfigurationError, "found lost expert 3"),
        (lambda: coded.accept(0.2, inputs=inputs, erased=[0]), DataError, "found a Tensor, .*; give .inputs."),
        (lambda: coded.fit_decoder(inputs, [0], "linear"), DataError, "found a Tensor, expected batches of inputs"),
        (lambda: coded.accepted(coded.decode(inputs)), DecodingError, "promised nothing; call accept with new inputs"),
    ):
        if error is DataError:
            coded.fit_decoder([], [0], "linear")
        with pytest.raises(error, match=message):
            use()


@pytest.mark.parametrize("kind", ["ridge", "feature_ridge"])
def test_regressions_read_what_they_need_and_lost_experts_never_run(kind, inputs):
    coded = pair_system()
    coded.fit_decoder(inputs.split(7), [1], kind)
    assert [decoder.kind for decoder in coded.decoders.values()][-1] == kind
    logits = [network(inputs).detach() for network in (*coded.experts, *coded.coded)]
    everything = Answers(torch.stack(logits[:2]), torch.stack(logits[2:]), [inputs] * 2, [inputs])
    expected = make_decoder(kind, coded.code, [1]).fit(everything).decode(everything)
    coded.experts[1] = Lost(coded.experts[1])
    torch.testing.assert_close(coded.decode(inputs), expected, rtol=1e-8, atol=1e-8)


def test_several_erasures_are_ready_at_once_and_say_their_score(inputs):
    system = triple_system()
    kinds = {erased: "linear" if len(erased) == 1 else "ridge" for erased in system.code.erasures()}
    for erased, kind in kinds.items():
        system.fit_decoder(inputs.split(7), erased, kind)
    assert list(system.decoders) == system.code.erasures()
    for erased, kind in kinds.items():
        decoder = make_decoder(kind, system.code, erased).fit(system.answers(inputs))
        decoded, whole = system.decode(inputs, erased), decoder.decode(system.answers(inputs))
        scores = system.score(decoded, erased)
        assert decoded.shape[2] == (2 if erased == (1,) else 3)
        for place, expert in enumerate(erased):
            width = 2 if expert == 1 else 3
            torch.testing.assert_close(decoded[place, :, :width], whole[place, :, :width])
            assert decoded[place, :, width:].isneginf().all()
            assert torch.equal(scores[place], answer_score(decoded[place, :, :width]))
    assert torch.equal(system.decode(inputs), system.decode(inputs, system.code.erasures()[-1]))
    assert torch.equal(system.decode(inputs, [2, 1]), system.decode(inputs, [1, 2])[[1, 0]])
    del system.decoders[1, 2]
    with pytest.raises(ConfigurationError, match=r"no decoder of the loss of \[2, 1\], only of .*; call fit_dec"):
        system.decode(inputs, [2, 1])


def test_lost_experts_are_given_by_index_or_by_name(inputs):
    system = triple_system()
    pairs = DataLoader(list(zip(inputs, torch.zeros(30), strict=True)), batch_size=7)
    wanted = system.fit_decoder(inputs.split(7), ["b"], "ridge").decode(inputs)
    assert torch.equal(system.fit_decoder(pairs, ["b"], "ridge").decode(inputs), wanted)  # a loader of pairs too
    assert list(system.decoders) == [(1,)]
    assert torch.equal(system.decode(inputs, ["b"]), system.decode(inputs, [1]))
    answers = system.answers(inputs, erased=["c"]).experts
    assert answers.isnan().all(dim=-1).any(dim=-1).tolist() == [False, False, True]


def test_answers_are_accepted_as_promised_by_inputs_of_each_experts_own_task(inputs):
    system = triple_system()
    system.fit_decoder(inputs.split(7), [0, 2], "linear")
    new = torch.randn(400, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tasks = torch.arange(400) % 3
    promises = system.accept(0.2, 0.9, inputs=new.split(150), erased=[0, 2], tasks=tasks)
    decoded = system.decode(new)
    scores, answers = system.score(decoded), system.answers(new).experts
    for place, expert in enumerate([0, 2]):
        own, width = tasks == expert, system.classes[expert]
        differs = decoded[place, own, :width].argmax(1) != answers[expert, own, :width].argmax(1)
        assert promises[place] == promised_threshold(scores[place, own], differs, 0.2, 0.9)
    thresholds = [-1 if own.threshold is None else own.threshold for own in promises]
    wanted = [score <= threshold for score, threshold in zip(scores, thresholds, strict=True)]
    assert torch.equal(system.accepted(decoded, [0, 2]), torch.stack(wanted))
    assert system.accept(0.2, 0.9, inputs=new.split(150), erased=[0, 2], tasks=tasks.tolist()) == promises
    assert system.accept(0.2, inputs=[new])[0].samples == 400
    assert system.accept(0.001, inputs=[new])[0].threshold is None
    assert not system.accepted(decoded).any()


@pytest.mark.parametrize("kind", list(DecoderKind))
def test_a_system_in_a_file_answers_as_before(inputs, kind, tmp_path):
    system, path = triple_system(), tmp_path / "system.safetensors"
    for erased in system.code.erasures():
        system.fit_decoder(inputs.split(7), erased, kind).accept(0.2, inputs=[2 * inputs])
    system.save(path)
    again = Coded.load(path, [linear(seed, outputs) for seed, outputs in enumerate((3, 2, 3))])
    assert again.names == system.names
    assert torch.equal(again.code.matrix, system.code.matrix)
    for erased in system.code.erasures():
        decoded = system.decode(inputs, erased)
        assert torch.equal(again.decode(inputs, erased), decoded)
        assert torch.equal(again.score(decoded, erased), system.score(decoded, erased))
        assert torch.equal(again.accepted(decoded, erased), system.accepted(decoded, erased))
    with pytest.raises(StateError, match="expert 1 is not the one that the system was saved with; give those experts"):
        Coded.load(path, [linear(0), linear(5, 2), linear(2)])
    with pytest.raises(ConfigurationError, match="found 0 experts, expected the 3 that the system"):
        Coded.load(path, [])
    save_state(path, {"x": torch.ones(2)}, {})
    with pytest.raises(FileError, match=r"holds no coded system, expected a file that Coded\.save wrote"):
        Coded.load(path, list(system.experts))


def test_networks_of_ones_own_with_all_they_hold_are_kept(tmp_path):
    """BatchNorm's statistics, a mask of infinities, a buffer in no state dict; inputs by name."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 3)
            self.register_buffer("mask", torch.full((4,), -torch.inf))
            self.register_buffer("scale", torch.rand(4), persistent=False)

        def forward(self, x):
            return self.fc(torch.maximum(self.norm(x) * self.scale, self.mask))

    torch.manual_seed(0)
    experts, code = [Own().eval() for _ in range(2)], Code([[0.5, 0.5]])
    experts[1].norm.running_mean += 1
    coded = merge_networks(Average(batchnorm="average"), experts, code)
    batch = {"x": torch.randn(9, 4)}
    system = Coded(code, experts, coded).fit_decoder([batch], [1], "ridge")
    system.save(tmp_path / "own.safetensors")
    again = Coded.load(tmp_path / "own.safetensors", experts)
    assert torch.equal(again.decode(batch), system.decode(batch))
    assert torch.equal(again.coded[0].scale, (experts[0].scale + experts[1].scale) / 2)


@pytest.mark.parametrize("training", [False, True])
def test_threads_decode_at_once(training):
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    experts = [deepcopy(start).eval() for _ in range(3)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    inputs = [[torch.randn(50, 6)] for _ in experts]
    bodies = merge_networks(Average(adapters={"rank": 2}), experts, uniform(3), calibration=inputs)
    system = Coded(uniform(3), experts, bodies).fit_decoder(inputs[0], [0, 1, 2], "expert_head")
    system.train(training)
    batch = torch.randn(4, 6)
    expected = [system.decode(batch, [expert]) for expert in range(3)]

    def decodes(expert):
        return [torch.allclose(system.decode(batch, [expert]), expected[expert], atol=1e-6) for _ in range(60)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(map(all, pool.map(decodes, range(3))))
    finally:
        sys.setswitchinterval(interval)
    assert {module.training for module in system.modules()} == {training}


class OnlyChild(nn.Module):
    """A network whose only child has the name that bodies with adapters use."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("adapters", [None, {"rank": 2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("code", [[[0.5, 0.5]], [[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]]])
def test_what_is_saved_is_loaded_whatever_its_names_classes_and_types(adapters, dtype, code, tmp_path):
    torch.manual_seed(0)
    experts = [OnlyChild().to(dtype).eval() for _ in range(2)]
    inputs = [[torch.randn(50, 6, dtype=dtype)] for _ in experts]
    coded = merge_networks(Average(adapters=adapters), experts, code, calibration=inputs)
    system = Coded(code, experts, coded).fit_decoder(inputs[0], [0], "expert_head" if adapters else "linear")
    decoded = system.decode(inputs[1][0], [0])
    assert decoded.dtype == dtype
    system.save(tmp_path / "system.safetensors")
    again = Coded.load(tmp_path / "system.safetensors", experts)
    assert torch.equal(again.decode(inputs[1][0], [0]), decoded)
    assert again.nbytes == system.nbytes
