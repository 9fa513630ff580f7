"""The papers' judges at their true sizes with drawn weights: against the libraries' own models, hooked where papers do."""

from __future__ import annotations

import gc
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as zoo
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation
from torchvision.transforms import Normalize

from benchmark import networks, weights
from benchmark.errors import UserError
from benchmark.networks import scoring_backbones
from benchmark.networks.features import FeatureNetwork
from benchmark.networks.scoring import _CLASSES
from metrics.protocols import PROTOCOLS

SIZES = {"alexnet": 256, "inception_v3": 342, "efficientnet_b1": 255, "efficientnet_b1_v1": 224, "swav_resnet50": 224}
RELUS = [f"features.{k}" for k in (1, 4, 7, 9, 11)]
LAYERS = {name: RELUS if name == "alexnet" else ["avgpool"] for name in SIZES}
JUDGES = [name for name, download in weights.DOWNLOADS.items() if download.group == "scoring"]


def build(name: str) -> nn.Module:
    """The library's whole model, as its hub would give it, with lively weights and batch norms."""
    torch.manual_seed(JUDGES.index(name))
    make: dict[str, Callable[..., nn.Module]] = {
        "alexnet": zoo.alexnet,
        "inception_v3": lambda: zoo.inception_v3(weights=None, transform_input=True, init_weights=False),
        "efficientnet_b1": zoo.efficientnet_b1,
        "efficientnet_b1_v1": zoo.efficientnet_b1,
        "swav_resnet50": zoo.resnet50,
    }
    model = make[name]().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                module.weight.mul_(1.2)
            if isinstance(module, SqueezeExcitation):
                module.fc2.bias.fill_(2.0)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.05)  # type: ignore[union-attr]
                module.running_var.uniform_(0.8, 1.2)  # type: ignore[union-attr]
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.05)
    return model


def images_of(size: int, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    smooth = F.interpolate(torch.rand(n, 3, 7, 7, generator=generator), (size, size), mode="bicubic").clamp(0, 1)
    return 0.7 * smooth + 0.3 * torch.rand(n, 3, size, size, generator=generator)


@torch.no_grad()
def hooked(model: nn.Module, layers: list[str], images: Tensor) -> dict[str, Tensor]:
    """What forward hooks see on the library's whole model, fed as the published code feeds it."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(layer).register_forward_hook(lambda _, __, y, layer=layer: seen.update({layer: y.clone()}))
        for layer in layers
    ]
    x = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(images)
    model(x.contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    return seen


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Equal to ``tolerance`` of the layer's largest value, and images differ by far more."""
    scale = float(expected.abs().max())
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert float((found - expected).abs().max()) <= tolerance * scale
    assert float((found[0] - found[1]).abs().max()) > 1e-3 * scale


def saved(name: str, model: nn.Module, folder: Path, change: Callable[[Any], Any] = lambda state: state) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / weights.DOWNLOADS[name].file
    torch.save(change(model.state_dict()), path)
    return path


@pytest.fixture(autouse=True)
def small_memory() -> Iterator[None]:
    yield
    gc.collect()


# --- taps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_features_are_what_hooks_on_the_librarys_model_see(name: str, tmp_path: Path) -> None:
    model = build(name)
    path = saved(name, model, tmp_path)
    network = scoring_backbones([name], weights=tmp_path)[name]
    assert network.name == name and network.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    images = images_of(SIZES[name])
    found = network.features(images, LAYERS[name])
    assert list(found) == LAYERS[name]
    same = hooked(model.to(memory_format=torch.channels_last), LAYERS[name], images)
    exact = hooked(model.double(), LAYERS[name], images.double())
    for layer, values in found.items():
        flat = same[layer].ndim > values.ndim
        close(values, same[layer].flatten(1) if flat else same[layer])
        close(values, exact[layer].flatten(1) if flat else exact[layer], 1e-4)  # float32, random weights


@torch.no_grad()
def test_alexnet_gives_any_choice_of_its_relus() -> None:
    network = scoring_backbones(["alexnet"], random_seed=0)["alexnet"]
    images = images_of(224)
    every = network.features(images, RELUS)
    for layers in (["features.4"], ["features.11", "features.1"], ["features.4", "features.4"]):
        found = network.features(images, layers)
        assert list(found) == list(dict.fromkeys(layers))
        assert all(torch.equal(found[layer], every[layer]) for layer in layers)
    assert all(float(values.min()) == 0 for values in every.values()), "after the ReLU"
    assert [tuple(every[layer].shape[1:]) for layer in RELUS] == [
        (64, 55, 55),
        (192, 27, 27),
        (384, 13, 13),
        (256, 13, 13),
        (256, 13, 13),
    ]


@torch.no_grad()
def test_inception_maps_imagenets_scale_to_its_own(tmp_path: Path) -> None:
    """Both steps of the published code together are 2 x - 1; leaving either out gives other features."""
    model = build("inception_v3")
    saved("inception_v3", model, tmp_path)
    network = scoring_backbones(["inception_v3"], weights=tmp_path)["inception_v3"]
    images = images_of(299)
    found = network.features(images, ["avgpool"])["avgpool"]
    model.transform_input = False
    model.fc = nn.Identity()
    close(found, model(2 * images - 1), 1e-5)
    assert float((found - model(images)).abs().max()) > 1e-3 * float(found.abs().max())


def test_no_other_layer() -> None:
    network = scoring_backbones(["alexnet"], random_seed=0)["alexnet"]
    with pytest.raises(ValueError, match="network 'alexnet' has no layer 'features.5'; it has features.1, features.4"):
        network.features(images_of(224), ["features.5"])


@pytest.mark.parametrize("name", ["alexnet", "swav_resnet50"])
def test_frozen_and_indifferent_to_the_surroundings(name: str) -> None:
    network = scoring_backbones([name], random_seed=1)[name]
    images, layer = images_of(224, 1), LAYERS[name][-1]
    network.train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with torch.inference_mode():
        plain = network.features(images, [layer])[layer]
    before = torch.backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision()  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("medium")  # a CPU may then multiply in bfloat16, a GPU in TF32
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            found = network.features(images, [layer])[layer]
        assert torch.get_float32_matmul_precision() == "medium", "what others chose stays"
    finally:
        torch.set_float32_matmul_precision(before[1])
    assert torch.equal(found, plain) and found.dtype == torch.float32
    x = images.clone().requires_grad_(True)
    network.features(x, [layer])[layer].square().mean().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0, "gradients reach the images"


@pytest.mark.parametrize("name", ["alexnet", "efficientnet_b1"])
@torch.inference_mode()
def test_neither_batch_nor_memory_layout_matter(name: str) -> None:
    network = scoring_backbones([name], random_seed=2)[name]
    images, layers = images_of(224, 3), LAYERS[name]
    together = network.features(images, layers)
    apart = [network.features(image[None], layers) for image in images]
    other = network.features(images.contiguous(memory_format=torch.channels_last), layers)
    for layer in layers:
        scale = float(together[layer].abs().max())
        assert torch.allclose(together[layer], torch.cat([each[layer] for each in apart]), rtol=0, atol=2e-6 * scale)
        assert torch.equal(together[layer], other[layer])


# --- the files that hubs serve ----------------------------------------------------------------------------------------


def test_swavs_checkpoint_has_a_wrapper_and_two_heads(tmp_path: Path) -> None:
    model = build("swav_resnet50")
    heads = {
        "projection_head.0.weight": torch.rand(2048, 2048),
        "projection_head.1.running_mean": torch.rand(2048),
        "projection_head.3.bias": torch.rand(128),
        "prototypes.weight": torch.rand(3000, 128),
    }

    def as_served(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        trunk = {name: value for name, value in state.items() if not name.startswith("fc.")}
        return {f"module.{name}": value for name, value in {**trunk, **heads}.items()}

    saved("swav_resnet50", model, tmp_path / "hub", as_served)
    saved("swav_resnet50", model, tmp_path / "plain")
    hub, plain = (
        scoring_backbones(["swav_resnet50"], weights=tmp_path / kind)["swav_resnet50"] for kind in ("hub", "plain")
    )
    assert all(torch.equal(a, b) for a, b in zip(hub.state_dict().values(), plain.state_dict().values(), strict=True))
    assert hub.digest != plain.digest


@pytest.mark.parametrize("name", SIZES)
def test_a_file_of_another_network_is_refused(name: str, tmp_path: Path) -> None:
    other = "alexnet" if name != "alexnet" else "swav_resnet50"
    path = saved(name, build(other), tmp_path)
    with pytest.raises(UserError) as caught:
        scoring_backbones([name], weights=tmp_path)[name]
    first = next(iter(scoring_backbones([name], random_seed=0)[name].net.state_dict()))  # type: ignore[union-attr, operator]
    title = weights.DOWNLOADS[name].title
    assert str(caught.value).startswith(f"{path}: not the weights of {title}: '{first}' is missing (")


def test_tensors_that_a_head_would_explain_are_not_passed_over(tmp_path: Path) -> None:
    def more(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**state, "layer5.0.weight": torch.ones(1)}

    saved("swav_resnet50", build("swav_resnet50"), tmp_path, more)
    with pytest.raises(UserError, match="'layer5.0.weight' is unexpected$"):
        scoring_backbones(["swav_resnet50"], weights=tmp_path)["swav_resnet50"]


@pytest.mark.parametrize("form", ["half", "safetensors", "pt"])
@torch.inference_mode()
def test_other_forms_of_the_same_weights(form: str, tmp_path: Path) -> None:
    model = build("efficientnet_b1").half().float()  # numbers that half precision has
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if form == "safetensors":
        save_file(state, tmp_path / "efficientnet_b1.safetensors")
    else:
        half = {
            name: value.half() if form == "half" and value.is_floating_point() else value
            for name, value in state.items()
        }
        torch.save(half, tmp_path / ("efficientnet_b1.pth" if form == "half" else "efficientnet_b1.pt"))
    network = scoring_backbones(["efficientnet_b1"], weights=tmp_path)["efficientnet_b1"]
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    for name, value in network.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, state[name.removeprefix("net.")])


# --- CLIP -------------------------------------------------------------------------------------------------------------


def openai_embedding(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """OpenAI's image tower from its weights alone: 24 blocks of width 1024 and 16 heads, written out."""

    def weight(name: str) -> Tensor:
        return state[f"visual.{name}"].float()

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    x = F.conv2d(Normalize(mean, std)(images), weight("conv1.weight"), stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([weight("class_embedding").expand(len(x), 1, -1), x], dim=1) + weight("positional_embedding")

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return scaled * weight(f"{name}.weight") + weight(f"{name}.bias")

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weight(f"{name}weight").T + weight(f"{name}bias")

    x = norm(x, "ln_pre")
    for k in range(24):
        block = f"transformer.resblocks.{k}."
        q, key, v = (
            linear(norm(x, f"{block}ln_1"), f"{block}attn.in_proj_").unflatten(-1, (3, 16, 64)).permute(2, 0, 3, 1, 4)
        )
        attention = (q @ key.transpose(-1, -2) / math.sqrt(64)).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), f"{block}attn.out_proj.")
        hidden = linear(norm(x, f"{block}ln_2"), f"{block}mlp.c_fc.")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}mlp.c_proj.")
    return norm(x[:, 0], "ln_post") @ weight("proj")


class Scripted(nn.Module):
    """A module that holds a state dict under its dotted names, to be saved as TorchScript, as OpenAI's archive is."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(last, value)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@torch.inference_mode()
def test_clip_at_its_true_size_from_openais_kind_of_file(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in _CLASSES["clip_vit_l14"]("", "").net.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        scale, shift = (shape[-1] ** -0.5, 0) if len(shape) > 1 else (0.1, float(".ln_" in name and "weight" in name))
        state[name] = (scale * drawn + shift).half()
    text = {
        "transformer.resblocks.0.ln_1.weight": torch.ones(768).half(),
        "token_embedding.weight": torch.zeros(100, 768).half(),
        "positional_embedding": torch.zeros(77, 768).half(),
        "ln_final.bias": torch.zeros(768).half(),
        "text_projection": torch.zeros(768, 768).half(),
        "logit_scale": torch.tensor(4.6),
        "input_resolution": torch.tensor(224),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    }
    torch.jit.script(Scripted({**state, **text})).save(str(tmp_path / "clip_vit_l14.pt"))
    network = scoring_backbones(["clip_vit_l14"], weights=tmp_path)["clip_vit_l14"]
    images = images_of(224, 2)
    found = network.features(images, ["embedding"])["embedding"]
    expected = openai_embedding(state, images)
    assert found.shape == (2, 768)
    close(found, expected, 1e-5)
    assert (found.norm(dim=1) - 1).abs().min() > 0.1, "not brought to length 1"
    with pytest.raises(ValueError, match="takes 224 x 224 pixels, not 256 x 256"):
        network.features(images_of(256, 1), ["embedding"])
    assert sum(value.numel() for value in network.parameters()) == 303_966_208  # of the image tower alone
    del network
    for change in ({"text.transformer.resblocks.0.ln_1.weight": torch.ones(8)}, {}):  # open_clip's names; no text tower
        torch.save({**state, **change}, tmp_path / "clip_vit_l14.pt")
        again = scoring_backbones(["clip_vit_l14"], weights=tmp_path)["clip_vit_l14"]
        assert torch.equal(again.features(images, ["embedding"])["embedding"], found)
        del again
    torch.save({**state, "visual.extra": torch.ones(2)}, tmp_path / "clip_vit_l14.pt")
    with pytest.raises(UserError, match="'visual.extra' is unexpected"):
        scoring_backbones(["clip_vit_l14"], weights=tmp_path)["clip_vit_l14"]
    torch.save({name.removeprefix("visual."): value for name, value in state.items()}, tmp_path / "clip_vit_l14.pt")
    with pytest.raises(UserError, match="'visual.class_embedding' is missing"):
        scoring_backbones(["clip_vit_l14"], weights=tmp_path)["clip_vit_l14"]


# --- which networks, from where ---------------------------------------------------------------------------------------


def test_nothing_is_loaded_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("alexnet", "swav_resnet50"):
        (tmp_path / weights.DOWNLOADS[name].file).write_bytes(f"not {name}".encode())
    backbones = scoring_backbones(["swav_resnet50", "alexnet"], weights=tmp_path)
    assert list(backbones) == ["swav_resnet50", "alexnet"] and len(backbones) == 2
    assert "alexnet" in backbones and "clip_vit_l14" not in backbones and backbones.loaded == ()
    assert backbones.digest("alexnet") == hashlib.sha256(b"not alexnet").hexdigest()
    with pytest.raises(KeyError):
        backbones["clip_vit_l14"]
    with pytest.raises(KeyError):
        backbones.digest("clip_vit_l14")
    with pytest.raises(UserError, match=r"alexnet\.pth: "):
        backbones["alexnet"]
    assert backbones.loaded == ()


def test_a_network_stays_until_it_is_dropped() -> None:
    backbones = scoring_backbones(["alexnet"], random_seed=4)
    first = backbones["alexnet"]
    assert backbones["alexnet"] is first and backbones.loaded == ("alexnet",)
    assert first.digest == backbones.digest("alexnet") == "random-4"
    backbones.drop("alexnet")
    backbones.drop("alexnet")
    assert backbones.loaded == () and "alexnet" in backbones
    again = backbones["alexnet"]
    assert again is not first
    same = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same), "the seed gives the same weights"


def test_each_seed_and_each_name_has_its_own_weights() -> None:
    def stem(name: str, seed: int) -> Tensor:
        network = scoring_backbones([name], random_seed=seed)[name]
        return next(network.parameters())

    one = stem("efficientnet_b1", 0)
    assert torch.equal(one, stem("efficientnet_b1", 0))
    assert not torch.equal(one, stem("efficientnet_b1", 1)) and not torch.equal(one, stem("efficientnet_b1_v1", 0))


def test_a_protocol_names_its_networks(tmp_path: Path) -> None:
    backbones = scoring_backbones("brain-it", random_seed=0)
    assert list(backbones) == list(PROTOCOLS["brain-it"].networks) and backbones.loaded == ()
    demo = scoring_backbones("demo", kind="demo")
    assert list(demo) == list(PROTOCOLS["demo"].networks)
    assert demo.digest("lite2") == weights.weights_digest("lite2")
    assert isinstance(demo["lite2"], FeatureNetwork) and demo["lite2"].digest == demo.digest("lite2")


def test_every_protocols_networks_and_layers_are_here() -> None:
    with torch.device("meta"):
        layers = {name: scoring_class(name, "").LAYERS for name, scoring_class in _CLASSES.items()}
    assert set(layers) == set(JUDGES)
    papers = [protocol for protocol in PROTOCOLS.values() if protocol.track == "paper"]
    assert papers
    for protocol in papers:
        for slot in protocol.slots.values():
            assert set(slot.layers) <= set(layers[slot.network]), (protocol.name, slot.network)


@pytest.mark.parametrize(
    ("asked", "kind", "message"),
    [
        ("brain-it", "demo", "protocol 'brain-it': 'alexnet' is not a network of --backbones demo, which has lite0"),
        ("demo", "paper", "protocol 'demo': 'lite2' is not a network of --backbones paper, which has alexnet"),
        (["alexnte"], "paper", "the networks asked for: 'alexnte' is not a network of --backbones paper"),
        (["vgg16-bn"], "paper", "'vgg16-bn' is not a network of --backbones paper"),
    ],
)
def test_stand_ins_fill_no_papers_slots(asked: Any, kind: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        scoring_backbones(asked, kind=kind)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 2


def test_installed_networks_are_not_drawn() -> None:
    with pytest.raises(UserError, match="random weights are for the papers' networks"):
        scoring_backbones("demo", kind="demo", random_seed=0)


def test_missing_files_are_named_with_the_command_that_gets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alexnet.pth").write_bytes(b"")
    (tmp_path / "inception_v3.safetensors").write_bytes(b"")
    names = ["alexnet", "inception_v3", "clip_vit_l14", "swav_resnet50", "clip_vit_l14"]
    assert networks.missing_weights(names, tmp_path) == ["clip_vit_l14", "swav_resnet50"]
    expected = (
        f"{tmp_path}: weights missing: clip_vit_l14.pt, swav_resnet50.pth; name their folder with --weights DIR, or type"
        f" (downloads 1046 MB):\npython -m benchmark.networks fetch {tmp_path} --only clip_vit_l14,swav_resnet50"
    )
    with pytest.raises(UserError) as caught:
        scoring_backbones(names, weights=tmp_path)
    assert str(caught.value) == expected
    monkeypatch.setenv("BRAIN_IT_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError) as caught:
        scoring_backbones(names)
    assert str(caught.value) == expected
    monkeypatch.delenv("BRAIN_IT_WEIGHTS")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert weights.weights_folder() == tmp_path / "home" / ".cache" / "brain-it-bench" / "weights"


def test_a_changed_file_has_a_new_digest(tmp_path: Path) -> None:
    path = tmp_path / "alexnet.pth"
    for content in (b"one", b"two", b"three"):
        path.write_bytes(content)
        os.utime(path, ns=(len(content), int.from_bytes(content, "big")))
        assert weights.weights_digest("alexnet", tmp_path) == hashlib.sha256(content).hexdigest()
