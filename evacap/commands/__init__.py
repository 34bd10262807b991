"""The commands of `evacap`: each module has `add_arguments(parser)` and `run(arguments)`."""
