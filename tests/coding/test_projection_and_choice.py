import pytest
import torch

from coin.coding import Answers, Code, choose_code, fit_projection, make_decoder, project_answers, simplex_codes
from coin.errors import ConfigurationError, DecodingError


def features(samples=30, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(5, 0.1, width, dtype=torch.float64)
    return torch.randn(samples, width, generator=generator, dtype=torch.float64) * spread + 3


@pytest.mark.parametrize("kind", ["principal", "random"])
def test_directions_are_orthonormal(kind):
    projection = fit_projection(features(), 5, kind)
    torch.testing.assert_close(projection.directions.T @ projection.directions, torch.eye(5, dtype=torch.float64))
    assert projection(features().float()).dtype == torch.float32


def test_principal_keeps_the_most_variance():
    x = features()
    kept = {kind: float(fit_projection(x, 3, kind)(x).var(0).sum()) for kind in ("principal", "random")}
    best = torch.linalg.eigvalsh(x.T.cov())[-3:].sum()
    assert kept["principal"] == pytest.approx(float(best))
    assert kept["random"] < kept["principal"]


@pytest.mark.parametrize("kind", ["principal", "random"])
def test_all_components_lose_nothing(kind):
    x = features()
    projection = fit_projection(x, 99, kind)
    torch.testing.assert_close(projection(x) @ projection.directions.T + projection.mean, x)


def test_projected_answers_decode():
    code = Code([[0.5, 0.5]])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    wide = [features(40, seed=i) for i in range(3)]
    answers = Answers(logits, code.encode(logits), wide[:2], wide[2:])
    projections = [fit_projection(feature, 2, "principal") for feature in wide]
    reduced = project_answers(answers, projections[:2], projections[2:])
    assert [feature.shape for feature in (*reduced.expert_features, *reduced.coded_features)] == [(40, 2)] * 3
    decoded = make_decoder("feature_ridge", code, [0]).fit(reduced).decode(reduced)
    torch.testing.assert_close(decoded[0], logits[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(DecodingError, match="projections for 1 experts"):
        project_answers(answers, projections[:1], projections[2:])
    with pytest.raises(DecodingError, match="without features"):
        project_answers(Answers(logits, code.encode(logits)), projections[:2], projections[2:])


def test_projection_options_are_checked():
    with pytest.raises(ConfigurationError, match="0 components"):
        fit_projection(features(), 0, "random")
    with pytest.raises(ConfigurationError, match="expected one of principal, random"):
        fit_projection(features(), 2, "best")


def test_simplex_codes_are_all_positive_rows():
    assert [code.matrix.tolist()[0] for code in simplex_codes(2, 4)] == [[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]]
    rows = {tuple(code.matrix[0].tolist()) for code in simplex_codes(3, 10)}
    assert len(rows) == 36
    with pytest.raises(ConfigurationError, match="resolution 2 for 3 experts"):
        simplex_codes(3, 2)


def test_the_chosen_code_has_the_smallest_bound():
    codes = simplex_codes(2, 10)
    assert choose_code(codes, lambda code: 1.0) == Code([[0.5, 0.5]])
    # Residuals that favour the first expert's own network move the choice towards it.
    residuals = {code: float(code.matrix[0, 1]) ** 2 for code in codes}
    bounds = {code: residuals[code] / float(code.matrix.min()) for code in codes}
    assert choose_code(codes, residuals.__getitem__) == min(bounds, key=bounds.__getitem__)
    with pytest.raises(ConfigurationError, match="no candidate"):
        choose_code([], lambda code: 1.0)
