"""transformers shows nothing while networks are loaded, and is as verbose afterwards as before."""

from pathlib import Path

import pytest

from coin.networks import NetworkConfig, build_network

transformers = pytest.importorskip("transformers")


def test_loading_is_silent_and_leaves_the_process_s_verbosity(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    config = transformers.BertConfig(vocab_size=20, num_labels=2, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    capfd.readouterr()
    try:
        logging.set_verbosity_info()
        build_network(NetworkConfig(f"hf/{tmp_path}", weights="pretrained"), 3)
        assert "Loading weights" not in capfd.readouterr().err
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)
