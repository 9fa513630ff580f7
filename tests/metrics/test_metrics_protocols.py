"""Protocols are data that hash to what decides a score, and to nothing else."""

import dataclasses
import hashlib
import json

import pytest

from metrics.__main__ import main
from metrics.cards import KEYS
from metrics.protocols import (
    BRAIN_IT,
    DEMO,
    PROTOCOLS,
    Identification,
    Protocol,
    Resize,
    Retrieval,
    get_protocol,
    protocol_hash,
    protocol_record,
)

PUBLISHED = [protocol for protocol in PROTOCOLS.values() if protocol.track == "paper"]

DIGESTS = {"lite2": "a" * 64, "augnet": "b" * 64}


def demo_hash(**changes: object) -> str:
    given = {"protocol": DEMO, "digests": DIGESTS, "image_ids": [3, 1, 2], "subjects": [1, 2], "repeats": "mean of 3"}
    return protocol_hash(**(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda p: p.name)
def test_every_key_is_filled_and_described(protocol) -> None:  # type: ignore[no-untyped-def]
    for key in KEYS:
        assert protocol.describe(key)
    assert set(protocol.slots) == set(KEYS) - {"PixCorr", "SSIM", "SSIM-color"}
    assert {slot.network for slot in protocol.slots.values()} == set(protocol.networks)


def test_the_demo_names_its_stand_ins_and_never_the_published_networks() -> None:
    for slot in DEMO.slots.values():
        assert "stand-in" in slot.sentence
        assert not any(name in slot.sentence for name in ("AlexNet", "CLIP", "Inception", "SwAV", "ViT"))
    assert DEMO.describe("LPIPS").startswith("not LPIPS")
    assert DEMO.describe("SSIM") == "grey, at 64 px"


def test_brain_it_has_the_published_sizes() -> None:
    sizes = {key: slot.resize.size for key, slot in BRAIN_IT.slots.items() if slot.resize}
    assert sizes == {
        "Alex(2)": 256,
        "Alex(5)": 256,
        "Incep": 342,
        "CLIP": 224,
        "Eff": 255,
        "SwAV": 224,
        "CLIP-1000": 224,
        "LPIPS": 425,
    }
    assert BRAIN_IT.common == Resize(224, "bilinear", antialias=False)
    assert BRAIN_IT.pixcorr == BRAIN_IT.ssim.resize == Resize(425, "bilinear", antialias=False)
    assert BRAIN_IT.identification.ties == "strict"
    assert (BRAIN_IT.retrieval.pool, BRAIN_IT.retrieval.n) == ("distractors", 1000)


@pytest.mark.parametrize(
    ("name", "truth", "common", "blend", "pixels", "flavour", "sizes", "eff", "n"),
    [
        # Alex, Incep, CLIP, Eff, SwAV
        ("brain-it", None, 224, None, 425, "2d", (256, 342, 224, 255, 224), "V2", 1000),
        ("mindeye2", 224, 256, 0.75, 425, "2d", (256, 342, 224, 255, 224), "V2", 1000),
        ("mindeye2-unblended", 224, 256, None, 425, "2d", (256, 342, 224, 255, 224), "V2", 1000),
        ("mindeye1", 256, 256, None, 425, "2d", (256, 342, 224, 255, 224), "V2", 982),
        ("brain-diffuser", 425, None, None, 425, "2d", (224, 224, 224, 224, 224), "V1", 982),
        ("brain-diffuser-skimage017", 425, None, None, 425, "columns", (224, 224, 224, 224, 224), "V1", 982),
        ("neuropictor", 512, 256, None, 425, "2d", (256, 342, 224, 255, 224), "V2", 982),
        ("mindbridge", 256, None, None, 425, "2d", (256, 342, 224, 255, 224), "V2", 982),
    ],
)
def test_published_protocols_have_the_published_values(
    name: str,
    truth: int | None,
    common: int | None,
    blend: float | None,
    pixels: int,
    flavour: str,
    sizes: tuple[int, ...],
    eff: str,
    n: int,
) -> None:
    protocol = get_protocol(name)
    slots = protocol.slots

    def size(resize: Resize | None) -> int | None:
        return resize.size if resize else None

    assert (size(protocol.truth), protocol.recon, size(protocol.common)) == (truth, None, common)
    assert (protocol.blend, protocol.n_images, protocol.ids) == (blend, n, f"shared-{n}")
    assert size(protocol.pixcorr) == size(protocol.ssim.resize) == pixels and protocol.ssim.flavour == flavour
    assert tuple(size(slots[key].resize) for key in ("Alex(2)", "Incep", "CLIP", "Eff", "SwAV")) == sizes
    assert slots["Alex(5)"].resize == slots["Alex(2)"].resize and slots["CLIP-1000"].resize == slots["CLIP"].resize
    assert protocol.networks[slots["Eff"].network].weights == f"torchvision IMAGENET1K_{eff}"
    assert protocol.identification == Identification(ties="strict", direction="recon-to-truth")
    assert protocol.constant == "nan"
    assert protocol.extra == (() if name == "brain-it" else ("CLIP-1000", "LPIPS", "SSIM-color"))
    assert protocol.retrieval.pool == ("distractors" if name == "brain-it" else "test-set")


@pytest.mark.parametrize("protocol", PUBLISHED, ids=lambda p: p.name)
def test_published_protocols_read_the_published_layers_clip_last(protocol: Protocol) -> None:
    layers = {key: slot.layers for key, slot in protocol.slots.items()}
    assert layers.pop("LPIPS") == tuple(f"features.{k}" for k in (1, 4, 7, 9, 11))
    expected = {"Alex(2)": "features.4", "Alex(5)": "features.11", "CLIP": "embedding", "CLIP-1000": "embedding"}
    assert {key: layer for key, (layer,) in layers.items()} == dict.fromkeys(layers, "avgpool") | expected
    assert list(protocol.networks)[-1] == "clip_vit_l14"
    assert protocol.slots["LPIPS"].heads is not None
    # Every step says for itself whether it antialiases; PIL always does, tensors of that time never did.
    steps = [
        protocol.common,
        protocol.pixcorr,
        protocol.ssim.resize,
        *(slot.resize for slot in protocol.slots.values()),
    ]
    for step in steps:
        if step is not None:
            assert step.antialias == (step.engine == "pil") == protocol.name.startswith("brain-diffuser")
            bicubic = step.size == 425 if step.engine == "pil" else step == Resize(224, "bicubic", antialias=False)
            assert (step.filter == "bicubic") == bicubic
    assert (protocol.slots["CLIP"].resize == Resize(224, "bicubic", antialias=False)) == (
        protocol.name == "neuropictor"
    )


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="PIL always antialiases"):
        Resize(224, "bilinear", antialias=False, engine="pil")
    for pool, n in (("distractors", None), ("test-set", 1000)):
        with pytest.raises(ValueError, match="needs n, the number of candidates"):
            Retrieval(pool=pool, n=n, sentence="")  # type: ignore[arg-type]


def test_every_protocol_has_its_own_hash_and_the_demos_is_that_of_older_releases() -> None:
    digests = {name: "a" for name in ("alexnet", "swav_resnet50", "inception_v3", "clip_vit_l14")}
    hashes = {protocol_hash(protocol, digests, range(982)) for protocol in PUBLISHED}
    assert len(hashes) == len(PUBLISHED) == 8
    record = json.dumps(protocol_record(DEMO), sort_keys=True)
    assert hashlib.sha256(record.encode()).hexdigest() == (
        "39ae07211681b9a52e7275743226cdaa86fe132419152fbdff3b4c25deb29cad"
    )


def test_hash_ignores_order_and_wording() -> None:
    reworded = dataclasses.replace(DEMO, title="another title")
    assert demo_hash() == demo_hash(image_ids=[1, 2, 3], subjects=[2, 1], protocol=reworded)
    assert len(demo_hash()) == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"image_ids": [1, 2, 4]},
        {"subjects": [1]},
        {"repeats": "single trials"},
        {"digests": DIGESTS | {"lite2": "c" * 64}},
        {"distractors": "d" * 64},
        {"protocol": dataclasses.replace(DEMO, common=Resize(64, "bilinear", antialias=False))},
        {"protocol": dataclasses.replace(DEMO, constant="nan")},
        {"protocol": dataclasses.replace(DEMO, identification=dataclasses.replace(DEMO.identification, ties="strict"))},
    ],
    ids=["ids", "subjects", "repeats", "weights", "pool", "antialias", "constant", "ties"],
)
def test_hash_changes_with_whatever_changes_a_score(changes: dict[str, object]) -> None:
    assert demo_hash(**changes) != demo_hash()


def test_hash_refuses_a_network_that_the_protocol_does_not_have() -> None:
    with pytest.raises(ValueError, match="protocol 'demo' has no network 'alexnet'"):
        demo_hash(digests={"alexnet": "a"})


def test_record_is_plain_data_with_every_antialias_flag() -> None:
    record = protocol_record(BRAIN_IT)
    assert record["ssim"]["resize"] == {"size": 425, "filter": "bilinear", "antialias": False}
    pil = protocol_record(get_protocol("brain-diffuser"))["slots"]["CLIP"]["resize"]
    assert pil == {"size": 224, "filter": "bilinear", "antialias": True, "engine": "pil"}
    assert record["slots"]["LPIPS"]["heads"]["sha256"].startswith("df73285e")
    assert "title" not in record and "sentence" not in record["slots"]["CLIP"]


def test_unknown_protocol_suggests_the_nearest() -> None:
    assert get_protocol("demo") is DEMO
    with pytest.raises(
        ValueError, match=r"no protocol 'brainit' \(did you mean 'brain-it'\?\); there are brain-it, mindeye2, "
    ):
        get_protocol("brainit")


@pytest.mark.parametrize("width", [80, 100, 200])
def test_protocols_are_printed_side_by_side_within_the_width(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["protocols"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= width
    assert all(protocol.name in printed for protocol in PUBLISHED)
    # At 200 columns it is one table, else as many as it takes; each begins with the first protocol.
    tables = sum(line.startswith("┏") for line in lines)
    assert tables == {80: 4, 100: 3, 200: 1}[width]
    clip = [[cell.strip() for cell in line.split("│")[2:-1]] for line in lines if line.startswith("│ CLIP, ")]
    assert len(clip) == tables and all(row[0] == "224 bilinear" for row in clip)
    cells = [cell for row in clip for cell in row[1:]]
    assert cells == ["=", "=", "=", "224 bilinear PIL", "224 bilinear PIL", "224 bicubic", "="]
    assert "ties             lose" in printed  # the same in all, so told once


def test_one_protocol_is_printed_whole_and_two_with_their_sources(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["protocols", "brain-diffuser-skimage017"]) == 0
    printed = capsys.readouterr().out
    assert "column by column" in printed and "ozcelikfu/brain-diffuser at 31d52c0" in printed
    assert "EfficientNet-B1 (V1 weights): torchvision IMAGENET1K_V1" in printed
    assert main(["protocols", "mindeye2", "mindeye1", "mindeye2"]) == 0
    printed = capsys.readouterr().out
    assert "0.75 : 0.25 low-level" in printed and "its paper says 4:1, its code 3:1" in printed
    assert "fMRI-reconstruction-NSD at 6b30ea5" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["protocols", "mindeye3"], "no protocol 'mindeye3' (did you mean 'mindeye2'?)"),
        (["list", "demo"], "did you mean: python -m metrics protocols demo"),
        (["cards"], "knows nothing called 'cards'; there are 'list' and 'protocols'"),
    ],
)
def test_a_wrong_call_is_answered_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, error = capsys.readouterr()
    assert out == "" and message in error and error.count("\n") == 1
