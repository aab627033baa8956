"""Every command runs in a folder of its own."""

import pytest

from coin.cli import main


@pytest.fixture(autouse=True)
def own_folder(elsewhere):
    """See `elsewhere`."""


@pytest.fixture(scope="session")
def alone(finished, config, tmp_path_factory):
    """The experiment, evaluated with the decoder that reads no survivor beside one that does."""
    output = tmp_path_factory.mktemp("alone")
    decoders = "[linear, expert_head]"
    body = "{class_path: Refit, init_args: {adapters: {rank: 2}}}"
    methods = f"[{{class_path: Coin, init_args: {{compress: {{bits: 8}}}}}}, {body}]"
    options = [f"--output={output}", f"--decoders={decoders}", f"--methods={methods}"]
    assert main(["run", "-c", str(config), *options]) == 0
    return output / "tiny"
