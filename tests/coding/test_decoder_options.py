import dataclasses

import pytest
import torch

from coin.coding import (
    Answers,
    Code,
    DecoderConfig,
    DecoderKind,
    FeatureCache,
    distinct_decoders,
    make_decoder,
    ridge_decoder,
)
from coin.coding.decoder_config import FeatureChoice, FittedOn
from coin.coding.decoder_state import decoder_state, decoders_state, restore_decoder, restore_decoders
from coin.coding.ridge import Projection, ProjectionKind, fit_projection
from coin.errors import ConfigurationError, DecodingError, NumericalError, StateError
from coin.files.safetensors import load_state, save_state

CODE = Code([[0.2, 0.3, 0.5]])
WIDTHS = (3, 4, 5)


def noisy_answers(samples, seed, code=CODE, widths=WIDTHS, scales=(1.0, 30.0, 0.1)):
    """Answers that are no exact function of one another, with features of stages that differ in size."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    hidden = normal(samples, 4)
    maps = torch.Generator().manual_seed(99)
    experts, features = [], []
    for _ in range(code.num_experts + code.num_coded):
        experts.append(hidden @ torch.randn(4, 2, generator=maps, dtype=torch.float64) + 0.3 * normal(samples, 2))
        stages = []
        for width, scale in zip(widths, scales, strict=True):
            mixed = hidden @ torch.randn(4, width, generator=maps, dtype=torch.float64)
            stages.append(scale * (mixed + 0.5 * normal(samples, width)))
        features.append(torch.cat(stages, 1))
    n = code.num_experts
    tasks = torch.randint(0, n, (samples,), generator=draw)
    return Answers(torch.stack(experts[:n]), torch.stack(experts[n:]), features[:n], features[n:], widths, tasks)


def one_stage(answers, part=slice(-WIDTHS[-1], None)):
    """The same answers with some columns of the features as the only stage."""
    return dataclasses.replace(
        answers,
        expert_features=[feature[:, part] for feature in answers.expert_features],
        coded_features=[feature[:, part] for feature in answers.coded_features],
        feature_widths=None,
    )


def projected(answers, experts, coded):
    """The answers with every network's features reduced by its own projection."""
    return dataclasses.replace(
        answers,
        expert_features=[project(feature) for project, feature in zip(experts, answers.expert_features, strict=True)],
        coded_features=[project(feature) for project, feature in zip(coded, answers.coded_features, strict=True)],
    )


def decoded(config, calibration, test, erased=(1,), code=CODE):
    return make_decoder(config, code, erased).fit(calibration).decode(test)


# Names and what is refused


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"kind": "linear"}, "linear"),
        ({"kind": "ridge", "fitted_on": "own"}, "ridge-own"),
        ({"kind": "feature_ridge"}, "feature_ridge"),
        ({"kind": "feature_ridge", "features": "stages"}, "feature_ridge-stages"),
        ({"kind": "feature_ridge", "components": 64}, "feature_ridge-64"),
        ({"kind": "feature_ridge", "features": "stages", "fitted_on": "own"}, "feature_ridge-stages-own"),
        (
            {"kind": "feature_ridge", "features": "stages", "components": 64, "projection": "random"},
            "feature_ridge-stages-64-random",
        ),
        (
            {"kind": "feature_ridge", "components": 8, "projection": "random", "fitted_on": "own", "survivors": False},
            "feature_ridge-8-random-own-alone",
        ),
        ({"kind": "ridge", "survivors": False}, "ridge-alone"),
        ({"kind": "expert_head"}, "expert_head"),
        ({"kind": "expert_head", "fitted_on": "own"}, "expert_head-own"),
    ],
)
def test_a_decoder_is_named_after_its_kind_and_what_differs(options, name):
    config = DecoderConfig.of(options)
    assert config.name == name
    assert DecoderConfig.named(name) == config
    decoder = make_decoder(config, CODE, [0])
    assert (decoder.config.name, decoder.config.kind) == (name, DecoderKind(options["kind"]))
    assert make_decoder(options["kind"], CODE, [0]).config.name == options["kind"]


def test_plain_words_become_members():
    config = DecoderConfig("feature_ridge", "stages", 3, "random", "own")
    assert config.kind is DecoderKind.feature_ridge
    assert config.features is FeatureChoice.stages
    assert config.projection is ProjectionKind.random
    assert config.fitted_on is FittedOn.own
    assert DecoderConfig.of("ridge") == DecoderConfig.of({"kind": "ridge"}) == DecoderConfig(DecoderKind.ridge)


REFUSED = [
    ({"kind": "cubic"}, "found decoder='cubic', expected one of linear, ridge, feature_ridge"),
    ({"kind": "ridge", "features": "stages"}, "found features=stages for ridge, expected feature_ridge"),
    ({"kind": "linear", "components": 4}, "found components=4 for linear, expected feature_ridge"),
    (
        {"kind": "linear", "fitted_on": "own"},
        "found fitted_on=own for linear, expected ridge or feature_ridge or exp",
    ),
    ({"kind": "linear", "survivors": False}, "found survivors=False for linear, expected ridge or feature_ridge"),
    ({"kind": "expert_head", "survivors": False}, "found survivors=False for expert_head, expected ridge or feature_r"),
    ({"kind": "ridge", "survivors": "no"}, "found survivors='no', expected true or false"),
    ({"kind": "feature_ridge", "projection": "random"}, "found projection=random without components"),
    ({"kind": "feature_ridge", "components": 0}, "found components=0, expected a whole number of at least 1"),
    ({"kind": "feature_ridge", "components": True}, "found components=True"),
    ({"kind": "feature_ridge", "components": 2.5}, "found components=2.5"),
    ({"kind": "feature_ridge", "features": "first"}, "found features='first', expected one of last, stages"),
    ({"kind": "ridge", "fitted_on": "others"}, "found fitted_on='others', expected one of all, own"),
    ({"kind": "feature_ridge", "depth": 3}, "found option 'depth' of a decoder, expected kind, features"),
    ({"components": 3}, "without kind, expected one of linear, ridge, feature_ridge"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_do_not_apply_are_refused_in_one_line(options, message):
    with pytest.raises(ConfigurationError, match=message) as found:
        DecoderConfig.of(options)
    assert "\n" not in str(found.value)


def test_a_list_of_decoders_has_no_repeats_and_is_not_empty():
    wanted = ["ridge", {"kind": "ridge", "fitted_on": "own"}, DecoderConfig(DecoderKind.linear)]
    assert [config.name for config in distinct_decoders(wanted)] == ["ridge", "ridge-own", "linear"]
    with pytest.raises(ConfigurationError, match="found decoder ridge twice"):
        distinct_decoders(["ridge", DecoderConfig(DecoderKind.ridge)])
    with pytest.raises(ConfigurationError, match="found no decoders"):
        distinct_decoders([])


# Stages


def test_last_reads_the_last_stage_alone():
    calibration, test = noisy_answers(60, 1), noisy_answers(9, 2)
    found = decoded("feature_ridge", calibration, test)
    torch.testing.assert_close(found, decoded("feature_ridge", one_stage(calibration), one_stage(test)), rtol=0, atol=0)
    changed = [torch.cat([100 + 7 * f[:, :7], f[:, 7:]], 1) for f in calibration.expert_features]
    other = dataclasses.replace(calibration, expert_features=changed)
    torch.testing.assert_close(found, decoded("feature_ridge", other, test), rtol=0, atol=0)


def test_stages_are_blocks_side_by_side_each_with_its_own_scale():
    """Stages divided by hand by their root mean square deviation are one stage whose own scale is then 1."""
    calibration, test = noisy_answers(60, 1), noisy_answers(9, 2)
    config = DecoderConfig("feature_ridge", features="stages")
    found = decoded(config, calibration, test)

    def scaled(answers):
        def by_hand(own, reference):
            parts = zip(own.split(WIDTHS, 1), reference.split(WIDTHS, 1), strict=True)
            return torch.cat([part / (ref - ref.mean(0)).square().mean().sqrt() for part, ref in parts], 1)

        return dataclasses.replace(
            answers,
            expert_features=list(map(by_hand, answers.expert_features, calibration.expert_features)),
            coded_features=list(map(by_hand, answers.coded_features, calibration.coded_features)),
            feature_widths=None,
        )

    expected = decoded("feature_ridge", scaled(calibration), scaled(test))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # Not so without the scales: the stages differ in size three hundredfold.
    rough = decoded("feature_ridge", one_stage(calibration, slice(None)), one_stage(test, slice(None)))
    assert (rough - expected).abs().max() > 1e-3


def test_the_unit_of_a_stage_does_not_matter():
    calibration, test = noisy_answers(60, 1), noisy_answers(9, 2)

    def rescaled(answers):
        features = [torch.cat([f[:, :3] * 1000, f[:, 3:]], 1) for f in answers.expert_features]
        return dataclasses.replace(answers, expert_features=features)

    for options in ({}, {"components": 5}):
        config = DecoderConfig("feature_ridge", features="stages", **options)
        torch.testing.assert_close(
            decoded(config, calibration, test),
            decoded(config, rescaled(calibration), rescaled(test)),
            rtol=1e-8,
            atol=1e-8,
        )


def test_stages_of_one_stage_are_refused():
    answers = noisy_answers(20, 1)
    for single in (one_stage(answers), dataclasses.replace(answers, feature_widths=[sum(WIDTHS)])):
        with pytest.raises(DecodingError, match="feature_ridge-stages decoder found features of one stage"):
            make_decoder(DecoderConfig("feature_ridge", features="stages"), CODE, [0]).fit(single)


# Components


@pytest.mark.parametrize("features", ["last", "stages"])
@pytest.mark.parametrize("erased", [(1,), (2, 0)])
def test_all_principal_components_lose_nothing(features, erased):
    code = Code([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
    calibration, test = noisy_answers(60, 1, code), noisy_answers(9, 2, code)
    width = WIDTHS[-1] if features == "last" else sum(WIDTHS)
    plain = decoded(DecoderConfig("feature_ridge", features), calibration, test, erased, code)
    whole = decoded(DecoderConfig("feature_ridge", features, width), calibration, test, erased, code)
    fewer = decoded(DecoderConfig("feature_ridge", features, 2), calibration, test, erased, code)
    torch.testing.assert_close(whole, plain, rtol=1e-9, atol=1e-9)
    assert (fewer - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", list(ProjectionKind))
def test_components_of_one_stage_are_those_of_projected_answers(kind):
    calibration, test = one_stage(noisy_answers(60, 1)), one_stage(noisy_answers(9, 2))

    def projections(features) -> list[Projection]:
        return [fit_projection(feature, 3, kind) for feature in features]

    experts, coded = projections(calibration.expert_features), projections(calibration.coded_features)
    expected = decoded("feature_ridge", projected(calibration, experts, coded), projected(test, experts, coded))
    found = decoded(DecoderConfig("feature_ridge", components=3, projection=kind), calibration, test)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_random_components_do_not_depend_on_the_state_of_the_generator():
    calibration, test = noisy_answers(60, 1), noisy_answers(9, 2)
    config = DecoderConfig("feature_ridge", "stages", 4, "random")
    torch.manual_seed(1)
    first = decoded(config, calibration, test)
    torch.manual_seed(2)
    assert torch.equal(first, decoded(config, calibration, test))
    principal = decoded(dataclasses.replace(config, projection="principal"), calibration, test)
    assert (first - principal).abs().max() > 1e-3


@pytest.mark.parametrize("components", [None, 2])
def test_answers_of_other_servers_are_refused(components):
    calibration, test = one_stage(noisy_answers(60, 1)), noisy_answers(9, 2)
    for other, found in (
        (one_stage(test, slice(0, 4)), r"\[\[6\], \[4\], \[4\], \[4\]\]"),
        (one_stage(test).without_coded(), r"\[\[4\], \[5\], \[5\]\]"),
    ):
        message = (
            rf"found answers of widths {found}, the decoder was fitted on \[\[6\], \[5\], .*; fit it on answers of"
        )
        with pytest.raises(DecodingError, match=message):
            decoded(DecoderConfig("feature_ridge", components=components), calibration, other)


# Own samples


@pytest.mark.parametrize("kind", ["ridge", "feature_ridge"])
@pytest.mark.parametrize("erased", [(1,), (2, 0)])
def test_own_fits_each_lost_expert_on_its_own_samples(kind, erased):
    code = Code([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
    calibration, test = noisy_answers(150, 1, code), noisy_answers(9, 2, code)
    decoder = make_decoder(DecoderConfig(kind, fitted_on="own"), code, erased).fit(calibration)
    found = decoder.decode(test)
    for place, expert in enumerate(erased):
        own = calibration.select(calibration.tasks == expert)
        expected = decoded(kind, own, test, erased, code)[place]
        torch.testing.assert_close(found[place], expected, rtol=1e-9, atol=1e-9)
    assert (found - decoded(kind, calibration, test, erased, code)).abs().max() > 1e-3
    assert len(decoder.fitted) == len(erased)
    assert decoder.samples_read == {expert: int((calibration.tasks == expert).sum()) for expert in erased}


def test_own_is_all_where_all_samples_are_of_the_lost_experts_task():
    calibration, test = noisy_answers(40, 1), noisy_answers(9, 2)
    calibration = dataclasses.replace(calibration, tasks=torch.full((40,), 1))
    for options in ({"features": "stages"}, {"components": 3}):
        config = DecoderConfig("feature_ridge", **options)
        own = dataclasses.replace(config, fitted_on="own")
        torch.testing.assert_close(decoded(own, calibration, test), decoded(config, calibration, test), rtol=0, atol=0)


def test_a_server_reduces_its_features_alike_whoever_is_lost():
    calibration = noisy_answers(90, 1)
    config = DecoderConfig("feature_ridge", components=3, fitted_on="own")
    assert make_decoder(config, CODE, [1]).fit(calibration).samples_read[1] < 90
    mixed = dataclasses.replace(calibration, tasks=torch.arange(90) % 3)
    projections = [fit_projection(one_stage(mixed).expert_features[i], 3, "principal") for i in range(3)]
    coded = [fit_projection(one_stage(mixed).coded_features[0], 3, "principal")]
    reduced = projected(one_stage(mixed), projections, coded)
    expected = decoded(DecoderConfig("feature_ridge", fitted_on="own"), reduced, reduced)
    torch.testing.assert_close(decoded(config, mixed, mixed), expected, rtol=1e-9, atol=1e-9)


def test_own_needs_to_know_the_tasks_and_two_samples():
    answers = noisy_answers(30, 1)
    own = DecoderConfig("ridge", fitted_on="own")
    with pytest.raises(DecodingError, match="ridge-own decoder found answers that do not tell their tasks"):
        make_decoder(own, CODE, [0]).fit(dataclasses.replace(answers, tasks=None))
    tasks = torch.zeros(30, dtype=torch.int64)
    tasks[4] = 2
    with pytest.raises(NumericalError, match="found 1 calibration samples of expert 2's own task, expected at least 2"):
        make_decoder(own, CODE, [0, 2]).fit(dataclasses.replace(answers, tasks=tasks))


# What fits share


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"features": "stages"},
        {"components": 2},
        {"features": "stages", "components": 3},
        {"fitted_on": "own"},
    ],
    ids=str,
)
def test_decoders_that_share_their_work_are_those_that_do_not_and_do_it_once(options, monkeypatch):
    """Two systems of the same experts and every erasure: a kernel or a projection for each of the five networks."""
    code = Code([[0.2, 0.3, 0.5], [0.5, 0.3, 0.2]])
    calibration, test = noisy_answers(9, 1, code), noisy_answers(5, 2, code)
    config, kept, done = DecoderConfig("feature_ridge", **options), FeatureCache(), []
    for name in ("block_kernel", "project_blocks"):
        real = getattr(ridge_decoder, name)
        monkeypatch.setattr(ridge_decoder, name, lambda *given, real=real: done.append(given[0]) or real(*given))
    if "fitted_on" in options:
        calibration = dataclasses.replace(calibration, tasks=torch.arange(9) % 3)
    cases = [([system], erased) for system in (0, 1) for erased in code.erasures()]
    shared = [
        make_decoder(config, code, erased).fit(calibration.with_coded(rows), kept).decode(test.with_coded(rows))
        for rows, erased in cases
    ]
    sources = [each[0] if isinstance(each, list) else each for each in done]
    if "fitted_on" not in options:
        assert sources
        assert len(set(map(id, sources))) == len(sources)
        assert sum(isinstance(each, list) for each in done) == (5 if "components" in options else 0)
    alone = [
        decoded(config, calibration.with_coded(rows), test.with_coded(rows), erased, code) for rows, erased in cases
    ]
    assert all(torch.equal(one, other) for one, other in zip(shared, alone, strict=True))


@pytest.mark.parametrize("features", ["last", "stages"])
def test_without_survivors_all_losses_share_one_regression(features, monkeypatch):
    code = Code([[0.2, 0.3, 0.5], [0.5, 0.3, 0.2]])
    calibration, test = noisy_answers(9, 1, code), noisy_answers(5, 2, code)
    config, kept, done = DecoderConfig("feature_ridge", survivors=False, features=features), FeatureCache(), []
    real = ridge_decoder.fit_blocks
    monkeypatch.setattr(ridge_decoder, "fit_blocks", lambda *given: done.append(given) or real(*given))
    systems = [(calibration.with_coded(rows), test.with_coded(rows)) for rows in ([0], [1])]
    shared = [
        make_decoder(config, code, erased).fit(seen, kept) for seen, _ in systems for erased in ([0], [1], [2], [2, 0])
    ]
    assert len(done) == 2
    alone = [make_decoder(config, code, each.erased).fit(systems[place // 4][0]) for place, each in enumerate(shared)]
    for place, (one, other) in enumerate(zip(shared, alone, strict=True)):
        assert torch.equal(one.decode(systems[place // 4][1]), other.decode(systems[place // 4][1]))
        assert torch.equal(one.errors, other.errors)
        (fit,) = one.fitted
        columns = torch.cat([calibration.experts[expert] for expert in one.erased], 1)
        direct = real(done[place // 4][0], calibration.experts[list(one.erased)])
        assert torch.allclose(fit.coefficients, direct.coefficients)
        assert torch.allclose(fit.target_mean, columns.double().mean(0))
        assert torch.allclose(fit.left_out, direct.left_out)
        assert torch.equal(fit.ridges, direct.ridges)


def test_without_survivors_an_expert_that_is_not_lost_may_fail():
    calibration = noisy_answers(9, 1, CODE)
    calibration.experts[2] = torch.nan
    config = DecoderConfig("feature_ridge", survivors=False)
    assert make_decoder(config, CODE, [0]).fit(calibration).decode(calibration).isfinite().all()
    with pytest.raises(NumericalError, match="hold a NaN"):
        make_decoder(config, CODE, [2]).fit(calibration)


# Answers


def test_answers_check_their_stages_and_tasks():
    answers = noisy_answers(6, 1)
    for change, message in (
        ({"feature_widths": (3, 4)}, "features of width 12, expected 7"),
        ({"feature_widths": ()}, r"stages of widths \[\], expected at least 1"),
        ({"feature_widths": (12, 0)}, r"stages of widths \[12, 0\], expected at least 1"),
        ({"expert_features": None, "coded_features": None}, "widths of stages but no features"),
        ({"tasks": torch.zeros(5, dtype=torch.int64)}, r"found tasks \[5\]"),
        ({"tasks": torch.zeros(6)}, r"torch.float32, expected int64 \[6\]"),
        ({"tasks": torch.tensor([0, 1, 2, 3, 0, 0])}, "expected indices below 3"),
        ({"tasks": torch.tensor([0, 1, 2, -1, 0, 0])}, "expected indices below 3"),
    ):
        with pytest.raises(DecodingError, match=message):
            dataclasses.replace(answers, **change)
    lost = [answers.expert_features[0][:, :0], *answers.expert_features[1:]]
    assert dataclasses.replace(answers, expert_features=lost).feature_widths == WIDTHS


def test_stages_and_tasks_travel_with_the_answers():
    answers = noisy_answers(7, 1)
    joined = Answers.concatenate([answers.select(slice(0, 3)), answers.select(torch.tensor([3, 4, 5, 6]))])
    for other in (joined, answers.without_coded(), answers.with_coded([0])):
        assert tuple(other.feature_widths) == WIDTHS
        assert torch.equal(other.tasks, answers.tasks)
    assert answers.without_coded().coded_features == []
    assert [stage.shape[1] for stage in answers.stages(answers.expert_features[0])] == list(WIDTHS)
    with pytest.raises(DecodingError, match="differ in networks, classes, features, stages"):
        Answers.concatenate([answers, dataclasses.replace(answers, feature_widths=(12,))])
    with pytest.raises(DecodingError, match="whether they tell the tasks"):
        Answers.concatenate([answers, dataclasses.replace(answers, tasks=None)])
    free = dataclasses.replace(answers, feature_widths=None)
    for whose in ("expert_features", "coded_features"):
        wider = [torch.cat([feature, feature], 1) for feature in getattr(free, whose)]
        with pytest.raises(DecodingError, match="differ in networks, classes, features, stages"):
            Answers.concatenate([free, dataclasses.replace(free, **{whose: wider})])


@pytest.mark.parametrize(
    "config",
    [
        DecoderConfig("linear"),
        DecoderConfig("ridge", fitted_on="own"),
        DecoderConfig("feature_ridge", features="stages", components=16, projection="random", fitted_on="own"),
    ],
    ids=lambda config: config.name,
)
def test_a_name_stands_for_its_options(config):
    assert DecoderConfig.named(config.name) == config


@pytest.mark.parametrize("name", ["", "magic", "ridge-magic", "feature_ridge-own-stages", "linear-16"])
def test_names_of_nothing(name):
    with pytest.raises(ConfigurationError, match="found"):
        DecoderConfig.named(name)


# Kept and read back

EVERY_OPTION = [
    {"kind": "linear"},
    *({"kind": "ridge", "fitted_on": own, "survivors": survivors} for own in FittedOn for survivors in (True, False)),
    {"kind": "feature_ridge", "features": "stages", "components": 3, "survivors": False},
    *(
        {"kind": "feature_ridge", "features": features, "fitted_on": fitted_on, **reduced}
        for features in FeatureChoice
        for fitted_on in FittedOn
        for reduced in ({}, *({"components": 3, "projection": kind} for kind in ProjectionKind))
    ),
]


@pytest.mark.parametrize("options", EVERY_OPTION, ids=lambda options: DecoderConfig.of(options).name)
@pytest.mark.parametrize("erased", [(1,), (2, 0)])
def test_a_decoder_that_was_read_back_answers_to_the_last_bit(options, erased, tmp_path):
    code = Code([[0.2, 0.3, 0.5], [0.5, 0.3, 0.2]])
    decoder = make_decoder(DecoderConfig.of(options), code, erased).fit(noisy_answers(90, 0, code))
    state, rests = decoders_state([make_decoder("linear", code, [0]), decoder])
    assert not any("left_out" in name or "leave_one_out" in name for name in state)  # they grow with the samples
    save_state(tmp_path / "decoders.safetensors", state, {"decoders": rests})
    state, told = load_state(tmp_path / "decoders.safetensors")
    _, found = restore_decoders(state, told["decoders"], code)
    assert (found.config, found.erased) == (decoder.config, erased)
    for size in (1, 2, 7, 40):
        test = noisy_answers(size, 1, code)
        logits = decoder.decode(test)
        assert torch.equal(found.decode(test), logits)
        assert torch.equal(found.errors, decoder.errors)
        for place, expert in enumerate(erased):
            assert torch.equal(found.risk(expert, logits[place]), decoder.risk(expert, logits[place]))


def test_a_state_that_is_not_whole_is_refused():
    unfitted = make_decoder("ridge", CODE, [1])
    assert not restore_decoder(*decoder_state(unfitted), CODE).fitted
    state, rest = decoder_state(unfitted.fit(noisy_answers(90, 0)))
    wrong = {
        "'fitted.0.input_mean'": ({name: state[name] for name in state if name != "fitted.0.input_mean"}, rest),
        "no such tensor": ({**state, "fitted.0.more": state["moments"]}, rest),
        r"expected \[6, 2\]": ({**state, "fitted.0.coefficients": torch.zeros(5, 2)}, rest),
        "not whole": ({**state, "moments": None}, rest),
        "'widths'": (state, {name: rest[name] for name in rest if name != "widths"}),
        "4 experts, expected 3": (state, {**rest, "num_experts": 4}),
    }
    for message, given in wrong.items():
        with pytest.raises(StateError, match=message):
            restore_decoder(*given, CODE)
    with pytest.raises(StateError, match="'1/moments' in the state of 1 decoders"):
        restore_decoders({"1/moments": state["moments"]}, [rest], CODE)
