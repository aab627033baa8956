"""Files of somebody else's that name a class by its import path: opening them imports nothing."""

import sys
from pathlib import Path

import pytest
import torch

from coin.cli import main
from coin.errors import FileError
from coin.modules import Coded
from coin.networks import NetworkConfig, build_network, load_network, save_network
from coin.networks.files import open_network
from coin.serving.policies import PolicyKind
from coin.serving.system import System

MODULE = """
from pathlib import Path
from torch import nn

Path("imported").touch()

class Small(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.layers(x))
"""
TRACE = Path("imported")
COMPRESS = ["compress", "net.safetensors", "--bits=4", "--base_bits=0", "--output=small"]
HINT = "add --import=foreign to the command"


def forget():
    sys.modules.pop("foreign", None)
    TRACE.unlink(missing_ok=True)


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A file of a class whose module lies in the working folder, and leaves a trace when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("foreign.py").write_text(MODULE)
    config = NetworkConfig("foreign.Small", 16)
    save_network(Path("net.safetensors"), build_network(config, 3), config, 3, {"task": "a"})
    forget()
    yield Path("net.safetensors")
    forget()


@pytest.mark.parametrize("use", [open_network, load_network])
def test_opening_a_file_imports_nothing_until_the_caller_has(foreign, use):
    message = r"'foreign\.Small', .*, write `import foreign` before, or add --import="
    with pytest.raises(FileError, match=message):
        use(foreign)
    assert not TRACE.exists()
    assert NetworkConfig("foreign.Small").reads == "images"  # as an experiment asks
    assert use(foreign).network(torch.zeros(2, 3, 16, 16)).shape == (2, 3)


@pytest.mark.usefixtures("foreign")
def test_a_command_imports_what_it_is_told_to_alone(capsys):
    assert main(COMPRESS) == 2
    assert HINT in capsys.readouterr().err
    assert not TRACE.exists()
    assert main([*COMPRESS, "--import", "foreign"]) == 0
    assert TRACE.exists()
    forget()
    with pytest.raises(FileError, match=r"'small' holds a 'foreign\.Small'"):
        open_network(Path("small"))
    assert not TRACE.exists()
    assert main([*COMPRESS, "--import=foreigner"]) == 2
    assert "found --import=foreigner, expected a module" in capsys.readouterr().err


@pytest.mark.usefixtures("foreign")
def test_a_checkpoint_of_lightnings_imports_nothing_either(capsys):
    parameters = {"network": "foreign.Small", "num_classes": 3}
    torch.save({"state_dict": {}, "hyper_parameters": parameters}, "net.ckpt")
    assert main(["test", "--ckpt_path=net.ckpt", "--data=Digits"]) == 2
    assert HINT in capsys.readouterr().err
    assert not TRACE.exists()


def test_a_process_that_serves_imports_what_the_one_that_opened_the_run_had(foreign):
    assert NetworkConfig("foreign.Small").reads == "images"
    first, second, own = (load_network(foreign).network for _ in range(3))
    coded = Coded([[0.5, 0.5]], [first, second], [own]).fit_decoder([], [0], "linear")
    coded.files = (foreign, foreign, foreign)
    coded.class_names = [["a", "b", "c"], ["d", "e", "f"]]
    system = System.of(coded, PolicyKind.coded_hedged, 0.9, "linear")
    forget()
    black = torch.zeros(1, 3, system.image_size, system.image_size, dtype=torch.uint8)
    assert system.reader()(foreign)(black).logits.shape == (1, 3)
