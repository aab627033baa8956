"""Adapters as peft's: what is written, and what peft itself makes of it."""

import json
from copy import deepcopy

import pytest
import torch
from near_experts import Attention, answers, case_of, perceptron
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

import coin
from coin.commands.export import export
from coin.errors import ConfigurationError, StateError
from coin.merging import extract_lora, fit_adapters
from coin.merging.peft import save_peft
from coin.networks import NetworkConfig, build_network, save_network
from coin.networks.heads import linear_head, with_head

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def moved(network, by=0.1):
    """Return a network near another: all its matrices but embeddings are moved, its biases and norms are not."""
    expert = deepcopy(network)
    for name, parameter in expert.named_parameters():
        if parameter.ndim > 1 and "embeddings" not in name:
            parameter.data += by * torch.randn_like(parameter)
    return expert


def loaded(base, folder):
    return peft.PeftModel.from_pretrained(deepcopy(base), str(folder)).eval()


# What peft makes of a folder


class Deep(nn.Module):
    """A grouped convolution whose name ends as another's, which a list of names would take too."""

    def __init__(self):
        super().__init__()
        grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.deep = nn.ModuleDict({"map": grouped})
        self.map = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.deep["map"](torch.relu(self.map(x)))
        return self.head(torch.relu(x).mean((2, 3)))


def like_head():
    """Peft keeps whole all layers whose names end as the head's: `0.2` by `2`."""
    inner = nn.Sequential(
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Linear(8, 5),
    )
    return nn.Sequential(inner, nn.ReLU(), nn.Linear(5, 3))


def roberta():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    config = transformers.RobertaConfig(vocab_size=50, num_labels=3, intermediate_size=24, **sizes)
    return transformers.RobertaForSequenceClassification(config)


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=50, n_layers=1, n_heads=2, hidden_dim=24, dim=16
    )
    return transformers.DistilBertForSequenceClassification(config)


NETWORKS = {
    "names that end alike": (Deep, lambda: torch.randn(60, 3, 4, 4)),
    "named as the head": (like_head, lambda: torch.randn(60, 6)),
    "roberta, a head of two layers": (roberta, lambda: torch.randint(3, 50, (60, 9))),
}


def logits(network, x):
    output = answers(network, x)
    return getattr(output, "logits", output)


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.filterwarnings("ignore:method 'extract_lora' leaves")
def test_peft_makes_of_a_folder_what_was_returned(kind, tmp_path):
    make, draw = NETWORKS[kind]
    torch.manual_seed(0)
    base = make().eval()
    x = draw()
    made = extract_lora(moved(base), base, [x], 3, tmp_path)
    assert_close(logits(loaded(base, tmp_path), x), logits(made, x))


def test_a_lora_of_full_rank_is_the_network(tmp_path):
    """Its factors are float32, as the folder is."""
    torch.manual_seed(0)
    base = perceptron(12, 10, 8, 3)
    network = moved(base, 0.3)
    x = torch.randn(200, 12)
    extract_lora(network, base, [x], 12, tmp_path)
    assert_close(answers(loaded(base, tmp_path), x), answers(network, x))


def test_a_body_of_convolutions_takes_plain_lora(tmp_path):
    experts, tasks = case_of("convolutions", (12, 12))
    experts = [expert.float() for expert in experts]
    images = [task.float() for task in tasks]
    method = coin.Average(adapters={"rank": 2, "scales": False})
    every = coin.Experts(experts, calibration=[[each] for each in images])
    made = method.coded_model(every, [0.5, 0.5])
    adapter = made.adapters[1]
    head = experts[1][-1]
    save_peft(adapter, made.network, head.state_dict(), tmp_path, images[1])
    wanted = adapter.applied_to(made.network, head)
    assert_close(answers(loaded(made.network, tmp_path), images[1]), answers(wanted, images[1]))


# A body and its adapters, exported


@pytest.mark.filterwarnings("ignore:method 'fit_adapters' leaves")
def test_a_fleet_is_exported_to_answer_in_one_batch_and_an_expert_of_it_as_a_network(tmp_path):
    """A body of texts with adapters of three experts of 2, 3 and 4 classes, all of whose logits are negative."""
    torch.manual_seed(0)
    distilbert().config.save_pretrained(tmp_path / "config")
    config = NetworkConfig(f"hf/{tmp_path / 'config'}", 9)
    body = build_network(config, 4).eval()
    tasks = {
        "a": ["no", "yes"],
        "b": ["red", "green", "blue"],
        "c": ["n", "e", "s", "w"],
    }
    experts = []
    for task, classes in tasks.items():
        head = nn.Linear(linear_head(body).in_features, len(classes))
        expert = with_head(moved(body, 0.3), head)
        linear_head(expert).bias.data -= 30
        path = tmp_path / f"experts/{task}/expert.safetensors"
        save_network(path, expert, config, len(classes), {"task": task, "classes": classes})
        experts.append(expert)
    texts = [torch.randint(3, 50, (60, 9)) for _ in experts]
    inputs = [[each] for each in texts]
    adapted = fit_adapters(body, experts, inputs, rank=4, scales=False)
    path = tmp_path / "coded/body.safetensors"
    save_network(path, body, config, 4, {"tasks": list(tasks)}, adapted.adapters)
    wanted = {}
    for place, task in enumerate(tasks):
        network = adapted.network(place, linear_head(experts[place]))
        wanted[task] = answers(network, texts[place]).logits
    folder = export(path, peft=True).parent
    auto = transformers.AutoModelForSequenceClassification
    model = peft.PeftModel.from_pretrained(auto.from_pretrained(folder / "body"), folder / "a", "a")
    model.load_adapter(folder / "b", adapter_name="b")
    model.load_adapter(folder / "c", adapter_name="c")
    model.eval()
    names = [task for task in tasks for _ in range(60)]
    with torch.no_grad():
        mixed = model(input_ids=torch.cat(texts), adapter_names=names).logits
    for task, found in zip(tasks, mixed.split(60), strict=True):
        classes = tasks[task]
        assert_close(found[:, : len(classes)], wanted[task])
        assert found.argmax(1).max() < len(classes)
        labels = json.loads((folder / task / "labels.json").read_text())
        assert list(labels["id2label"].values()) == classes
    options = json.loads((folder / "a/adapter_config.json").read_text())
    expected = {"r": 4, "lora_alpha": 4, "bias": "none", "task_type": "SEQ_CLS"}
    expected["modules_to_save"] = ["classifier"]  # vLLM refuses other names than this and `score`
    assert expected.items() <= options.items()
    alone = auto.from_pretrained(export(path, expert="b")).eval()
    assert list(alone.config.id2label.values()) == tasks["b"]
    assert_close(logits(alone, texts[1]), wanted["b"])


# What a plain LoRA has no place for


def on_images(**options):
    layer = nn.Conv2d(3, 4, 3, padding=1, **options)
    return nn.Sequential(
        layer,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def attention():
    return nn.Sequential(Attention(8, 2), nn.Flatten(), nn.Linear(32, 3))


def swin():
    return SwinTransformer([4, 4], 8, [2], [2], [2, 2], num_classes=3)


def blocks():
    inner = nn.Sequential(
        nn.Linear(6, 5),
        nn.ReLU(),
        nn.Sequential(nn.Linear(5, 5)),
    )
    return nn.Sequential(inner, nn.ReLU(), nn.Linear(5, 3))


def norm():
    return nn.Sequential(
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        nn.Linear(4, 2),
    )


IMAGE = (3, 8, 8)
OWN_CONVOLUTIONS = r"found '0\.weight' of a Conv2d with padding_mode .*; leave out --peft"
REFUSED = [
    (lambda: on_images(padding_mode="reflect"), IMAGE, OWN_CONVOLUTIONS),
    (lambda: on_images(dilation=2), IMAGE, OWN_CONVOLUTIONS),
    (attention, (4, 8), r"found '0\..*' of a (MultiheadAttention|Attention), which"),
    (swin, IMAGE, "found 'features.*', whose weight is read without calling the layer"),
    (blocks, (6,), r"found '0\.2' of several layers, whose name ends as the head's, '2'"),
    (norm, (4,), "found BatchNorms in Sequential"),
]


@pytest.mark.parametrize(("make", "shape", "message"), REFUSED)
@pytest.mark.filterwarnings("ignore:method 'extract_lora' leaves")
def test_networks_that_peft_would_answer_otherwise_are_refused(make, shape, message, tmp_path):
    torch.manual_seed(0)
    base = make().eval()
    with pytest.raises(ConfigurationError, match=message):
        extract_lora(moved(base), base, [torch.randn(40, *shape)], 2, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_head_of_another_shape_is_refused(tmp_path):
    message = r"the network's head' has tensor 'weight' of shape \[3, 4\], expected \[2, 4\]"
    with pytest.raises(StateError, match=message):
        extract_lora(perceptron(4, 4, 3), perceptron(4, 4, 2), [torch.ones(9, 4)], 2, tmp_path)


CORRECTED = {"left": torch.ones(5, 1), "right": torch.ones(1, 6)}


@pytest.mark.parametrize(
    ("changes", "classes", "message"),
    [
        (
            {"0.weight": {"scale": torch.ones(5, 1)}},
            3,
            r"found a scale or bias of '0\.weight', expected plain",
        ),
        ({}, 3, "found adapters without corrections, expected rank 1 at least"),
        ({"0.weight": CORRECTED}, 2, "found a head of 2 classes without a bias for a body of 3"),
    ],
)
def test_adapters_and_heads_that_have_no_place_in_a_lora_are_refused(
    changes, classes, message, tmp_path
):
    body = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False))
    head = nn.Linear(5, classes, bias=False).state_dict()
    with pytest.raises(ConfigurationError, match=message):
        save_peft(coin.Adapter(changes), body, head, tmp_path, torch.randn(1, 6))
    assert not list(tmp_path.iterdir())
