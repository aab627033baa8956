"""``coin export``: a network's file in, a folder out that transformers loads without coin; or one expert's network."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from coin.errors import ConfigurationError
from coin.merging.peft import SEQUENCE_HEADS, save_peft
from coin.networks import head_name, load_network, save_network
from coin.networks.files import NetworkFile
from coin.networks.heads import linear_head
from coin.networks.hub import HuggingFace
from coin.networks.registry import blank_input


def export(
    network: Path, output: Path | None = None, expert: str | None = None, peft: bool = False
) -> Path:
    """Write one expert of a body with adapters, or a network of Hugging Face's.

    The expert's is body, adapter and its own head in one: of Hugging Face's a folder that transformers loads, else a
    safetensors file of ``coin``. With ``peft`` the adapter of every expert is a folder that peft loads, with the body
    beside it.

    Args:
        network: The network's safetensors file, which may be a compressed one. A body's lies in a run's ``coded/``,
            beside which are its experts.
        output: The folder, or an expert's file; by default beside `network`, with its name.
        expert: Of a body with adapters, the task whose expert is written, of whatever network.
        peft: Whether adapters are written for peft, ``OUTPUT/TASK``, for the body, ``OUTPUT/body``. They are plain
            LoRA: adapters must have been fitted with ``scales: false``.
    """
    file = load_network(network)
    own = "peft" if peft else expert
    name = file.path.stem if own is None else f"{file.path.stem}-{own}"
    path = output or network.with_name(name)
    tasks: list[str] = file.provenance["tasks"] if file.adapters else []
    if peft and tasks:
        return _export_peft(file, tasks, path)
    if expert is not None and expert in tasks:
        return _export_expert(file, tasks.index(expert), expert, path)
    if tasks:
        found = "no expert" if expert is None else f"expert '{expert}'"
        raise ConfigurationError(
            f"found {found} for the body in '{network}', expected one of {', '.join(tasks)}; give --expert, or "
            "--peft=true"
        )
    if own is not None:
        raise ConfigurationError(
            f"found no adapters in '{network}', expected a body with an adapter for each expert; fit one with a "
            "method's adapters: {rank: 16}, with scales: false for --peft=true"
        )
    if not isinstance(file.config.source, HuggingFace):
        raise ConfigurationError(
            f"found a {file.config.name} in '{network}', expected a network of Hugging Face's (hf/…), whose folder "
            "is written, or a body with adapters"
        )
    return _write(file.network, file, file.num_classes, path, None, _classes(file))


def _export_expert(file: NetworkFile, place: int, task: str, path: Path) -> Path:
    own = _expert(file, task)
    head = own.network.get_submodule(head_name(own.network))
    network = file.adapters[place].applied_to(file.network, head)
    return _write(network, file, own.num_classes, path, task, _classes(own))


def _export_peft(file: NetworkFile, tasks: Sequence[str], folder: Path) -> Path:
    """Write experts' adapters for peft, and then the body, and return where that is."""
    is_text = isinstance(file.config.source, HuggingFace) and file.config.reads == "texts"
    is_sequence = is_text and head_name(file.network) in SEQUENCE_HEADS
    for adapter, task in zip(file.adapters, tasks, strict=True):
        own = _expert(file, task)
        save_peft(
            adapter,
            file.network,
            linear_head(own.network).state_dict(),
            folder / task,
            blank_input(file.config),
            base=str(folder / "body"),
            task_type="SEQ_CLS" if is_sequence else None,
            labels=_classes(own),
        )
    return _write(file.network, file, file.num_classes, folder / "body", None)


def _expert(body: NetworkFile, task: str) -> NetworkFile:
    """Return the file of an expert of the run that a body is of."""
    run = body.path.absolute().parent.parent
    return load_network(run / "experts" / task / "expert.safetensors")


def _classes(file: NetworkFile) -> Sequence[str]:
    """Return the names of an expert's classes in the order of its outputs; none where its file does not say."""
    return file.provenance.get("classes") or ()


def _write(
    network: nn.Module,
    file: NetworkFile,
    num_classes: int,
    path: Path,
    task: str | None,
    classes: Sequence[str] = (),
) -> Path:
    """Write a plain network like a file's, as a folder of transformers' or as coin's file, and return where."""
    if isinstance(file.config.source, HuggingFace):
        file.config.source.save(network, path, classes)
        return path
    if path.suffix != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
    made = {"made_by": "coin export", "task": task}
    save_network(path, network, file.config, num_classes, made)
    return path
