"""Options and files that several of the commands on files share."""

import argparse
from typing import Any

ADAPTERS = "a folder of adapters: jlora's own, PEFT's or mlx-lm's; or a LoRA file of a diffusion model"
CHECKPOINT = "a folder of safetensors in the layout of Hugging Face, sharded or not, or one file"
TABLE = "a .toml or .json file with tables [[row]]"
_NAMES = ("gemma", "qwix", "openpi", "maxtext")


def add_mapping(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mapping", metavar="FILE", help=f"{TABLE} of name and path: the adapters' names and the checkpoint's"
    )


def add_experts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--transposed-experts",
        action=argparse.BooleanOptionalAction,
        help="whether the model keeps stacked experts as (experts, in, out), as GPT-OSS does, where neither the model "
        "type nor a shape says it",
    )


def add_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", choices=_NAMES, help="read params that hold another library's LoRA")
    parser.add_argument(
        "--alpha",
        type=float,
        help="that qwix, openpi or MaxText was given; by default of openpi the rank, of MaxText what lies beside it",
    )


def read_mapping_rows(path: str | None) -> Any:
    """The rows of a mapping that a file gives; None without a file."""
    from jlora.interop.peft import read_rows

    return None if path is None else read_rows(path)
