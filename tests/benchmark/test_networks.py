"""The frozen networks against the libraries that they come from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50

from benchmark import networks, weights
from benchmark.data.scenes import render_scenes
from benchmark.demo_generator.model import FOLDER, DemoGenerator, TokenSketch, TokenUNet
from benchmark.errors import UserError
from methods.brain_it.unclip import decode, encode

SIZE = 64


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth and sharp content in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 8, 8, generator=generator)
    fine = torch.rand(2, 3, SIZE, SIZE, generator=generator)
    smooth = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    return 0.7 * smooth + 0.3 * fine


@pytest.fixture(scope="module")
def lite0() -> networks.FeatureNetwork:
    return networks.feature_network("lite0")


def reference(name: str) -> nn.Module:
    """Build timm's network with the same weights, its batch norms in their places."""
    net = timm.create_model(f"tf_efficientnet_{name}")
    source = torch.load(weights.weights_file(name), weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), source.values(), strict=True)))
    return net.eval()


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding of float32, on the scale of the values."""
    return float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


# --- EfficientNet-Lite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lite0", "lite2"])
@torch.no_grad()
def test_folded_efficientnet_equals_timms(name: str, images: Tensor) -> None:
    net = reference(name)
    network = networks.feature_network(name)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    x = net.bn1(net.conv_stem((images * 255 - 127) / 128))
    expected = {}
    for k, block in enumerate(net.blocks):
        expected[f"block{k}"] = x = block(x)
    expected["pooled"] = net.global_pool(net.bn2(net.conv_head(x)))
    found = network.features(images, list(expected))
    assert list(found) == [f"block{k}" for k in range(7)] + ["pooled"]
    for layer, values in expected.items():
        assert found[layer].shape == values.shape and close(found[layer], values), layer
    assert found["pooled"].shape == (2, 1280)


@torch.no_grad()
def test_any_choice_of_layers_gives_the_same_maps(lite0: networks.FeatureNetwork, images: Tensor) -> None:
    every = lite0.features(images, [f"block{k}" for k in range(7)])
    for layers in (["block0"], ["block6"], ["block3", "block1"], ["pooled", "block2"]):
        found = lite0.features(images, layers)
        assert list(found) == layers, "in the order asked for"
        assert all(torch.equal(found[layer], every[layer]) for layer in layers if layer != "pooled")


@torch.no_grad()
def test_the_weights_know_what_they_see(images: Tensor) -> None:
    """The input is scaled as in training: another scale moves the batch norms' statistics off 0 and 1."""
    net = reference("lite0")
    right = net.conv_stem((images * 255 - 127) / 128)
    wrong = net.conv_stem(images)
    off = [
        float(((y.mean((0, 2, 3)) - net.bn1.running_mean) / net.bn1.running_var.sqrt()).abs().median())
        for y in (right, wrong)
    ]
    assert off[0] < off[1]


# --- ResNet-50 --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_resnet_equals_torchvisions(images: Tensor) -> None:
    source = torch.load(weights.weights_file("augnet"), weights_only=True, map_location="cpu")
    net = resnet50(weights=None).eval()
    own = {key.removeprefix("module.pre."): v for key, v in source.items() if key.startswith("module.pre.")}
    missing, unexpected = net.load_state_dict({k: v for k, v in own.items() if not k.startswith("fc.")}, strict=False)
    assert not unexpected and all(key.startswith("fc.") for key in missing)
    x = (images - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    expected = {}
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        expected[layer] = x = getattr(net, layer)(x)
    expected["avgpool"] = net.avgpool(x).flatten(1)
    network = networks.feature_network("augnet")
    found = network.features(images, list(expected))
    assert list(found) == list(expected)
    for layer, values in expected.items():
        assert found[layer].shape == values.shape and close(found[layer], values), layer
    assert torch.equal(network.features(images, ["layer1"])["layer1"], found["layer1"])
    both = network.features(images, ["avgpool", "layer3"])
    assert list(both) == ["avgpool", "layer3"] and torch.equal(both["layer3"], found["layer3"])


# --- frozen -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layer"), [("lite0", "block4"), ("augnet", "layer2")])
def test_gradients_reach_the_images_and_nothing_else(name: str, layer: str, images: Tensor) -> None:
    network = networks.feature_network(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()
    assert not any(module.training for module in network.modules()), "it stays in evaluation mode"
    x = images[:1].clone().requires_grad_(True)
    network.features(x, [layer])[layer].square().mean().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and float(x.grad.abs().sum()) > 0
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_names_that_are_not_here_are_refused() -> None:
    for build in (
        lambda: networks.feature_network("vgg11"),
        lambda: networks.encoder_backbone("dinov2", [1], 0, 8),
        lambda: networks.semantic_network("openclip"),
        lambda: networks.generator("sdxl"),
    ):
        with pytest.raises(UserError, match="which this release cannot load; it has "):
            build()


# --- weights files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_memory() -> None:
    """Forget digests of files that a test changes, before and after."""
    weights._sha256.cache_clear()


@pytest.mark.parametrize("name", list(weights.WEIGHTS))
def test_installed_weights_are_the_ones_that_were_tested(name: str) -> None:
    assert weights.weights_file(name).is_file()
    assert weights.weights_digest(name) == weights.WEIGHTS[name][2]


def test_a_damaged_weights_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "w.pth").write_bytes(b"half a file")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(weights, "WEIGHTS", {"lite0": ("some_weights", "w.pth", "f" * 64)})
    with pytest.raises(UserError) as caught:
        networks.feature_network("lite0")
    message = str(caught.value)
    assert message.startswith(str(package / "w.pth")) and "reinstall the package some_weights" in message
    monkeypatch.setattr(weights, "WEIGHTS", {"lite0": ("some_weights", "missing.pth", "f" * 64)})
    with pytest.raises(UserError, match=r"missing\.pth: missing or damaged"):
        weights.weights_file("lite0")
    monkeypatch.setattr(weights, "WEIGHTS", {"lite0": ("no_such_package_here", "w.pth", "f" * 64)})
    with pytest.raises(UserError, match="not installed.*make install"):
        weights.weights_file("lite0")


def test_every_byte_of_the_generator_is_in_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_memory: None
) -> None:
    monkeypatch.setattr(weights, "GENERATOR", tmp_path)
    for name in weights.GENERATOR_FILES:
        (tmp_path / name).write_bytes(name.encode())
    seen = {weights.generator_digest()}
    for name in weights.GENERATOR_FILES:
        weights._sha256.cache_clear()
        (tmp_path / name).write_bytes(b"x" + name.encode())
        seen.add(weights.generator_digest())
    assert len(seen) == 1 + len(weights.GENERATOR_FILES)
    (tmp_path / "unet.safetensors").unlink()
    weights._sha256.cache_clear()
    with pytest.raises(UserError, match=r"unet\.safetensors: missing"):
        weights.generator_digest()


def test_digests_by_role() -> None:
    found = weights.network_digests({"encoder": "lite0", "generator": "demo"})
    assert found == {"encoder": weights.weights_digest("lite0"), "generator": weights.generator_digest()}


# --- encoder backbone and semantic tokens -----------------------------------------------------------------------------


@torch.no_grad()
def test_backbone_taps_are_the_networks_blocks(lite0: networks.FeatureNetwork, images: Tensor) -> None:
    taps, grid = (1, 3, 5, 7), 4
    backbone = networks.encoder_backbone("lite0", taps, adapter_rank=0, grid=grid)
    assert backbone.is_static
    maps = lite0.features(images, [f"block{tap - 1}" for tap in taps])
    found = backbone(images)
    assert len(found) == len(taps)
    for tokens, (layer, values), channels in zip(found, maps.items(), backbone.tap_channels, strict=True):
        pooled = F.adaptive_avg_pool2d(values, grid).flatten(2).transpose(1, 2)
        assert tokens.shape == (2, grid * grid, channels) and close(tokens, pooled), layer


def test_a_tap_beyond_the_last_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.\.7"):
        networks.encoder_backbone("lite0", [8], adapter_rank=0, grid=8)


@torch.no_grad()
def test_spatial_tokens_are_places_on_the_scale_asked_for(lite0: networks.FeatureNetwork, images: Tensor) -> None:
    raw = networks.SpatialTokens(lite0)(images)
    large = F.interpolate(images, size=(128, 128), mode="bilinear", align_corners=False)
    last = lite0.features(large, ["block6"])["block6"]
    assert raw.shape == (2, 16, 320)
    for row in range(4):
        for column in range(4):
            assert torch.equal(raw[:, 4 * row + column], last[:, :, row, column])
    mean, std = raw.mean((0, 1)), raw.std((0, 1)) + 0.1
    tokens = networks.SpatialTokens(lite0, mean, std)(images)
    assert torch.allclose(tokens, (raw - mean) / std)
    assert torch.allclose(tokens.mean((0, 1)), torch.zeros(320), atol=1e-4)


@torch.no_grad()
def test_semantic_tokens_are_on_the_generators_scale(lite0: networks.FeatureNetwork, images: Tensor) -> None:
    parts = DemoGenerator.load()
    tokens = networks.semantic_network("lite0")(images)
    expected = (networks.SpatialTokens(lite0)(images) - parts.token_mean) / parts.token_std
    assert torch.allclose(tokens, expected) and bool(tokens.isfinite().all())


# --- generator --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_generator_has_the_shapes_that_the_stages_count_on(images: Tensor) -> None:
    generator = networks.generator("demo")
    assert generator.image_size == SIZE and generator.latent_shape == (4, 16, 16) and generator.vector is None
    latents = encode(generator.vae, images)
    assert latents.shape == (2, 4, 16, 16) and decode(generator.vae, latents).shape == images.shape
    unet = generator.unet
    assert isinstance(unet, nn.Module)
    assert not any(module.training or p.requires_grad for module in unet.modules() for p in module.parameters())
    noise = unet(latents, torch.tensor([10, 900]), torch.zeros(2, 16, 320), return_dict=False)[0]
    assert noise.shape == latents.shape and bool(noise.isfinite().all())
    other = networks.generator("demo").unet
    assert other is not unet, "joint training changes the weights: each caller has its own"


@torch.no_grad()
def test_the_denoiser_predicts_noise_by_way_of_v(images: Tensor) -> None:
    """The noise is that of v and sample: undoing it gives the latent that v and sample mean."""
    generator = networks.generator("demo")
    unet = generator.unet
    assert isinstance(unet, TokenUNet)
    schedule = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    torch.testing.assert_close(unet.alphas, schedule.alphas_cumprod, atol=1e-6, rtol=1e-4)
    tokens, level = torch.randn(2, 16, 320), torch.tensor([3, 990])
    sample = torch.randn(2, 4, 16, 16)
    v, sketched = unet.velocity(sample, level, tokens)
    noise = unet(sample, level, tokens).sample
    assert torch.equal(noise, unet(sample, level, tokens, return_dict=False)[0])
    a = schedule.alphas_cumprod[level].view(-1, 1, 1, 1)
    latent = (sample - (1 - a).sqrt() * noise) / a.sqrt()
    torch.testing.assert_close(latent, a.sqrt() * sample - (1 - a).sqrt() * v, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(a.sqrt() * noise - (1 - a).sqrt() * latent, v, atol=1e-3, rtol=1e-3)
    assert sketched.shape == sample.shape


@torch.no_grad()
def test_each_token_paints_its_own_part(images: Tensor) -> None:
    sketch = TokenSketch().eval()
    tokens = torch.randn(1, 16, 320)
    context, painted, latent = sketch(tokens)
    assert context.shape == (1, 16, 192) and painted.shape == (1, 16, 16, 16) and latent.shape == (1, 4, 16, 16)
    token, row, column = 6, 1, 2  # second row, third column of the 4 x 4 grid
    patch = sketch.paint(context[0, token]).view(16, 4, 4)
    torch.testing.assert_close(painted[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4], patch)


def test_true_tokens_sketch_the_picture_better_than_none() -> None:
    """The shipped weights have learned: fresh scenes, against the same sketch of another scene."""
    pictures, _ = render_scenes(8, 99)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    generator = networks.generator("demo")
    assert isinstance(generator.unet, TokenUNet)
    with torch.no_grad():
        latents = encode(generator.vae, images)
        sketched = generator.unet.sketch(networks.semantic_network("lite0")(images))[2]
    own = (sketched - latents).square().mean()
    other = (sketched.roll(1, 0) - latents).square().mean()
    assert float(own) < 0.4 * float(other)


def test_the_generator_survives_saving(tmp_path: Path) -> None:
    parts = DemoGenerator.load()
    parts.save(tmp_path)
    again = DemoGenerator.load(tmp_path)
    for name in ("vae", "unet"):
        a, b = getattr(parts, name).state_dict(), getattr(again, name).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[key].half(), b[key].half()) for key in a), (
            "written in float16"
        )
    assert again.scaling_factor == parts.scaling_factor == again.vae.config.scaling_factor
    assert torch.equal(again.token_mean, parts.token_mean) and torch.equal(again.token_std, parts.token_std)


@pytest.mark.parametrize("damage", ["truncated", "missing", "other shape", "no scale", "no mean"])
def test_a_damaged_generator_is_one_line(tmp_path: Path, damage: str) -> None:
    for name in weights.GENERATOR_FILES:
        shutil.copy(FOLDER / name, tmp_path / name)
    unet, tokens = tmp_path / "unet.safetensors", tmp_path / "tokens.safetensors"
    if damage == "truncated":
        unet.write_bytes(unet.read_bytes()[:1000])
    elif damage == "missing":
        unet.unlink()
    elif damage == "other shape":
        state = load_file(unet)
        state["sketch.positions"] = torch.zeros(3, 3)
        save_file(state, unet)
    elif damage == "no scale":
        (tmp_path / "config.json").write_text("{}")
    else:
        save_file({"std": load_file(tokens)["std"]}, tokens)
    with pytest.raises(UserError) as caught:
        DemoGenerator.load(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: the demo generator's files are missing or damaged") and "\n" not in message
