"""What the command line of a training script asks for. Light: an error in it is told before torch is imported."""

import argparse

from ba_lora.config.checks import check_places
from ba_lora.config.layers import load_config
from ba_lora.config.schema import RunConfig
from ba_lora.errors import CommandParser


def read_run(kind: str, description: str | None) -> RunConfig:
    """Return the run that `train_<kind>.py` is to train. Raises UserError for anything wrong in what was typed, in the
    files it names, or where the run could not write."""
    parser = CommandParser(
        prog=f"python train_{kind}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help=f"a base in configs/{kind}, or a run's own config.yaml")
    if kind == "nlu":
        parser.add_argument("--task", help="a GLUE task; the base may name one")
    parser.add_argument("--method", help="a file in configs/methods, or one's variant (default ba_lora)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as trainer.max_steps=20")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it beside LOCAL_RANK
    typed = vars(parser.parse_intermixed_args())
    del typed["local_rank"]
    config = load_config(typed.pop("config"), **typed, kind=kind)
    check_places(config)
    return config
