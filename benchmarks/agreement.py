"""What the agreement gate costs beside the entropy gate: operations, and seconds, of a training step and of the encoder."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import argument_parser, machine, markdown, timed
from benchmarks.models import SIZES, make_config, make_inputs, make_model
from evacap.training.files import write_json


VARIANTS = ("evacap", "evacap-agreement")
FRAMES = 18


def make_calls(variant: str, size: str, batch: int, device: str) -> dict[str, Callable[[], Any]]:
    """A training step and an encoding of a batch, by name."""
    config = make_config(variant, FRAMES, size)
    model = make_model(config, device=device)
    inputs = make_inputs(config, batch, FRAMES, device)
    with torch.device(device):
        labels = torch.randint(5, config.text_config.vocab_size, (batch, 20))
        swaps = {"shuffled": torch.zeros(batch, dtype=torch.bool), "video_index": torch.arange(batch)}

    def train() -> None:
        model.train()(**inputs, **swaps, labels=labels, use_cache=False).loss.backward()
        model.zero_grad()

    def encode() -> None:
        with torch.no_grad():
            model.eval().get_encoder()(**inputs)

    return {"training step": train, "encoder": encode}


def count_operations(call: Callable[[], Any]) -> int:
    """The operations of the matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("agreement", __doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--no-time", dest="time", action="store_false", help="count the operations alone")
    arguments = parser.parse_args(argv)
    # Nothing is computed on this device.
    counted = {variant: make_calls(variant, arguments.size, arguments.batch, "meta") for variant in VARIANTS}
    timings = {}
    if arguments.time:
        calls = {
            variant: make_calls(variant, arguments.size, arguments.batch, arguments.device) for variant in VARIANTS
        }
        for work in counted["evacap"]:
            timings[work] = timed(
                {variant: calls[variant][work] for variant in VARIANTS},
                arguments.device,
                repeats=arguments.repeats,
                budget=arguments.budget,
            )
    rows = []
    for work in counted["evacap"]:
        plain, own = (count_operations(counted[variant][work]) for variant in VARIANTS)
        row = [work, f"{plain / 1e12:.2f}", f"{own / 1e12:.2f}", f"{own / plain:.4f}"]
        if timings:
            seconds = [timings[work][variant]["median"] for variant in VARIANTS]
            row += [f"{seconds[0]:.3f}", f"{seconds[1]:.3f}", f"{seconds[1] / seconds[0]:.3f}"]
        rows.append(row)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, {"machine": machine(arguments.device), "rows": rows})
    head = ["work", "evacap, TFLOP", "agreement, TFLOP", "ratio"]
    print(markdown(head + ["evacap, s", "agreement, s", "ratio"] * bool(timings), rows))


if __name__ == "__main__":
    main()
