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
    network: str,
    output: str | None = None,
    experts: dict[str, str] | None = None,
    expert: str | None = None,
    peft: bool = False,
) -> Path:
    """Write one expert of a body with adapters, or a network of Hugging Face's.

    The expert's is body, adapter and its own head in one: of Hugging Face's a folder that transformers loads, else a
    safetensors file of ``coin``. With ``peft`` its adapter is a folder that peft loads, with the body beside it; those
    of all experts without ``expert``.

    Args:
        network: The network's safetensors file, which may be a compressed one.
        output: The folder, or an expert's file; by default beside `network`, with its name.
        experts: The experts' files by task, for the head of an expert; by default those of the run whose
            ``coded/`` the file lies in.
        expert: Of a body with adapters, the task whose expert is written, of whatever network.
        peft: Whether that is written as an adapter of peft's, ``OUTPUT/TASK``, for the body, ``OUTPUT/body``: of all
            experts, or of that one. It is plain LoRA: adapters must have been fitted with ``scales: false``.
    """
    file = load_network(Path(network))
    if experts:
        files = {task: Path(path) for task, path in experts.items()}
    else:
        run = file.path.absolute().parent.parent
        paths = sorted(run.glob("experts/*/expert.safetensors"))
        files = {path.parent.name: path for path in paths}
    if file.adapters or expert is not None or peft:
        return _export_expert(file, expert, files, output, peft)
    source = file.config.source
    if not isinstance(source, HuggingFace):
        found = (
            f"found '{network}', a {file.config.name}, expected a network of Hugging Face's (hf/…)"
        )
        raise ConfigurationError(
            f"{found}; others are plain safetensors already, under the network's own names"
        )
    folder = file.path.with_suffix("") if output is None else Path(output)
    source.save(file.network, folder, _classes(file))
    return folder


def _export_expert(
    file: NetworkFile, expert: str | None, files: dict[str, Path], output: str | None, peft: bool
) -> Path:
    tasks = list(file.provenance.get("tasks", ())) if file.adapters else []
    wanted = tasks if peft and expert is None else [str(expert)]
    for each in wanted or [str(expert)]:
        if each not in tasks or each not in files:
            known = (
                f"one of {', '.join(tasks)}, whose files lie in experts/ or are given"
                if tasks
                else "none: no adapters"
            )
            raise ConfigurationError(f"found expert {each} for '{file.path}', expected {known}")
    path = file.path.with_name(f"{file.path.stem}-{'peft' if peft else expert}")
    if output is not None:
        path = Path(output)
    if peft:
        return _export_peft(file, {task: files[task] for task in wanted}, path)
    (task,) = wanted
    own = load_network(files[task])
    head = own.network.get_submodule(head_name(own.network))
    adapter = file.adapters[tasks.index(task)]
    made = adapter.applied_to(file.network, head)
    return _write(made, file, own.num_classes, path, expert, _classes(own))


def _classes(file: NetworkFile) -> Sequence[str]:
    """Return the names of an expert's classes in the order of its outputs; none where its file does not say."""
    return file.provenance.get("classes") or ()


def _export_peft(file: NetworkFile, experts: dict[str, Path], folder: Path) -> Path:
    """Write these experts' adapters for peft, and then the body, and return where that is."""
    source = file.config.source
    is_text = isinstance(source, HuggingFace) and source.reads == "texts"
    is_sequence = is_text and head_name(file.network) in SEQUENCE_HEADS
    tasks = file.provenance["tasks"]
    for task, path in experts.items():
        own = load_network(path)
        save_peft(
            file.adapters[tasks.index(task)],
            file.network,
            linear_head(own.network).state_dict(),
            folder / task,
            blank_input(file.config),
            base=str(folder / "body"),
            task_type="SEQ_CLS" if is_sequence else None,
            labels=_classes(own),
        )
    return _write(file.network, file, file.num_classes, folder / "body", None)


def _write(
    network: nn.Module,
    file: NetworkFile,
    num_classes: int,
    path: Path,
    expert: str | None,
    classes: Sequence[str] = (),
) -> Path:
    """Write a plain network like a file's, as a folder of transformers' or as coin's file, and return where."""
    if isinstance(file.config.source, HuggingFace):
        file.config.source.save(network, path, classes)
        return path
    if path.suffix != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
    save_network(
        path, network, file.config, num_classes, {"made_by": "coin export", "task": expert}
    )
    return path
