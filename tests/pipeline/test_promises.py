"""How many samples a promise needs, told before anything is made."""

import warnings
from pathlib import Path

import pytest
import yaml

from coin.cli import main
from coin.errors import ConfigurationError


@pytest.mark.parametrize(("alpha", "samples", "warned"), [(0.05, 58, "59"), (0.02, 148, "149"), (0.01, 299, None)])
def test_too_few_samples_for_any_promise_are_told_of_at_the_start(
    alpha: float, samples: int, warned: str | None, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop(*_: object) -> None:
        raise ConfigurationError("stopped")

    monkeypatch.setattr("coin.pipeline.run.execute", stop)
    options = yaml.safe_load(config.read_text()) | {"output": str(tmp_path)}
    options["calibration"] |= {"promise_samples": samples, "promise_alpha": alpha}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(options))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert main(["run", "-c", f"{tmp_path}/x.yaml"]) == 2
    lines = [str(each.message) for each in told if "nothing will be promised" in str(each.message)]
    assert len(lines) == (warned is not None)
    assert not warned or f"expected at least {warned} for" in lines[0]
