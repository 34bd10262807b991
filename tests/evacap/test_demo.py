"""The page of `evacap demo` in a browser, and its API, for which there is no other server."""

import json
import re
import subprocess
import urllib.request
import wave
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from small_models import save_untrained_model
from transformers import pipeline

import evacap
from evacap.app import Limits, PageCaptioner, show_caption
from evacap.cli import main
from evacap.training.evaluation.plots import plot_over_time
from evacap.training.procedural.scenes import make_scene, write_clip


GUIDE = Path(__file__).parents[2] / "docs" / "demo.md"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A clip of one window and one of two, one above the limits' length and one above their size, and a broken one."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(make_scene(0, "test", 10), folder / "sample.mp4")
    write_clip(make_scene(0, "test", 4, duration=10.0), folder / "two.mp4")
    (folder / "<b>bad.mp4").write_bytes(b"no media")
    (folder / "large.mp4").write_bytes(bytes(1_100_000))
    for name, seconds in (("long.wav", 20), ("hours.wav", 3600)):
        with wave.open(str(folder / name), "wb") as file:
            file.setparams((1, 1, 8000, 0, "NONE", ""))
            file.writeframes(b"\x80\x90\x85\x70" * 2000 * seconds)
    return folder


@pytest.fixture(scope="module")
def captioner():
    return pipeline(evacap.TASK, model=evacap.TINY)


@pytest.fixture
def page(chromium, demo):
    """The page on a telephone, and all that it asks for."""
    page = chromium.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(120_000)
    page.requested = []
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(demo)
    page.get_by_role("button", name="Caption", exact=True).wait_for()
    yield page
    page.close()


def upload(page, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(path)
    page.locator("video").first.wait_for()


def test_a_clip_is_captioned_on_a_telephone_without_a_network(page, demo, clips, captioner):
    upload(page, clips / "two.mp4")
    page.get_by_role("button", name="Caption", exact=True).click()
    page.locator("img[src^='data:image/webp']").wait_for()
    result = captioner(str(clips / "two.mp4"), num_beams=4)
    assert page.locator(".evacap-caption").inner_text() == result["text"]
    chunks = page.locator(".evacap-chunks li")
    assert [text.split(": ")[1] for text in chunks.all_inner_texts()] == [chunk["text"] for chunk in result["chunks"]]
    assert "picture and sound: belongs (0.88)" in page.locator("body").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert len(page.requested) > 10
    assert all(url.startswith((demo, "data:", "blob:")) for url in page.requested)


def test_a_bad_file_shows_an_error(page, clips):
    page.locator("input[type=file]").first.set_input_files(clips / "<b>bad.mp4")
    page.locator("video").first.wait_for()
    page.get_by_role("button", name="Caption", exact=True).click()
    # A browser that cannot play a file says so, too.
    toast = page.get_by_test_id("toast-body").filter(has_text="bad.mp4")
    toast.wait_for()
    assert "bad.mp4" in toast.inner_text() and "/" not in toast.inner_text().split("bad.mp4")[0]
    assert toast.locator("b", has_text="bad").count() == 0


def test_two_sounds_are_swapped_by_keyboard(page):
    page.get_by_role("tab", name="Caption a clip").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    button = page.get_by_role("button", name="Swap the sounds")
    button.wait_for()
    for _ in range(40):
        page.keyboard.press("Tab")
        if button.evaluate("button => button === document.activeElement"):
            break
    page.keyboard.press("Enter")
    page.locator(".evacap-card").first.wait_for()
    titles = page.locator(".evacap-card h4").all_inner_texts()
    assert titles == [f"picture {picture}, sound {sound}" for picture in "AB" for sound in "AB"]
    said = page.locator(".evacap-card .evacap-caption").all_inner_texts()
    assert "car" in said[0] and "pan" in said[3] and "car" not in said[1]
    page.wait_for_function("document.querySelectorAll('video[src*=sound_]').length == 2")
    playable = "[...document.querySelectorAll('video[src*=sound_]')].every(video => video.duration > 4.9)"
    page.wait_for_function(playable)


def test_the_interface_for_programs_has_limits(demo, clips, captioner):
    client = Client(demo, verbose=False)

    def ask(name: str, **options):
        return client.predict(handle_file(str(clips / name)), None, 1, api_name="/caption", **options)

    result = ask("sample.mp4")
    assert result["file"] == "sample.mp4" and result["text"] == captioner(str(clips / "sample.mp4"))["text"]
    assert len(result["gate"]) == len(result["agreement_by_step"]) == 16
    with pytest.raises(Exception, match="longer than 12 s"):
        client.predict(None, handle_file(str(clips / "long.wav")), 1, api_name="/caption")
    with pytest.raises(Exception, match="(?i)size|too large|413"):
        ask("large.mp4")


def test_a_file_that_nobody_uploaded_is_not_read(demo, clips):
    """The client of Gradio would upload it."""
    inside = {"path": str(clips / "sample.mp4"), "meta": {"_type": "gradio.FileData"}}
    request = urllib.request.Request(
        f"{demo}/gradio_api/call/caption",
        json.dumps({"data": [inside, None, 1]}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{demo}/gradio_api/call/caption/{event}") as reply:
        assert reply.read().startswith(b"event: error")


def test_reading_and_captioning_end_in_time(captioner, clips):
    page = PageCaptioner(captioner, Limits(seconds=0.02, clip_seconds=1e6))
    with pytest.raises(ValueError, match="took more than 0.01 s"):
        page.windows({"media": str(clips / "hours.wav")})
    # Its successor is ready.
    windows = page.windows({"media": str(clips / "two.mp4")})
    page.pool.close()
    with pytest.raises(TimeoutError, match="more than 0.02 s"):
        page.caption(windows)


def test_words_are_shaded_by_what_they_owe_to_the_picture():
    words = [
        {"timestamp": (0, 5), "word": "<b>rain</b>", "audio": 0.9, "video": 0.1},
        {"timestamp": (0, 5), "word": "falls", "audio": 0.0, "video": 0.0},
    ]
    shown = show_caption({"text": "rain falls", "words": words}, 0.5)
    assert "&lt;b&gt;rain" in shown and "<b>" not in shown
    assert re.findall(r"rgba\(213,94,0,(.*?)\)\" title=\"(.*?)\"", shown) == [
        ("0.10", "sound 0.90, picture 0.10"),
        ("0.00", "sound 0.00, picture 0.00"),
    ]
    assert "evacap-word" not in show_caption({"text": "rain falls"}, 0.5)


@pytest.mark.parametrize(("preset", "name"), [("vact", "words"), ("lavcap", "transport")])
def test_the_page_shows_all_that_a_model_has(preset, name, clips, tmp_path):
    save_untrained_model(preset, tmp_path)
    captioner = pipeline(evacap.TASK, model=str(tmp_path))
    page = PageCaptioner(captioner, Limits())
    windows = page.windows({"media": str(clips / "two.mp4")})
    result = page.caption([dict(window) for window in windows], max_new_tokens=5)
    page.pool.close()
    assert result[name]
    figure = plot_over_time(windows, result, captioner.processor, "two.mp4")
    plans = [axes for axes in figure.axes if axes.get_ylabel() == "picture"]
    assert [len(axes.images) for axes in plans] == ([2] if preset == "lavcap" else [])
    assert ("evacap-word" in show_caption(result, 0.5)) == (preset == "vact")


def test_curl_of_the_guide(demo, clips, captioner):
    (script,) = (block for block in re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "curl" in block)
    script = script.replace("http://127.0.0.1:7860", demo)
    done = subprocess.run(["bash", "-euc", script], cwd=clips, capture_output=True, text=True, timeout=300)
    assert captioner(str(clips / "sample.mp4"), num_beams=4)["text"] in done.stdout, done


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("evacap.app.find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "pip install 'evacap[app]'" in capsys.readouterr().err
