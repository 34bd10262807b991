"""`evacap sample`: writes a procedural clip to try the other commands on."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, help="the MP4 file to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes another clip (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    from evacap.training.procedural.scenes import make_scene, write_clip

    if arguments.output.is_dir() or arguments.output.suffix.lower() != ".mp4":
        raise ValueError(f"{arguments.output}: must be a file to write, with a name that ends in .mp4")
    scene = make_scene(arguments.seed, "test", 4)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_clip(scene, arguments.output)
    print(f"{arguments.output}: {scene.captions[0]}")
