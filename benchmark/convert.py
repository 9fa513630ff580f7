"""``python -m benchmark.convert --official FILE --out FILE.safetensors``: the authors' checkpoints in our names."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmark.cli import Parser, main_guard
from benchmark.errors import UserError


def build_parser() -> Parser:
    """Return the command line's parser; it imports nothing heavy."""
    parser = Parser(
        prog="python -m benchmark.convert",
        description="Convert the checkpoints that the authors of Brain-IT released to safetensors with the names of "
        "this project's modules. The files are pickles; they are read without running anything in them, and refused "
        "where they ask for more than tensors.",
        epilog="The files are in the Hugging Face repository RomanBeliy/Brain-IT: encoder_ch128.pth, "
        "decoder_vgg_ext-1_batch64_save.pth, decoder_clipg_ext-1_save.pth, combined_model.ckpt (checkpoints/) and "
        "v2c_128_mapping_gmm_v2.npy (derived_data/).",
    )
    parser.add_argument("--official", nargs="+", type=Path, required=True, metavar="FILE", help="the authors' files")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.safetensors",
        help="where to; several files become its parts, their names behind the part's role ('semantic.proj.weight')",
    )
    parser.add_argument(
        "--list", action="store_true", help="print every tensor's name, type and shape, and convert nothing"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    if args.list == (args.out is not None):
        raise UserError("say either --out FILE.safetensors (convert) or --list (look only)")
    from benchmark.official_weights import convert, listing  # brings in torch

    if args.list:
        for path in args.official:
            for line in listing(path):
                print(line)
        return 0
    parts = convert(args.official, args.out)
    for part in parts:
        print(part.report())
    print(f"written: {args.out} ({args.out.stat().st_size / 1e6:,.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
