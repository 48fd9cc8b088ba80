"""Prints a config as a run would have it: one line for each key, with where its value is from.

    python tools/config.py more_voc train.batch_size=8

NAME is a file of configs/ without its ending, or the path of a YAML.
"""

from engine.launch import run_script
from engine.config import layers_of
from utils.cli import Parser
from utils.config import shown
from utils.files import ROOT


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("name", metavar="NAME", help="of the config")
    parser.add_argument("settings", nargs="*", default=[], metavar="key=value", help="on top of it")
    options = parser.parse_args(argv)
    layers = layers_of(options.name, options.settings)
    lines = (f"{key}: {shown(value)}   # {source}\n" for key, value, source in layers.described(layers.resolve()))
    print("".join(lines).replace(f"{ROOT}/", ""), end="")   # in one piece, for `| head`


if __name__ == "__main__":
    run_script(main)
