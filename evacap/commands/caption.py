"""`evacap caption`: captions media files, and tells how far the picture was trusted."""

import argparse
import json
import sys
import time
from statistics import fmean

from ..cli import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("media", nargs="+", help="media files or URLs")
    parser.add_argument("--model", help="model folder or Hub name (default: the bundled tiny checkpoint)")
    parser.add_argument("--device", help="such as cpu or cuda (default: the best there is)")
    parser.add_argument("--num-beams", type=positive_int, default=4, help="beams of the search (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive_int, default=1, help="windows captioned at a time (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with the gate over time")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a model folder instead of this package's"
    )


def run(arguments: argparse.Namespace) -> int:
    from transformers import pipeline

    import evacap

    begin = time.perf_counter()
    model = arguments.model or evacap.TINY
    try:
        captioner = pipeline(
            evacap.TASK,
            model=model,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code or None,
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"{model} cannot be loaded: {error}") from error
    print(f"loaded {captioner.model.name_or_path} in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    gated = captioner.model.config.fusion_type == "gated_cross_attention"
    results = captioner(
        (media for media in arguments.media),
        batch_size=arguments.batch_size,
        num_beams=arguments.num_beams,
        return_gate=gated,
        on_error="skip",
    )
    failures, begin = 0, time.perf_counter()
    for media, result in zip(arguments.media, results, strict=True):
        seconds, begin = time.perf_counter() - begin, time.perf_counter()
        if arguments.json:
            print(json.dumps({"media": media, **result}), flush=True)
        elif "error" not in result:
            print(f"{media}: {result['text']}")
            for chunk in result.get("chunks", []):
                print(f"  {chunk['timestamp'][0]:.2f}–{chunk['timestamp'][1]:.2f} s: {chunk['text']}")
            if gated:
                gate, entropy = fmean(result["gate"]), fmean(result["entropy"])
                print(f"  gate {gate:.2f} (0 ignores the picture, 1 trusts it), attention entropy {entropy:.2f}")
            print(f"  {seconds:.2f} s", flush=True)
        if "error" in result:
            failures += 1
            print(f"evacap caption: {result['error']}", file=sys.stderr)
    return 1 if failures else 0
