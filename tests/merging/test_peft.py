"""Adapters as peft's: what is written, and what peft itself makes of it."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import coin
from coin.commands.export import export
from coin.errors import ConfigurationError, StateError
from coin.merging import extract_lora, fit_adapters
from coin.merging.peft import save_peft
from coin.networks import NetworkConfig, build_network, head_name, save_network
from coin.networks.heads import linear_head, with_head

peft = pytest.importorskip("peft")


def near(body, moved, inputs):
    """Two experts that differ from a body in one of its weights, and a fit of their adapters."""
    draw = torch.Generator().manual_seed(0)
    experts = [deepcopy(body) for _ in range(2)]
    for expert in experts:
        weight = expert.get_parameter(moved).data
        weight += 0.1 * torch.randn(weight.shape, generator=draw)
    batches = [[torch.randn(40, *inputs, generator=draw)] for _ in experts]
    return fit_adapters(body, experts, batches, rank=1, scales=False).adapters[0]


@pytest.mark.parametrize("options", [{"padding_mode": "reflect"}, {"dilation": 2}])
def test_convolutions_that_peft_makes_otherwise_are_refused(options, tmp_path):
    convolution = nn.Conv2d(3, 4, 3, padding=1, **options)
    body = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    adapter = near(body, "0.weight", (3, 8, 8))
    with pytest.raises(ConfigurationError, match=r"found '0\.weight' of a Conv2d with padding_mode .*; leave out --pe"):
        save_peft(adapter, body, {}, tmp_path, torch.randn(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def fleet(body, experts, batches, folder):
    """Write adapters of three experts, a, b and c, and return peft's model with all, and the adapters and heads."""
    adapted = fit_adapters(body, experts, [[each] for each in batches], rank=2, scales=False)
    for name, adapter, expert in zip("abc", adapted.adapters, experts, strict=True):
        head = expert.get_submodule(head_name(expert))
        save_peft(adapter, body, head.state_dict(), folder / name, batches[0])
    model = peft.PeftModel.from_pretrained(deepcopy(body), str(folder / "a"), adapter_name="a")
    model.load_adapter(str(folder / "b"), adapter_name="b")
    model.load_adapter(str(folder / "c"), adapter_name="c")
    return model.eval(), adapted


def test_a_fleet_answers_with_its_own_heads_where_another_layers_name_ends_alike(tmp_path):
    """Peft keeps whole all whose names end so: `0.2` by `2`."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    body = nn.Sequential(inner, nn.ReLU(), nn.Linear(5, 3)).eval()
    experts = [deepcopy(body) for _ in range(3)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    batches = [torch.randn(40, 6) for _ in experts]
    model, adapted = fleet(body, experts, batches, tmp_path)
    with torch.no_grad():
        for place, (name, expert) in enumerate(zip("abc", experts, strict=True)):
            model.set_adapter(name)
            expected = adapted.network(place, expert[2])(batches[place])
            torch.testing.assert_close(model(batches[place]), expected, rtol=1e-4, atol=1e-4)


def test_blocks_whose_names_end_as_the_heads_are_refused(tmp_path):
    inner = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 5)))
    body = nn.Sequential(inner, nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ConfigurationError, match=r"found '0\.2' of several layers, whose name ends as the head's, '2'"):
        save_peft(near(body, "0.0.weight", (6,)), body, body[2].state_dict(), tmp_path, torch.randn(1, 6))


def test_a_head_without_bias_has_no_place_for_classes_that_are_not_there(tmp_path):
    body = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    adapter = near(body, "0.weight", (6,))
    with pytest.raises(ConfigurationError, match="found a head of 2 classes without a bias for a body of 3"):
        save_peft(adapter, body, nn.Linear(5, 2, bias=False).state_dict(), tmp_path, torch.randn(1, 6))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_what_is_exported_answers_with_classes_of_its_own(kind, tmp_path):
    """Three adapters of 2, 3 and 4 classes, whose logits are all negative, loaded by peft and transformers alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "bert":
        config = bert().config
    else:
        config = transformers.DistilBertConfig(vocab_size=50, n_layers=1, n_heads=2, hidden_dim=24, dim=16)
    config.save_pretrained(tmp_path / "config")
    described = NetworkConfig(f"hf/{tmp_path / 'config'}", 9)
    body = build_network(described, 4).eval()
    tasks = {"a": ["no", "yes"], "b": ["red", "green", "blue"], "c": ["n", "e", "s", "w"]}
    experts, files = [], {}
    for task, classes in tasks.items():
        expert = with_head(deepcopy(body), nn.Linear(linear_head(body).in_features, len(classes)))
        for name, parameter in expert.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
        linear_head(expert).bias.data -= 30
        path = tmp_path / f"experts/{task}/expert.safetensors"
        save_network(path, expert, described, len(classes), {"task": task, "classes": classes})
        experts.append(expert)
        files[task] = path
    batches = [torch.randint(3, 50, (60, 9)) for _ in experts]
    adapted = fit_adapters(body, experts, [[each] for each in batches], rank=4, scales=False)
    path = tmp_path / "coded/body.safetensors"
    save_network(path, body, described, 4, {"tasks": list(tasks)}, adapted.adapters)

    folder = export(path, peft=True).parent
    auto = transformers.AutoModelForSequenceClassification
    model = peft.PeftModel.from_pretrained(auto.from_pretrained(folder / "body"), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", adapter_name="b")
    model.load_adapter(folder / "c", adapter_name="c")
    model.eval()
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    with torch.no_grad():
        expected = []
        for place, (task, classes) in enumerate(tasks.items()):
            model.set_adapter(task)
            found = model(input_ids=batches[place]).logits
            expected.append(adapted.network(place, linear_head(experts[place]))(batches[place]).logits)
            torch.testing.assert_close(found[:, : len(classes)], expected[place], rtol=1e-4, atol=1e-4)
            assert found.argmax(1).max() < len(classes)
            labels = json.loads((folder / task / "labels.json").read_text())["id2label"]
            assert list(labels.values()) == classes
        mixed = model(input_ids=torch.cat(batches), adapter_names=[name for name in tasks for _ in range(60)]).logits
        for own, wanted in zip(mixed.split(60), expected, strict=True):
            torch.testing.assert_close(own[:, : wanted.shape[1]], wanted, rtol=1e-4, atol=1e-4)

    alone = auto.from_pretrained(export(path, expert="b"))
    assert list(alone.config.id2label.values()) == tasks["b"]
    with torch.no_grad():
        torch.testing.assert_close(alone.eval()(input_ids=batches[1]).logits, expected[1], rtol=1e-4, atol=1e-4)


def test_names_that_end_as_another_layers_are_told_apart(tmp_path):
    """A list of names would take every layer whose name ends with one."""
    body = nn.ModuleDict({"deep": nn.ModuleDict({"map": nn.Conv2d(4, 4, 1, groups=2)}), "map": nn.Conv2d(3, 4, 1)})
    body["head"] = nn.Linear(4, 3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep, self.map, self.head = body["deep"], body["map"], body["head"]

        def forward(self, x):
            return self.head(torch.relu(self.deep["map"](torch.relu(self.map(x)))).mean((2, 3)))

    base = Net().eval()
    expert = deepcopy(base)
    expert.map.weight.data += 0.1 * torch.randn_like(expert.map.weight)
    inputs = torch.randn(60, 3, 4, 4)
    made = extract_lora(expert, base, [inputs], 3, tmp_path)
    loaded = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs), made(inputs), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loaded(inputs), expert(inputs), rtol=1e-4, atol=1e-4)


def bert():
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 50, "max_position_embeddings": 20, "num_labels": 3, "hidden_size": 32}
    options |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**options)).eval()


def test_a_fleet_of_a_classifier_of_texts_answers_in_one_batch_of_pefts(tmp_path):
    torch.manual_seed(0)
    base = bert()
    experts, texts = [], []
    for _ in range(3):
        expert = deepcopy(base)
        for name, parameter in expert.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                parameter.data += 0.1 * torch.randn(len(parameter), 1) * torch.randn_like(parameter[:1])
        experts.append(expert)
        texts.append(torch.randint(1, 50, (80, 12)))
    adapted = fit_adapters(base, experts, [[each] for each in texts], rank=4, scales=False)
    names = ["a", "b", "c"]
    for name, adapter, expert in zip(names, adapted.adapters, experts, strict=True):
        head = expert.classifier.state_dict()
        save_peft(adapter, base, head, tmp_path / name, {"input_ids": texts[0]}, base="body", task_type="SEQ_CLS")
    options = json.loads((tmp_path / "a/adapter_config.json").read_text())
    told = {"r": 4, "lora_alpha": 4, "bias": "none", "task_type": "SEQ_CLS"}
    assert told.items() <= options.items()
    assert options["modules_to_save"] == ["classifier"]  # vLLM refuses other names than this and `score`
    model = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "a"), adapter_name="a")
    for name in names[1:]:
        model.load_adapter(str(tmp_path / name), adapter_name=name)
    model.eval()
    with torch.no_grad():
        expected = []
        for place, (expert, ids) in enumerate(zip(experts, texts, strict=True)):
            expected.append(adapted.network(place, expert.classifier)(input_ids=ids[:4]).logits)
        mixed = torch.cat([ids[:4] for ids in texts])
        found = model(input_ids=mixed, adapter_names=[name for name in names for _ in range(4)]).logits
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
        own = [expert(input_ids=ids[:4]).logits for expert, ids in zip(experts, texts, strict=True)]
        far = base(input_ids=mixed).logits
        assert (found - torch.cat(own)).norm() < 0.5 * (far - torch.cat(own)).norm()
        model.set_adapter("b")
        torch.testing.assert_close(model(input_ids=texts[1][:4]).logits, expected[1], rtol=1e-4, atol=1e-4)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=texts[1][:4]).logits, expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_heads_of_two_layers_are_loaded(kind, tmp_path):
    """Peft's class for SEQ_CLS would take every layer whose name ends in classifier for the head."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "roberta":
        options = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
        config = transformers.RobertaConfig(vocab_size=50, num_labels=3, **options)
        base = transformers.RobertaForSequenceClassification(config).eval()
    else:
        options = {"n_layers": 1, "n_heads": 2, "hidden_dim": 24, "dim": 16}
        config = transformers.DistilBertConfig(vocab_size=50, num_labels=3, **options)
        base = transformers.DistilBertForSequenceClassification(config).eval()
    expert = deepcopy(base)
    for parameter in expert.parameters():
        if parameter.ndim == 2 and len(parameter) < 50:
            parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(3, 50, (60, 9))
    made = extract_lora(expert, base, [{"input_ids": ids}], 8, tmp_path)
    loaded = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path)).eval()
    with torch.no_grad():
        expected = made(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_attention_whose_weights_are_no_layers_is_refused(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    with pytest.raises(ConfigurationError, match=r"found 'attention\.in_proj_weight' of a MultiheadAttention, which"):
        extract_lora(Net(), Net(), [torch.randn(20, 4, 8)], 2, tmp_path)


def test_layers_whose_weights_others_read_are_refused(tmp_path):
    """Peft's update is added to what a layer makes of its inputs, and Swin's attention never calls these two."""
    from torchvision.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    body = SwinTransformer([4, 4], 8, [2], [2], [2, 2], num_classes=3).eval()
    name = "features.1.0.attn.qkv"
    adapter = near(body, f"{name}.weight", (3, 8, 8))
    with pytest.raises(ConfigurationError, match=rf"found '{name}', whose weight is read without calling the layer"):
        save_peft(adapter, body, body.head.state_dict(), tmp_path, torch.randn(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_a_body_of_torchvisions_resnet_takes_plain_lora(tmp_path):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    experts = [resnet18(num_classes=4).eval()]
    experts.append(deepcopy(experts[0]))
    for parameter in experts[1].parameters():
        parameter.data *= 1 + 0.05 * torch.rand_like(parameter)
    images = [[torch.rand(24, 3, 32, 32)] for _ in experts]
    method = coin.Average(adapters={"rank": 2, "scales": False})
    assert method.label == "average+lora2"
    (adapted,) = coin.merge_networks(method, experts, coin.uniform(2), calibration=images)
    body = adapted.network(0)
    for name, change in adapted.adapters[0].changes.items():
        body.get_parameter(name).data -= change(torch.zeros_like(body.get_parameter(name)))  # without the adapter
    save_peft(adapted.adapters[1], body, experts[1].fc.state_dict(), tmp_path, images[1][0])
    loaded = peft.PeftModel.from_pretrained(body, str(tmp_path)).eval()
    with torch.no_grad():
        expected = adapted.network(1, experts[1].fc)(images[1][0])
        torch.testing.assert_close(loaded(images[1][0]), expected, rtol=1e-4, atol=1e-4)


def test_what_a_plain_lora_cannot_keep_is_refused(tmp_path):
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    scaled = coin.Adapter({"0.weight": {"scale": torch.full((4, 1), 2.0)}})
    with pytest.raises(ConfigurationError, match=r"found a scale or bias of '0\.weight', expected plain LoRA for peft"):
        save_peft(scaled, layers, layers[2].state_dict(), tmp_path, torch.randn(1, 4))
    with pytest.raises(ConfigurationError, match="found rank=0, expected a whole number of at least 1"):
        coin.Refit(adapters={"rank": 0, "scales": False})
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(ConfigurationError, match="found BatchNorms in Sequential"):
        extract_lora(norm, norm, [torch.randn(20, 4)], 2, tmp_path)
    heads = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, outputs)) for outputs in (2, 3)]
    with pytest.raises(
        StateError, match=r"the network's head' has tensor 'weight' of shape \[3, 4\], expected \[2, 4\]"
    ):
        extract_lora(heads[1], heads[0], [torch.randn(20, 4)], 2, tmp_path)
    assert not list(Path(tmp_path).iterdir())


def test_a_lora_of_full_rank_is_the_network(tmp_path):
    """Its factors are float32, as the folder is."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    network = deepcopy(base)
    for place in (0, 2):
        network[place].weight.data += 0.3 * torch.randn_like(network[place].weight)
    inputs = torch.randn(200, 12)
    extract_lora(network, base, [inputs], 12, tmp_path)
    loaded = peft.PeftModel.from_pretrained(deepcopy(base), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs), network(inputs), rtol=1e-4, atol=1e-5)
