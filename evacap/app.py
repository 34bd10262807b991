"""The page of `evacap demo`, which also runs as a Space: captions of a clip, and of two clips with swapped sounds."""

import html
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from .commands.check import verdict
from .processing.captioning_evacap import has_agreement, has_confidence, has_gate, has_transport
from .processing.media_evacap import load_media
from .processing.pipeline_evacap import AudioVisualCaptioningPipeline, collate_windows, read_windows
from .processing.processing_evacap import EVACapProcessor
from .training.data.worker_pool import Lost, WorkerPool
from .training.procedural.scenes import SAMPLING_RATE, make_scene, write_clip, write_mp4
from .training.terminal import explain


if TYPE_CHECKING:
    import gradio

FPS = 10
"""Frames per second of a clip with the sound of another."""
HEIGHT = 360
"""Greatest height of its picture in pixels."""
# A car, which sounds like a boat, and a pan, which sounds like rain: only the picture tells which.
SAMPLES = (10, 6)
FIRST_SAMPLE = 100

STYLE = """
.evacap-caption { font-size: 1.4em; margin: 0.2em 0; }
.evacap-chunks { list-style: none; padding: 0; margin: 0.5em 0; }
.evacap-chunks li { margin: 0.3em 0; }
.evacap-bar { display: block; height: 0.4em; border-radius: 0.2em; background: #0072B2; min-width: 2px; }
.evacap-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(16em, 1fr)); gap: 0.8em; }
.evacap-card { border: 1px solid #8886; border-radius: 0.5em; padding: 0.6em 0.9em; }
.evacap-card h4 { margin: 0; font-weight: 600; }
.evacap-meter { display: flex; flex-wrap: wrap; gap: 0 0.8em; }
.evacap-meter meter { flex: 1 1 8em; min-width: 0; }
.evacap-word { border-radius: 0.2em; padding: 0 0.15em; }
"""


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for at a time.

    Args:
        megabytes (`int`): Size of an uploaded file.
        clip_seconds (`float`): Length of a clip.
        seconds (`float`): Time for reading a clip, and again for captioning it.
    """

    megabytes: int = 100
    clip_seconds: float = 120.0
    seconds: float = 120.0


class Deadline(StoppingCriteria):
    """Ends a generation with a `TimeoutError` when its time is over.

    Args:
        seconds (`float`): Time from now on.
    """

    def __init__(self, seconds: float):
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        self.check()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise TimeoutError(f"captioning takes more than {self.seconds:g} s. Give a shorter clip.")


class PageCaptioner:
    """Captions files of strangers: they are read by another process, and everything has a limit.

    Args:
        captioner ([`AudioVisualCaptioningPipeline`]): The pipeline.
        limits ([`Limits`]): What one call may take.
    """

    def __init__(self, captioner: AudioVisualCaptioningPipeline, limits: Limits):
        self.captioner, self.limits = captioner, limits
        read = partial(_read, processor=captioner.processor, most=limits.clip_seconds)
        # An item that takes too long is tried twice.
        self.pool = WorkerPool(read, num_workers=1, seconds=limits.seconds / 2, preload=__name__)
        self.lock = threading.Lock()

    def read(self, task: Mapping[str, Any]) -> Any:
        """Lets the other process do a task of [`_read`].

        Raises:
            ValueError: If it fails; the message names the files without their folders.
        """
        with self.lock:
            ((_, result),) = self.pool.map([task])
        if isinstance(result, Lost):
            result = result.reason
        if isinstance(result, str):
            for path in map(str, task.values()):
                result = result.replace(path, Path(path).name)
            raise ValueError(result)
        return result

    def windows(self, inputs: Mapping[str, str]) -> list[dict[str, Any]]:
        """The windows of one input of the pipeline."""
        windows = self.read({"task": "windows", **inputs})
        for window in windows:
            window["inputs"] = {name: torch.from_numpy(value) for name, value in window["inputs"].items()}
        return windows

    def caption(self, windows: Iterable[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """The result of the pipeline for the windows of one input, with all that the model has over time.

        Raises:
            TimeoutError: If it takes too long.
        """
        config, deadline = self.captioner.model.config, Deadline(self.limits.seconds)
        _, forward, postprocess = self.captioner._sanitize_parameters(
            return_gate=has_gate(config),
            return_agreement=has_agreement(config),
            return_confidence=has_confidence(config),
            return_transport=has_transport(config),
            **options,
        )
        done = []
        for window in windows:
            deadline.check()
            batch = collate_windows([(0, dict(window))])
            outputs = self.captioner.forward(
                batch.inputs, stopping_criteria=StoppingCriteriaList([deadline]), **forward
            )
            ((_, item),) = batch.items
            done.append({**item, **{name: value[0] for name, value in outputs.items()}})
        return self.captioner.postprocess(done, **postprocess)


def _read(task: Mapping[str, Any], processor: EVACapProcessor, most: float) -> list[dict[str, Any]] | None | str:
    """Runs in the reading process; an error is returned as its message."""
    inputs = dict(task)
    try:
        if inputs.pop("task") == "swap":
            return _write_swapped(**inputs, seconds=processor.window_seconds)
        windows = []
        for window in read_windows(inputs, processor, processor.window_seconds):
            if window["timestamp"][1] > most + 0.5:
                raise ValueError(f"the clip is longer than {most:g} s. Give a shorter one.")
            # Arrays travel as bytes. Tensors would need this process to go on living.
            window["inputs"] = {name: np.asarray(value) for name, value in window["inputs"].items()}
            windows.append(window)
        return windows
    except Exception as error:
        return explain(error)


def _write_swapped(picture: str, sound: str, output: str, seconds: float) -> None:
    """Writes the first seconds of a picture with the sound of another clip, in a form that browsers play."""
    seen = load_media(picture, fps=FPS, duration=seconds, audio=False)
    heard = load_media(sound, sampling_rate=SAMPLING_RATE, duration=seconds, video=False)
    if seen.frames is None or heard.waveform is None:
        missing = f"{picture}: it has no picture" if seen.frames is None else f"{sound}: it has no sound"
        raise ValueError(f"{missing}. Give a clip with both.")
    step = -(-seen.frames.shape[1] // HEIGHT)
    frames = seen.frames[:, ::step, ::step]
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    # What the encoder cannot hold would clip.
    waveform = heard.waveform / max(1.0, np.abs(heard.waveform).max())
    write_mp4(output, waveform, np.ascontiguousarray(frames), FPS)


def show_caption(result: Mapping[str, Any], threshold: float) -> str:
    """The caption as HTML, with its chunks as bars on a time line, and with gate, agreement and confidence."""
    lines = [
        f'<p class="evacap-caption">{html.escape(result["text"]) or "(nothing)"}</p>',
        _words(result),
        _measures(result, threshold),
    ]
    chunks = result.get("chunks", [])
    if chunks:
        total = max(chunk["timestamp"][1] for chunk in chunks)
        lines.append('<ol class="evacap-chunks">')
        for chunk in chunks:
            start, end = chunk["timestamp"]
            place = f"margin-left:{100 * start / total:.2f}%;width:{100 * (end - start) / total:.2f}%"
            lines.append(
                f'<li><span class="evacap-bar" style="{place}"></span>{start:.1f}–{end:.1f} s: '
                f"{html.escape(chunk['text'])}</li>"
            )
        lines.append("</ol>")
    return "\n".join(lines)


def show_swap(results: Iterable[Mapping[str, Any]], threshold: float) -> str:
    """The four captions of two clips as HTML, a card each."""
    cards = "".join(
        f'<div class="evacap-card"><h4>picture {result["picture"]}, sound {result["sound"]}</h4>'
        f'<p class="evacap-caption">{html.escape(result["text"])}</p>{_words(result)}{_measures(result, threshold)}</div>'
        for result in results
    )
    return f'<div class="evacap-cards">{cards}</div>'


def _words(result: Mapping[str, Any]) -> str:
    """The words of a caption as HTML, the more shaded the more they come from the picture."""
    shown = []
    for word in result.get("words", []):
        total = word["audio"] + word["video"]
        share = word["video"] / total if total else 0.0
        title = f"sound {word['audio']:.2f}, picture {word['video']:.2f}"
        shown.append(
            f'<span class="evacap-word" style="background:rgba(213,94,0,{share:.2f})" title="{title}">'
            f"{html.escape(word['word'])}</span>"
        )
    if not shown:
        return ""
    return f"<div>{' '.join(shown)}</div><div>The darker a word, the more it comes from the picture.</div>"


def _measures(result: Mapping[str, Any], threshold: float) -> str:
    """Gate and agreement of a result as HTML, as far as it has them."""
    shown = []
    if result.get("silent"):
        shown.append("The sound is silent: the caption is invented.")
    if "gate" in result:
        gate = fmean(result["gate"])
        shown.append(_meter(f"gate {gate:.2f} (0 ignores the picture, 1 trusts it)", gate))
    if "agreement" in result:
        known = [window["probability"] for window in result["agreement"] if window["probability"] is not None]
        agreement = fmean(known) if known else None
        said = f"picture and sound: {verdict(agreement, threshold)}"
        shown.append(said if agreement is None else _meter(f"{said} ({agreement:.2f})", agreement))
    return "".join(f"<div>{line}</div>" for line in shown)


def _meter(label: str, value: float) -> str:
    return f'<label class="evacap-meter">{label}<meter min="0" max="1" value="{value:.3f}"></meter></label>'


def introduction(captioner: AudioVisualCaptioningPipeline, limits: Limits) -> str:
    """What stands above the page, as Markdown."""
    import evacap

    name = captioner.model.name_or_path
    model = f"The model is {Path(name).name if Path(name).exists() else name}."
    if name == evacap.TINY:
        model = (
            "The model is the small one that comes with EVACap, **for trying**: it knows eighteen kinds of synthesised "
            "sounds and no real recordings. `evacap demo --model` shows another."
        )
    return (
        f"What is *heard* in a clip. The picture helps where it fits the sound. {model}\n\n"
        f"A clip may have {limits.megabytes} MB and {limits.clip_seconds:g} s."
    )


def make_page(captioner: AudioVisualCaptioningPipeline, limits: Limits) -> "gradio.Blocks":
    """The page, and with it the endpoints `/caption` and `/swap` of Gradio's API.

    Args:
        captioner ([`AudioVisualCaptioningPipeline`]): The pipeline that captions.
        limits ([`Limits`]): What one visitor may ask for at a time.

    Raises:
        ImportError: If Gradio or Matplotlib is missing.
    """
    missing = [name for name in ("gradio", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the page needs {' and '.join(missing)}: pip install 'evacap[app]'")
    import gradio as gr

    from .training.evaluation.plots import plot_over_time

    config = captioner.model.config
    threshold = config.agreement_threshold or 0.5
    page_captioner = PageCaptioner(captioner, limits)
    samples = Path(tempfile.mkdtemp(prefix="evacap-samples-"))
    number = iter(range(FIRST_SAMPLE, 10**9))

    def explained(call: Callable) -> Any:
        try:
            return call()
        except (ValueError, TimeoutError, MemoryError, torch.cuda.OutOfMemoryError) as error:
            # A message may contain the name of a file, and is shown as HTML.
            raise gr.Error(html.escape(explain(error)), print_exception=False) from error

    def inputs_of(clip: str | None, sound: str | None) -> dict[str, str]:
        if clip is None and sound is None:
            raise gr.Error("There is no clip. Drop one, record one, or make a sample clip.", print_exception=False)
        if sound is None:
            return {"media": clip}
        return {"audio": sound} | ({} if clip is None else {"video": clip})

    def caption(clip: str | None, sound: str | None, beams: float) -> tuple[dict[str, Any], dict[str, str]]:
        inputs = inputs_of(clip, sound)
        result = explained(lambda: page_captioner.caption(page_captioner.windows(inputs), num_beams=int(beams)))
        return {"file": Path(clip or sound).name, **result}, inputs

    def draw(inputs: dict[str, str], result: dict[str, Any]) -> Any:
        windows = explained(lambda: page_captioner.windows(inputs))
        return plot_over_time(windows, result, captioner.processor, result["file"], threshold, width=7.0)

    def swap(first: str | None, second: str | None, beams: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
        if first is None or second is None:
            raise gr.Error("Two clips are needed: drop them, or make sample clips.", print_exception=False)
        clips, results = {"A": first, "B": second}, []
        for picture in clips:
            for sound in clips:
                inputs = {"audio": clips[sound], "video": clips[picture]}
                result = explained(
                    lambda inputs=inputs: page_captioner.caption(page_captioner.windows(inputs), num_beams=int(beams))
                )
                results.append({"picture": picture, "sound": sound, **result})
        return results, clips

    def play_swapped(clips: dict[str, str]) -> list[str]:
        folder = Path(tempfile.mkdtemp(prefix="evacap-swapped-"))
        outputs = [str(folder / "picture_A_sound_B.mp4"), str(folder / "picture_B_sound_A.mp4")]
        for picture, sound, output in (("A", "B", outputs[0]), ("B", "A", outputs[1])):
            task = {"task": "swap", "picture": clips[picture], "sound": clips[sound], "output": output}
            explained(lambda task=task: page_captioner.read(task))
        return outputs

    def make_sample(index: int | None = None) -> str:
        scene = make_scene(0, "test", next(number) if index is None else index)
        path = samples / f"{scene.id}.mp4"
        write_clip(scene, path)
        return str(path)

    public = {"concurrency_id": "model"}
    private = {"api_visibility": "private", "show_progress": "minimal"}
    with gr.Blocks(title="EVACap", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# EVACap\n{introduction(captioner, limits)}")
        with gr.Tab("Caption a clip"):
            with gr.Row():
                with gr.Column(min_width=300):
                    clip = gr.Video(label="clip", sources=["upload", "webcam"])
                    with gr.Row():
                        new = gr.Button("Make a sample clip", min_width=120)
                        run = gr.Button("Caption", variant="primary", min_width=120)
                    with gr.Accordion("Another sound, or a sound alone", open=False):
                        sound = gr.Audio(label="sound", sources=["upload", "microphone"], type="filepath")
                with gr.Column(min_width=300):
                    said = gr.HTML(container=True)
                    plot = gr.Plot(show_label=False)
            with gr.Accordion("JSON", open=False):
                result = gr.JSON(show_label=False)
        with gr.Tab("Swap two sounds"):
            gr.Markdown(
                "The sounds of two clips change places. A model that is not fooled follows the sound, and says less of "
                "what only the picture tells. Gate and agreement show how far it trusted the picture."
            )
            with gr.Row():
                first, second = (
                    gr.Video(make_sample(index), label=label, sources=["upload", "webcam"], min_width=260)
                    for label, index in (("clip A", SAMPLES[0]), ("clip B", SAMPLES[1]))
                )
            with gr.Row():
                new_two = gr.Button("Make two sample clips", min_width=120)
                run_swap = gr.Button("Swap the sounds", variant="primary", min_width=120)
            cards = gr.HTML()
            with gr.Row():
                outputs = [
                    gr.Video(label=label, interactive=False, min_width=260)
                    for label in ("picture A, sound B", "picture B, sound A")
                ]
            with gr.Accordion("JSON", open=False):
                swapped = gr.JSON(show_label=False)
        with gr.Accordion("Settings", open=False):
            beams = gr.Slider(1, 8, value=4, step=1, label="beams")
        # The page may show other clips by the time that these have their captions.
        captioned, swapped_clips = gr.State(), gr.State()
        new.click(lambda: (make_sample(), None), None, [clip, sound], **private)
        run.click(caption, [clip, sound, beams], [result, captioned], api_name="caption", **public).success(
            lambda result: show_caption(result, threshold), result, said, **private
        ).success(draw, [captioned, result], plot, **private)
        new_two.click(lambda: (make_sample(), make_sample()), None, [first, second], **private)
        run_swap.click(swap, [first, second, beams], [swapped, swapped_clips], api_name="swap", **public).success(
            lambda results: show_swap(results, threshold), swapped, cards, **private
        ).success(play_swapped, swapped_clips, outputs, **private)
    # One call at a time uses the model and the reading process; the others wait.
    return page.queue(max_size=20, default_concurrency_limit=1)


def launch(captioner: AudioVisualCaptioningPipeline, limits: Limits = Limits(), **options: Any) -> None:
    """Shows the page until the process is stopped.

    Args:
        captioner ([`AudioVisualCaptioningPipeline`]): The pipeline that captions.
        limits ([`Limits`]): What one visitor may ask for at a time.
        options: Arguments of Gradio's `launch`, such as `server_name`, `server_port` and `share`.

    Raises:
        ImportError: If Gradio or Matplotlib is missing.
        OSError: If the port is not free.
    """
    page = make_page(captioner, limits)
    import gradio as gr

    # The names of fonts that every system has: Gradio's own would be fetched.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(
        theme=theme,
        css=STYLE,
        max_file_size=limits.megabytes * 10**6,
        ssr_mode=False,
        footer_links=["api"],
        **options,
    )
