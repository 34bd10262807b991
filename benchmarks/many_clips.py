"""What a clip costs beside model and reading where many are captioned: by the pipeline, by batches, and by Ray Data.

The same clips go through the bundled checkpoint on a CPU, with one thread and one reading process each time: by one call of
the pipeline, as `evacap caption` makes it; by [`evacap.ray.Captioner`] in batches; and by the program of `docs/scale.md`,
with one actor. Of that, the time from the beginning of the first batch to the end of the last counts: an actor starts
once, for any number of clips.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

import evacap
from benchmarks.measure import Results, argument_parser, interleave, markdown, seconds, summary
from evacap.commands.caption import caption
from evacap.ray import Captioner
from evacap.training.files import write_text
from evacap.training.procedural.scenes import make_scene, write_clip


DISTINCT_CLIPS = 8
SETTINGS = ("way", "clips", "batch")
CALL = {"num_beams": 4}


class ClockedCaptioner(Captioner):
    """Adds the times at which each batch begins and ends."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        begin = time.time()
        captions = super().__call__(batch)
        for name, value in (("begin", begin), ("end", time.time())):
            captions = captions.append_column(name, pa.array([value] * len(captions)))
        return captions


def by_ray(paths: list[str], batch: int) -> float:
    """Seconds from the beginning of the first batch to the end of the last."""
    import ray

    files = ray.data.read_binary_files(paths, include_paths=True)
    options = {"num_workers": 1, "call": CALL}
    actors = ray.data.ActorPoolStrategy(size=1)
    captions = files.map_batches(
        ClockedCaptioner,
        fn_constructor_kwargs=options,
        batch_format="pyarrow",
        batch_size=batch,
        num_cpus=1,
        compute=actors,
    ).to_pandas()
    if len(captions) != len(paths) or captions["text"].isna().any():
        raise RuntimeError(f"{len(captions)} rows for {len(paths)} clips, some without a caption")
    return float(captions["end"].max() - captions["begin"].min())


def table(rows: list[dict[str, Any]]) -> str:
    first = rows[0]["seconds"]["median"]
    header = [
        "way",
        "clips",
        "batch",
        "ms a clip (least–greatest, runs)",
        "ratio to the pipeline",
        "beside it, ms a clip",
    ]
    cells = []
    for row in rows:
        least, median, most = (1000 * row["seconds"][name] / row["clips"] for name in ("min", "median", "max"))
        cells.append(
            [
                row["way"],
                row["clips"],
                row["batch"],
                f"{median:.1f} ({least:.1f}–{most:.1f}, {row['seconds']['repeats']})",
                f"{row['seconds']['median'] / first:.2f}",
                f"{median - 1000 * first / row['clips']:.1f}",
            ]
        )
    return markdown(header, cells) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("many_clips", __doc__)
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64, help="clips of a batch (default: %(default)s)")
    arguments = parser.parse_args(argv)
    results = Results(arguments.output, SETTINGS, arguments.device)
    settings = {"clips": arguments.clips, "batch": arguments.batch}
    with tempfile.TemporaryDirectory() as folder:
        made = [Path(folder) / f"{index}.mp4" for index in range(DISTINCT_CLIPS)]
        for index, path in enumerate(made):
            write_clip(make_scene(0, "test", index), path)
        paths = [str(made[index % DISTINCT_CLIPS]) for index in range(arguments.clips)]
        torch.set_num_threads(1)
        captioner = Captioner(evacap.TINY, num_workers=1, call=CALL)
        tables = [
            pa.table({"path": part, "bytes": [Path(path).read_bytes() for path in part]})
            for part in (paths[at : at + arguments.batch] for at in range(0, len(paths), arguments.batch))
        ]

        def by_pipeline() -> None:
            caption(captioner.captioner, paths, lambda file, result: None, num_workers=1, batch_size=8, **CALL)

        def by_batches() -> None:
            for batch in tables:
                captioner(batch)

        runs = {
            "pipeline": lambda: seconds(by_pipeline),
            "Captioner": lambda: seconds(by_batches),
            "Ray Data": lambda: by_ray(paths, arguments.batch),
        }
        missing = {way: run for way, run in runs.items() if not results.find(way=way, **settings)}
        found = interleave(missing, repeats=arguments.repeats, budget=arguments.budget)
    for way, values in found.items():
        results.add({"way": way, **settings, "seconds": summary(values)})
    report = table(results.rows)
    write_text(arguments.output.with_suffix(".md"), report)
    print(report)


if __name__ == "__main__":
    main()
