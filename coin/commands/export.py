"""``coin export``: a network's file in, a folder out that transformers loads without coin; or one expert's network."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from coin.errors import ConfigurationError, FileError
from coin.merging.peft import save_peft
from coin.networks import head_name, load_network, pad_head, save_network
from coin.networks.files import NetworkFile
from coin.networks.hub import HuggingFace

HEADS = "heads.safetensors"  # zero-shot heads, in the folder of a CLIP's vision tower


def export(
    network: str, output: str | None = None, experts: dict[str, str] | None = None, expert: str | None = None,
    peft: bool = False,
) -> Path:  # fmt: skip
    """Write one expert of a body with adapters, or a network of Hugging Face's.

    The expert's is body, adapter and its own head in one: of Hugging Face's a folder that transformers loads, else a
    safetensors file of ``coin``. With ``peft`` its adapter is a folder that peft loads, with the body beside it.

    Of a CLIP's vision tower it is a `CLIPVisionModelWithProjection`, with ``heads.safetensors`` beside it: the heads
    ``[C, F]`` by task; the logits of a task are its head times the features, ``image_embeds`` of length 1.

    Args:
        network: The network's safetensors file, which may be a compressed one.
        output: The folder, or an expert's file; by default beside `network`, with its name.
        experts: The experts' files by task, whose heads are written beside a coded vision tower; by default those of
            the run whose ``coded/`` the tower lies in. With an expert its own head is written.
        expert: Of a body with adapters, the task whose expert is written, of whatever network.
        peft: Whether that is written as an adapter of peft's, ``OUTPUT/TASK``, for the body, ``OUTPUT/body``.
    """
    path = Path(network)
    file = load_network(path)
    if file.adapters or expert is not None:
        return _export_adapted(file, expert, experts or _beside(path), output, peft)
    source = file.config.source
    if not isinstance(source, HuggingFace):
        told = f"found '{network}', a {file.config.name}, expected a network of Hugging Face's (hf/…)"
        raise ConfigurationError(f"{told}; others are plain safetensors already, under the network's own names")
    folder = path.with_suffix("") if output is None else Path(output)
    if folder.is_file():
        raise FileError(f"found the file '{folder}', expected a folder to write or none; give another --output")
    try:
        source.save(file.network, folder)
        if source.zero_shot:
            if experts is None and "code" in file.provenance:  # those that lie beside its run's coded models
                experts = _beside(path)
            save_file(_heads(file, experts or {}), folder / HEADS)
    except OSError as error:
        raise FileError(f"cannot write '{folder}' ({error}); give another --output") from error
    return folder


def _beside(path: Path) -> dict[str, str]:
    """Return the experts' files of the run whose ``coded/`` a file lies in, by task."""
    own = sorted(path.absolute().parent.parent.glob("experts/*/expert.safetensors"))
    return {expert.parent.name: str(expert) for expert in own}


def _export_adapted(
    file: NetworkFile, expert: str | None, experts: dict[str, str], output: str | None, peft: bool
) -> Path:
    tasks = list(file.provenance.get("tasks", ())) if file.adapters else []
    if expert not in tasks or expert not in experts:
        known = f"one of {', '.join(tasks)}, whose files lie in experts/ or are given" if tasks else "none: no adapters"
        raise ConfigurationError(f"found --expert={expert} for '{file.path}', expected {known}")
    own, adapter = load_network(Path(experts[expert])), file.adapters[tasks.index(expert)]
    classes, path = own.num_classes, file.path.with_name(f"{file.path.stem}-{expert}")
    path = path if output is None else Path(output)
    if peft:
        classes, made = file.num_classes, file.network
        head = pad_head(own.network, classes).get_submodule(head_name(own.network))
        save_peft(adapter, made, head.state_dict(), path / expert)
        path = path / "body"
    else:
        made = adapter.applied_to(file.network, own.network.get_submodule(head_name(own.network)))
    if isinstance(file.config.source, HuggingFace):
        file.config.source.save(made, path)
        return path
    path = path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")
    save_network(path, made, file.config, classes, {"made_by": "coin export", "task": expert})
    return path


def _heads(file: NetworkFile, experts: dict[str, str]) -> dict[str, Tensor]:
    """Return the heads of experts by task; without any, that of the network itself, if it is an expert."""
    files = {task: load_network(Path(path)) for task, path in experts.items()}
    for task, other in files.items():
        if other.config.name != file.config.name or other.config.options != file.config.options:
            raise ConfigurationError(f"found the expert '{task}' of {other.config.name}, expected {file.config.name}")
    if not files and "code" not in file.provenance:
        files = {str(file.provenance.get("task")): file}
    head = f"{head_name(file.network)}.weight"
    return {task: other.state[head].clone().contiguous() for task, other in files.items()}
