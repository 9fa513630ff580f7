"""The paper's networks: true architectures, files as their publishers serve them, and references written down here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.errors import UserError
from benchmark.networks import sdxl, unclip
from benchmark.networks.files import load_weights
from benchmark.networks.paper import ClipTokens, Vgg16Bn, dino_backbone
from benchmark.networks.seeded import seeded

sys.path.insert(0, str(Path(__file__).parent))
from sgm_names import unet_shapes, vae_shapes

IMAGENET_MEAN, IMAGENET_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


def images(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}


# --- VGG-16-BN --------------------------------------------------------------------------------------------------------


def test_vgg_gives_the_five_maps_of_the_paper() -> None:
    """Equal to hooks on torchvision's network after ReLUs 1_2, 2_2, 3_3, 4_3 and 5_3; shapes of the paper."""
    network = Vgg16Bn.loaded("vgg16-bn", random_seed=3)
    layers = ["5", "12", "22", "32", "42"]
    pixels = images(2, 112)
    found = network.features(pixels, layers)
    assert [tuple(found[k].shape[1:]) for k in layers] == [
        (64, 112, 112), (128, 56, 56), (256, 28, 28), (512, 14, 14), (512, 7, 7),
    ]  # fmt: skip

    from torchvision.models import vgg16_bn

    plain = vgg16_bn(weights=None).eval()
    plain.features.load_state_dict(network.net.get_submodule("features").state_dict())
    seen: dict[str, Tensor] = {}
    for k in layers:
        plain.features[int(k)].register_forward_hook(lambda _m, _i, out, k=k: seen.__setitem__(k, out.clone()))
    with torch.no_grad():
        plain((pixels - IMAGENET_MEAN[:, None, None]) / IMAGENET_STD[:, None, None])
    for k in layers:
        torch.testing.assert_close(found[k], seen[k], atol=1e-5, rtol=1e-4)


def test_vgg_passes_gradients_to_the_image_and_takes_none() -> None:
    network = Vgg16Bn.loaded("vgg16-bn", random_seed=3)
    pixels = images(1, 32).requires_grad_(True)
    network.features(pixels, ["5", "12"])["12"].square().mean().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())


# --- DINOv2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_dino(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """DINOv2's own file at a small width and 2 blocks; timm is told to build that size."""
    width, blocks = 32, 2
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    state = {
        "cls_token": draw(1, 1, width),
        "register_tokens": draw(1, 4, width),
        "mask_token": draw(1, width),
        "pos_embed": draw(1, 1 + 37 * 37, width),  # of 518 pixels, as served
        "patch_embed.proj.weight": draw(width, 3, 14, 14),
        "patch_embed.proj.bias": draw(width),
        "norm.weight": draw(width),
        "norm.bias": draw(width),
    }
    for k in range(blocks):
        for name, shape in {
            "norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width),
        }.items():  # fmt: skip
            state[f"blocks.{k}.{name}.weight"] = draw(*shape)
            state[f"blocks.{k}.{name}.bias"] = draw(shape[0])
        state[f"blocks.{k}.ls1.gamma"], state[f"blocks.{k}.ls2.gamma"] = draw(width), draw(width)
    folder = tmp_path_factory.mktemp("dino")
    torch.save(state, folder / "dinov2_vitl14_reg4.pth")
    import timm

    create = timm.create_model
    patch = pytest.MonkeyPatch()
    patch.setattr(timm, "create_model", lambda name, **k: create(name, **k, embed_dim=width, depth=blocks, num_heads=2))
    yield folder, state
    patch.undo()


def plain_dino(
    state: dict[str, Tensor], pixels: Tensor, adapters: list[tuple[Tensor, Tensor]], rank: int
) -> list[Tensor]:
    """DINOv2's forward pass written down: positions resampled bicubically with antialiasing, registers after CLS."""
    x = (pixels - IMAGENET_MEAN[:, None, None]) / IMAGENET_STD[:, None, None]
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    x = x.flatten(2).transpose(1, 2)
    grid = state["pos_embed"][:, 1:].view(1, 37, 37, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(16, 16), mode="bicubic", antialias=True)
    x = x + grid.permute(0, 2, 3, 1).reshape(1, 256, -1)
    cls = state["cls_token"] + state["pos_embed"][:, :1]
    x = torch.cat([cls.expand(len(x), -1, -1), state["register_tokens"].expand(len(x), -1, -1), x], 1)
    outputs = []
    for k, (down, up) in enumerate(adapters):
        part: dict[str, Tensor] = {n.removeprefix(f"blocks.{k}."): v for n, v in state.items() if f"blocks.{k}." in n}
        h = F.layer_norm(x, x.shape[-1:], part["norm1.weight"], part["norm1.bias"], 1e-6)
        qkv = F.linear(h, part["attn.qkv.weight"], part["attn.qkv.bias"])
        q, key, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        a = (q @ key.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        a = F.linear(a.transpose(1, 2).flatten(2), part["attn.proj.weight"], part["attn.proj.bias"])
        x = x + part["ls1.gamma"] * a
        h = F.layer_norm(x, x.shape[-1:], part["norm2.weight"], part["norm2.bias"], 1e-6)
        h = F.gelu(F.linear(h, part["mlp.fc1.weight"], part["mlp.fc1.bias"]))
        x = x + part["ls2.gamma"] * F.linear(h, part["mlp.fc2.weight"], part["mlp.fc2.bias"])
        x = x + 0.01 / rank * F.linear(F.linear(x, down), up)
        outputs.append(torch.cat([x[:, :1], x[:, 5:]], 1))
    return outputs


def test_dino_reads_its_publishers_file(small_dino: tuple[Path, dict[str, Tensor]]) -> None:
    """CLS and 16 x 16 patches after each tapped block, adapters in between, equal to the pass written down."""
    folder, state = small_dino
    backbone = dino_backbone("dinov2-vitl14-reg4", (1, 2), 7, 16, weights=folder)
    torch.manual_seed(1)
    adapters = []
    for adapter in backbone.adapters:
        matrices = [p for p in adapter.parameters()]
        for p in matrices:
            nn.init.normal_(p, std=3.0)
        down, up = sorted(matrices, key=lambda p: p.shape[0])
        adapters.append((down.detach(), up.detach()))
    pixels = images(2, 224)
    with torch.no_grad():
        found = backbone.eval()(pixels)
    for ours, plain in zip(found, plain_dino(state, pixels, adapters, 7), strict=True):
        assert ours.shape == (2, 257, 32)
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


def test_dino_trains_its_adapters_alone(small_dino: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = small_dino
    backbone = dino_backbone("dinov2-vitl14-reg4", (1, 2), 7, 16, weights=folder)
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("adapters.") for name in trained)


def test_dino_refuses_another_grid() -> None:
    with pytest.raises(ValueError, match="16 patches on a side"):
        dino_backbone("dinov2-vitl14-reg4", (1,), 7, 8, random_seed=0)


# --- CLIP bigG --------------------------------------------------------------------------------------------------------


def small_tower() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        image_size=224, patch_size=56, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=16, output_tokens=True
    )


def test_clip_tokens_come_after_the_last_norm_before_the_projection_without_cls() -> None:
    tower = small_tower().eval()
    pixels = images(2, 224)
    seen: list[Tensor] = []
    tower.ln_post.register_forward_hook(lambda _m, _i, out: seen.append(out))  # type: ignore[union-attr]
    mean, std = torch.tensor((0.48145466, 0.4578275, 0.40821073)), torch.tensor((0.26862954, 0.26130258, 0.27577711))
    for clip_input, fed in (("mindeye2", (pixels + 1) / 2), ("standard", pixels)):
        with torch.no_grad():
            tokens = ClipTokens(tower, clip_input)(pixels)  # type: ignore[arg-type]
            seen.clear()
            tower((fed - mean[:, None, None]) / std[:, None, None])
        assert tokens.shape == (2, 16, 32)
        torch.testing.assert_close(tokens, seen[-1][:, 1:])


def test_bigg_has_its_true_shape() -> None:
    """ViT-bigG/14's image tower: 1.84 billion parameters, 256 tokens of 1664 numbers; on the meta device."""
    import open_clip

    made: list[nn.Module] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmark.networks.paper.seeded", lambda model, *_: made.append(model))
        from benchmark.networks.paper import bigg_tokens

        network = bigg_tokens("openclip-bigg14", random_seed=0)
    assert sum(p.numel() for p in made[0].parameters()) == 1_844_907_264
    with torch.device("meta"):
        whole = open_clip.create_model("ViT-bigG-14", pretrained=None, load_weights=False, device="meta")
    expected = {n: p.shape for n, p in whole.state_dict().items() if n.startswith("visual.")}
    assert {n: p.shape for n, p in made[0].state_dict().items()} == expected
    tokens = network.to("meta")(torch.empty(1, 3, 224, 224, device="meta"))
    assert tokens.shape == (1, 256, 1664)


# --- SDXL-unCLIP ------------------------------------------------------------------------------------------------------


def test_the_checkpoints_1680_names_map_one_to_one() -> None:
    """Names and shapes of unclip6's UNet and autoencoder, written down from sgm's architecture: none missing or left."""
    for shapes, names, build, config, count, parameters in (
        (unet_shapes(), unclip.unet_names, unclip.build_unet, unclip.UNET, 1680, 2_501_272_324),
        (vae_shapes(), unclip.vae_names, unclip.build_vae, unclip.VAE, 248, 83_653_863),
        (unet_shapes(context=2048, vector=2816), unclip.unet_names, unclip.build_unet, sdxl.SDXL_UNET, 1680,
         2_567_463_684),
    ):  # fmt: skip
        assert len(shapes) == count
        state = build(config).state_dict()
        assert sum(t.numel() for t in state.values()) == parameters
        converted = names({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, config)
        assert set(converted) == set(state)
        assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in state.items()}


SMALL_UNET: dict[str, Any] = {
    **unclip.UNET,
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 2],
    "cross_attention_dim": 24,
}
SMALL_VAE: dict[str, Any] = {**unclip.VAE, "block_out_channels": (32, 32, 64, 64)}


def small_checkpoint() -> dict[str, Tensor]:
    unet = unet_shapes(channels=32, multipliers=(1, 2, 2), depths=(0, 1, 2), context=24)
    return drawn({**unet, **vae_shapes(channels=32, multipliers=(1, 1, 2, 2))}) | {
        "conditioner.embedders.0.model.visual.proj": torch.zeros(2, 2),
        "denoiser.sigmas": torch.zeros(1000),
    }


def read_small(path: Path) -> tuple[nn.Module, nn.Module]:
    unet, vae = unclip.build_unet(SMALL_UNET), unclip.build_vae(SMALL_VAE)
    unclip.read_unet(unet, path, "a small unCLIP", SMALL_UNET)
    unclip.read_vae(vae, path, "a small unCLIP", SMALL_VAE)
    return unet, vae


def test_a_small_checkpoint_of_the_same_family_loads_and_samples(tmp_path: Path) -> None:
    """As saved by Lightning (a dict with state_dict) and as safetensors: the same numbers, and images come out."""
    from methods.brain_it.generate import GenerationSettings, Generator, semantic_images
    from methods.brain_it.unclip import size_vector

    state = small_checkpoint()
    torch.save({"state_dict": state, "global_step": 110000}, tmp_path / "a.ckpt")
    save_file(state, tmp_path / "a.safetensors")
    found = [read_small(tmp_path / name) for name in ("a.ckpt", "a.safetensors")]
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    unet, vae = found[0]
    weight = unet.get_parameter("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")
    assert torch.equal(weight, state["model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"])
    made = semantic_images(
        Generator(vae.eval(), unet.eval(), image_size=64, vector=size_vector(256, 256)),  # type: ignore[arg-type]
        torch.randn(1, 4, 24),
        GenerationSettings(steps=2, start_step=1),
        seeds=[0],
    )
    assert made.shape == (1, 3, 64, 64) and bool(made.isfinite().all())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("model.diffusion_model.out.2.bias"), "conv_out.bias' is missing"),
        (lambda s: s.update({"model.diffusion_model.extra.weight": torch.zeros(2)}), "extra.weight' is unexpected"),
        (lambda s: s.update({"model.diffusion_model.out.2.bias": torch.zeros(5)}), "is 5, expected 4"),
        (lambda s: s.pop("first_stage_model.quant_conv.bias"), "quant_conv.bias"),
        (lambda s: s.update({"first_stage_model.encoder.more.weight": torch.zeros(2)}), "more.weight' is unexpected"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path, change: Any, said: str) -> None:
    state = small_checkpoint()
    change(state)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=said) as caught:
        read_small(tmp_path / "a.safetensors")
    assert str(caught.value).count("\n") <= 1


# --- SDXL's text towers -----------------------------------------------------------------------------------------------


def hf_clip_text(width: int, layers: int) -> dict[str, Tensor]:
    """A state dict with the names that transformers' CLIPTextModel has in SDXL's file."""
    prefix = "conditioner.embedders.0.transformer.text_model."
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (49408, width),
        "embeddings.position_embedding.weight": (77, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for k in range(layers):
        for name, shape in {
            "layer_norm1": (width,), "layer_norm2": (width,), "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (width, width), "self_attn.v_proj": (width, width),
            "self_attn.out_proj": (width, width), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width),
        }.items():  # fmt: skip
            shapes[f"encoder.layers.{k}.{name}.weight"] = shape
            shapes[f"encoder.layers.{k}.{name}.bias"] = shape[:1]
    state = {prefix + name: tensor * 4 for name, tensor in drawn(shapes).items()}
    return state | {prefix + "embeddings.position_ids": torch.arange(77)[None]}


def plain_clip_text(state: dict[str, Tensor], tokens: Tensor, layers: int, heads: int) -> Tensor:
    """CLIP's text transformer written down, up to the output of layer ``layers``: causal, quick GELU."""
    s = {n.removeprefix("conditioner.embedders.0.transformer.text_model."): v for n, v in state.items()}
    x = s["embeddings.token_embedding.weight"][tokens] + s["embeddings.position_embedding.weight"]
    mask = torch.full((77, 77), float("-inf")).triu(1)

    def linear(h: Tensor, name: str) -> Tensor:
        return F.linear(h, s[f"{name}.weight"], s[f"{name}.bias"])

    for k in range(layers):
        p = f"encoder.layers.{k}"
        h = F.layer_norm(x, x.shape[-1:], s[f"{p}.layer_norm1.weight"], s[f"{p}.layer_norm1.bias"])
        q, key, v = (linear(h, f"{p}.self_attn.{n}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
        a = ((q @ key.transpose(-1, -2)) / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v
        x = x + linear(a.transpose(1, 2).flatten(2), f"{p}.self_attn.out_proj")
        h = F.layer_norm(x, x.shape[-1:], s[f"{p}.layer_norm2.weight"], s[f"{p}.layer_norm2.bias"])
        h = linear(h, f"{p}.mlp.fc1")
        x = x + linear(h * torch.sigmoid(1.702 * h), f"{p}.mlp.fc2")
    return x


def test_prompts_are_encoded_as_sdxl_does(tmp_path: Path) -> None:
    """Last layer but one of both towers; the first fed with end marks after the text, the second pooled at the end."""
    width, layers, heads = 16, 3, 2
    state = hf_clip_text(width, layers)
    save_file(state, tmp_path / "a.safetensors")
    first = sdxl.text_tower({"width": width, "heads": heads, "layers": layers}, quick=True, projected=False)
    load_weights(first, tmp_path / "a.safetensors", "CLIP", only=(sdxl._CLIP_L_PREFIX,), convert=sdxl.clip_l_names)
    second = sdxl.text_tower({"width": 24, "heads": 2, "layers": 4}, quick=False, projected=True)
    seeded(second, "second", 1)
    for tower in (first, second):
        tower.eval()
    found = sdxl.encode_prompt(first, second, "painting, anime")

    import open_clip

    ids = open_clip.tokenize(["painting, anime"])
    end = int((ids[0] == 49407).nonzero()[0])
    filled = ids.clone()
    filled[0, end:] = 49407
    assert filled[0, -1] == 49407 and ids[0, -1] == 0
    torch.testing.assert_close(
        found.tokens[:, :width], plain_clip_text(state, filled, layers - 1, heads)[0], atol=1e-4, rtol=1e-3
    )
    seen: list[Tensor] = []
    second.transformer.resblocks[2].register_forward_hook(lambda _m, _i, out: seen.append(out))  # type: ignore[union-attr, index]
    with torch.no_grad():
        pooled = second(ids)
    torch.testing.assert_close(found.tokens[:, width:], seen[0][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pooled, pooled[0], atol=1e-5, rtol=1e-4)


def test_text_towers_have_their_true_shapes() -> None:
    first = sdxl.text_tower(sdxl.CLIP_L, quick=True, projected=False)
    second = sdxl.text_tower(sdxl.CLIP_BIGG, quick=False, projected=True)
    assert sum(p.numel() for p in first.parameters()) == 123_060_480
    assert sum(p.numel() for p in second.parameters()) == 694_659_840


def test_an_unknown_tensor_of_a_text_tower_is_refused(tmp_path: Path) -> None:
    state = hf_clip_text(16, 1)
    state["conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc3.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "a.safetensors")
    tower = sdxl.text_tower({"width": 16, "heads": 2, "layers": 1}, quick=True, projected=False)
    with pytest.raises(UserError, match="fc3.weight' is unexpected"):
        load_weights(tower, tmp_path / "a.safetensors", "CLIP", only=(sdxl._CLIP_L_PREFIX,), convert=sdxl.clip_l_names)


# --- seeded weights ---------------------------------------------------------------------------------------------------


def test_seeded_weights_repeat_and_keep_the_scale_of_activations() -> None:
    def tower(seed: int) -> nn.Module:
        with torch.device("meta"):
            net = small_tower()
        seeded(net, "tower", seed)
        return net.eval()

    with torch.no_grad():
        one, same, other = (tower(seed)(images(1, 224))[1] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.allclose(one, other)
    assert 0.2 < float(one.std()) < 5 and np.isfinite(one.numpy()).all()
