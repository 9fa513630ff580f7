"""Protocols are data that hash to what decides a score, and to nothing else."""

import dataclasses

import pytest

from metrics.cards import KEYS
from metrics.protocols import BRAIN_IT, DEMO, PROTOCOLS, Resize, get_protocol, protocol_hash, protocol_record

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
    assert record["slots"]["LPIPS"]["heads"]["sha256"].startswith("df73285e")
    assert "title" not in record and "sentence" not in record["slots"]["CLIP"]


def test_unknown_protocol_suggests_the_nearest() -> None:
    assert get_protocol("demo") is DEMO
    with pytest.raises(
        ValueError, match=r"no protocol 'brainit' \(did you mean 'brain-it'\?\); there are brain-it, demo"
    ):
        get_protocol("brainit")
