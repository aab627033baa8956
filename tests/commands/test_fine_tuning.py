"""Experts that were fine-tuned in part, on the command line: trained, measured, merged."""

from pathlib import Path

import pytest
import torch

from coin.cli import main
from coin.files.safetensors import load_provenance, load_state
from tests.commands.test_commands import DIGITS, NETWORK, QUIET

SAMPLES = 10
CALLBACKS = ["--trainer.callbacks+=ExpertExport", "--trainer.callbacks+=FisherEstimator"]
CALLBACKS += [f"--trainer.callbacks.init_args.samples_per_task={SAMPLES}"]


def fit(folder: Path, network: str, options: str, *more: str) -> int:
    model = [f"--model.network={network}", f"--model.options={options}", "--model.image_size=16"]
    root = f"--output={folder}"
    return main(["fit", *model, *more, *DIGITS, "--trainer.max_epochs=1", root, *CALLBACKS, *QUIET])


def test_a_checkpoint_is_measured_like_the_file_of_the_expert(tmp_path: Path) -> None:
    adam = ["--model.optimizer=Adam", "--model.lr=1e-3", "--model.lr_scheduler=CosineAnnealingLR"]
    assert fit(tmp_path, "small_vit", "{depth: 1, width: 16, mlp_width: 16}", *adam) == 0
    options = load_provenance(tmp_path / "expert.safetensors")["options"]
    assert (options["optimizer"], options["lr"]) == ("Adam", 1e-3)
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    root = f"--output={tmp_path}"
    assert main(["test", f"--ckpt_path={checkpoint}", *DIGITS, root, *QUIET]) == 0
    fisher = ["fisher", f"--samples_per_task={SAMPLES}", *DIGITS, *QUIET]
    for name, path in (("a", checkpoint), ("b", tmp_path / "expert.safetensors")):
        assert main([*fisher, f"--ckpt_path={path}", f"--output={tmp_path / name}"]) == 0
    ours, theirs, written = (load_state(tmp_path / name / "expert.fisher.safetensors")[0] for name in ("a", "b", "."))
    assert ours.keys() == theirs.keys() == written.keys()
    for name, tensor in theirs.items():
        assert ours[name].sub(tensor).abs().max() <= 1e-5 * tensor.abs().max()
        assert written[name].sub(tensor).abs().max() <= 1e-5 * tensor.abs().max()
    fingerprints = {load_provenance(tmp_path / name / "expert.fisher.safetensors")["weights"] for name in "ab"}
    assert len(fingerprints) == 1


def test_an_expert_of_a_head_alone_merges_with_one_that_was_trained_as_a_whole(tmp_path: Path) -> None:
    names = {"whole": "--model.lr=0.02", "head": "--model.trainable=[head]"}
    for name, option in names.items():
        assert fit(tmp_path / name, "small_resnet", "{width: 4}", option, "--model.freeze_batchnorm=true") == 0
    experts, fishers = (
        "{" + ", ".join(f"{name}: {tmp_path / name}/expert{kind}.safetensors" for name in names) + "}"
        for kind in ("", ".fisher")
    )
    task = "{class_path: Digits, init_args: {max_train: 120, max_test: 77, image_size: 16}}"
    tasks = f"--tasks={{whole: {task}, head: {task}}}"
    command = ["merge", "--method=Coin", f"--experts={experts}", f"--fisher={fishers}", tasks]
    assert main([*command, f"--samples_per_task={SAMPLES}", f"--output={tmp_path}"]) == 0
    coded, _ = load_state(tmp_path / "coin.safetensors")
    whole, head = (load_state(tmp_path / name / "expert.safetensors")[0] for name in names)
    assert coded.keys() == whole.keys()
    name = "stages.3.1.conv2.weight"
    assert not coded[name].equal(whole[name])
    assert not coded[name].equal(head[name])


@pytest.mark.slow
def test_the_seed_of_a_command_is_that_of_its_model_and_its_data(tmp_path: Path) -> None:
    def weights(*options: str) -> dict[str, torch.Tensor]:
        callbacks = ["--trainer.callbacks+=ExpertExport", f"--trainer.callbacks.path={tmp_path / 'a.safetensors'}"]
        steps = ["--trainer.max_epochs=1", "--trainer.enable_checkpointing=false"]
        assert main(["fit", *DIGITS, *QUIET, *NETWORK, *callbacks, *steps, *options]) == 0
        return load_state(tmp_path / "a.safetensors")[0]

    def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    first = weights("--seed_everything=1")
    assert alike(first, weights("--seed_everything=1"))
    assert alike(first, weights("--model.seed=1", "--data.seed=1"))
    assert not alike(first, weights("--seed_everything=2"))
    assert not alike(first, weights("--seed_everything=1", "--data.seed=2"))


FIT = ["fit", "--data=Digits", "--data.max_train=40", "--data.image_size=16", "--model.network=small_resnet"]
FIT += ["--model.image_size=16", "--trainer.max_epochs=1", "--trainer.logger=false", "--trainer.accelerator=cpu"]


def test_fit_writes_an_expert_to_the_folder_that_is_given(tmp_path: Path) -> None:
    """``--output`` is the Trainer's folder: whichever comes last decides, over that of a file."""
    file = tmp_path / "options.yaml"
    file.write_text(f"trainer: {{default_root_dir: {tmp_path / 'file'}}}\n")
    for option in (f"--output={tmp_path / 'a'}", f"--trainer.default_root_dir={tmp_path / 'a'}"):
        assert main([*FIT, "-c", str(file), option]) == 0
        (tmp_path / "a/expert.safetensors").unlink()
    assert not (tmp_path / "file").exists()
