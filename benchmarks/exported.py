"""What exported graphs cost beside the model: seconds of greedy captions, and bytes on disk."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch

from benchmarks.measure import Results, argument_parser, markdown, spread, timed
from benchmarks.models import SIZES, make_config, make_inputs, make_model
from evacap.commands.export import FORMATS, OUTPUTS, write_graphs
from evacap.training.files import write_text


SETTINGS = ("size", "batch", "frames", "new_tokens", "way")
MODEL = "the model"
WAYS = {"onnx": "ONNX Runtime", "torch": "torch.export"}


def graphs(form: str, folder: Path) -> Callable[[str, dict[str, torch.Tensor]], list[torch.Tensor]]:
    """A function that runs the graph of a name."""
    paths = {name: folder / f"{name}{FORMATS[form]}" for name in OUTPUTS}
    if form == "torch":
        programs = {name: torch.export.load(path).module() for name, path in paths.items()}
        return lambda name, inputs: list(programs[name](**inputs))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = {name: onnxruntime.InferenceSession(path, options) for name, path in paths.items()}

    def run(name: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        found = sessions[name].run(None, {key: value.numpy() for key, value in inputs.items()})
        return [torch.from_numpy(value) for value in found]

    return run


@torch.no_grad()
def greedy(run: Callable, inputs: dict[str, torch.Tensor], start: int, tokens: int) -> torch.Tensor:
    """`tokens` words (batch_size, tokens) by the graphs."""
    words = torch.full((len(inputs["input_features"]), 1), start)
    logits, *states = run("prefill", {**inputs, "decoder_input_ids": words})
    said = [logits.argmax(-1, keepdim=True)]
    while len(said) < tokens:
        logits, *states[:2] = run("step", {"decoder_input_ids": said[-1], **dict(zip(OUTPUTS["prefill"][1:], states))})
        said.append(logits.argmax(-1, keepdim=True))
    return torch.cat(said, 1)


def measure(arguments, results: Results) -> None:
    """Measures the model and the graphs in turn, in one process."""
    config = make_config("evacap", arguments.frames, arguments.size)
    model = make_model(config)
    # A word that ends a caption would end it at once in one way and not in the other.
    model.generation_config.eos_token_id = None
    sizes = {MODEL: sum(value.nbytes for value in model.parameters())}
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for form, way in WAYS.items():
            place = Path(folder, form)
            place.mkdir()
            write_graphs(model, form, place)
            sizes[way] = sum(path.stat().st_size for path in place.iterdir())
            runs[way] = graphs(form, place)
        for batch in arguments.batch:
            inputs = make_inputs(config, batch, arguments.frames)
            inputs["pixel_values_videos_mask"] = torch.ones(batch, arguments.frames, dtype=torch.bool)
            tokens, start = arguments.new_tokens, config.decoder_start_token_id

            def generate(inputs=inputs, tokens=tokens) -> torch.Tensor:
                return model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=tokens)

            expected = generate()[:, 1:]
            calls = {MODEL: generate}
            for way, run in runs.items():
                assert torch.equal(greedy(run, inputs, start, tokens), expected), way
                calls[way] = lambda run=run, inputs=inputs: greedy(run, inputs, start, tokens)
            for way, taken in timed(calls, repeats=arguments.repeats, budget=arguments.budget).items():
                row = {"size": arguments.size, "batch": batch, "frames": arguments.frames, "new_tokens": tokens}
                results.add({**row, "way": way, "seconds": taken, "bytes": sizes[way]})


def table(results: Results) -> str:
    """The measurements in Markdown."""
    rows = []
    for row in results.rows:
        ours = results.find(**{name: row[name] for name in SETTINGS if name != "way"}, way=MODEL)
        time = row["seconds"]
        rows.append(
            [
                row["way"],
                row["batch"],
                spread(time),
                f"{ours['seconds']['median'] / time['median']:.2f}",
                f"{row['bytes'] / 1e6:.0f}",
            ]
        )
    return markdown(["", "batch", "seconds (least–greatest, runs)", "times faster", "on disk, MB"], rows) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("exported", __doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--frames", type=int, default=18)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=20)
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu":
        parser.error("the graphs are compared on the CPU: --device cpu")
    results = Results(arguments.output, SETTINGS, "cpu")
    settings = {"size": arguments.size, "frames": arguments.frames, "new_tokens": arguments.new_tokens}
    if any(results.find(**settings, batch=batch, way=MODEL) is None for batch in arguments.batch):
        measure(arguments, results)
    report = table(results)
    write_text(arguments.output.with_suffix(".md"), report)
    print(report)


if __name__ == "__main__":
    main()
