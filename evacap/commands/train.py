"""`evacap train`: trains a captioner as a YAML file says."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..training.train import add_arguments

    add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..training.run_config import load_run_config
    from ..training.train import train

    return train(load_run_config(arguments.config, arguments.overrides))
