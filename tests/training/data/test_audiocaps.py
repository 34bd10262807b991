import glob
import logging
import os

import pytest

from evacap.training.data.audiocaps import read_audiocaps


ID = "_a-Y0123456"  # eleven characters, as YouTube has them
HEADER = "audiocap_id,youtube_id,start_time,caption\n"


@pytest.fixture
def read(tmp_path):
    """`read(files)`: the clip of one row, and the files of it relative to the media folder."""

    def read(*files: str, start: str = "30"):
        csv_file, media = tmp_path / "train.csv", tmp_path / "media"
        csv_file.write_text(f'{HEADER}91139,{ID},{start},"A woman talks, then water pours"\n')
        media.mkdir(exist_ok=True)
        for file in files:
            (media / file).parent.mkdir(parents=True, exist_ok=True)
            (media / file).touch()
        (clip,) = read_audiocaps(csv_file, media)
        found = {kind: getattr(clip, kind) for kind in ("media", "audio", "video", "frames")}
        return clip, {kind: os.path.relpath(path, media) for kind, path in found.items() if path}

    return read


@pytest.mark.parametrize(
    "name",
    [
        f"{ID}.mp4",
        f"{ID}_30.webm",
        f"{ID}_30_40.MKV",
        f"{ID}_000030.mp4",
        f"{ID}_30.000_40.000.mp4",
        f"{ID}_30000_40000.mp4",
        f"{ID}_30000.mp4",
        f"Y{ID}.mp4",
        f"Y{ID}_30.mp4",
        f"some/where/{ID}_30.mp4",
        f"A dog, 10 - 20 [4K] [{ID}].webm",
        f"A dog-{ID}.mkv",
        "train/91139.mp4",
    ],
)
def test_the_usual_names_are_found(read, name):
    clip, found = read(name, f"x{name}", f"{ID}_31.mp4", f"{ID}-30.mp4", f"{ID}_30.txt", "Yabcdefghijk_30.mp4")
    assert found == {"media": name}
    assert clip.id == f"{ID}_30" and clip.captions == ("A woman talks, then water pours",)
    assert clip.extra == {"youtube_id": ID, "start_time": 30.0, "audiocap_ids": ["91139"]}
    whole = (f"{ID}.mp4", f"Y{ID}.mp4", f"A dog, 10 - 20 [4K] [{ID}].webm", f"A dog-{ID}.mkv")
    assert clip.start_in_whole == (30.0 if name in whole else None)


@pytest.mark.parametrize(
    "name, start", [("0_10000", "0"), ("0_8", "0"), ("3_13", "3"), ("3000_13000", "3"), ("3", "3")]
)
def test_starts_of_a_few_seconds(read, name, start):
    assert read(f"{ID}_{name}.wav", f"{ID}_4_14.wav", start=start)[1] == {"audio": f"{ID}_{name}.wav"}


def test_frames_as_avcap_and_cav_mae_lay_them_out(read, tmp_path):
    name = f"{ID}_30000_40000"
    files = [f"frames/frame_{frame}/{name}.jpg" for frame in range(12)]
    clip, found = read(f"waveforms/{name}.wav", *files)
    assert found == {"audio": f"waveforms/{name}.wav", "frames": f"frames/frame_*/{name}.jpg"}
    assert sorted(glob.glob(clip.frames)) == sorted(str(tmp_path / "media" / file) for file in files)


def test_a_folder_of_frames(read):
    assert read(f"{ID}.wav", f"pictures/{ID}_30/0001.png", f"pictures/{ID}_30/0002.png", f"{ID}_30.jpg")[1] == {
        "audio": f"{ID}.wav",
        "frames": f"pictures/{ID}_30",
    }


def test_a_single_picture(read):
    assert read(f"{ID}_30.flac", f"{ID}_30.jpg")[1] == {"audio": f"{ID}_30.flac", "frames": f"{ID}_30.jpg"}


def test_of_several_files_one_is_preferred(read):
    preferred = [f"b/{ID}_30.mp4", f"c/{ID}_30.mp4", f"a/{ID}_30.webm", f"a/{ID}.mp4", "a/91139.mp4"]
    for count in range(1, len(preferred) + 1):
        assert read(*preferred[-count:])[1] == {"media": preferred[-count]}


def test_a_sound_file_goes_before_a_sound_track_and_a_video_before_frames(read):
    assert read(f"{ID}.wav", f"{ID}.mp4", f"frames/{ID}/0.jpg")[1] == {"audio": f"{ID}.wav", "video": f"{ID}.mp4"}


def test_five_rows_of_a_clip_are_its_captions(tmp_path):
    rows = [f"{100 + row},{ID},{row % 2},caption {row}\n" for row in range(10)]
    (tmp_path / "val.csv").write_text(HEADER + "".join(rows))
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "103.wav").touch()
    even, odd = read_audiocaps(tmp_path / "val.csv", tmp_path / "media")
    assert even.captions == tuple(f"caption {row}" for row in range(0, 10, 2)) and even.path is None
    assert odd.extra["audiocap_ids"] == ["101", "103", "105", "107", "109"]
    assert odd.audio == str(tmp_path / "media" / "103.wav")


def test_audiocaps_own_files(shared, tmp_path):
    for name, clips, captions in (("train", 49838, 1), ("val", 495, 5), ("test", 975, 5)):
        entries = read_audiocaps(shared("captions") / f"audiocaps_{name}.csv", tmp_path)
        assert len(entries) == len({entry.id for entry in entries}) == clips
        assert {len(entry.captions) for entry in entries} == {captions}


@pytest.mark.parametrize("rest", ["bang", "bang,,,", " bang "])
def test_a_caption_broken_in_two_is_joined(tmp_path, rest):
    """As three are in version 2.0."""
    (tmp_path / "train.csv").write_text(f"{HEADER}1,{ID},30,heavy wind followed by a loud\n{rest}\n2,{ID},40,a dog\n")
    messages = []
    logger = logging.getLogger("transformers")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    try:
        first, second = read_audiocaps(tmp_path / "train.csv", tmp_path)
    finally:
        logger.removeHandler(handler)
    assert first.captions == ("heavy wind followed by a loud bang",) and second.captions == ("a dog",)
    assert messages == [f"{tmp_path / 'train.csv'}: captions were broken in two, and joined, in line 3"]


def test_links_that_lead_back_end(read, tmp_path):
    media = tmp_path / "media"
    for folder in ("", "real"):
        (media / folder).mkdir(parents=True, exist_ok=True)
        (media / folder / "a").symlink_to(media)
        (media / folder / "b").symlink_to(".")
    assert read(f"real/{ID}_30.wav")[1]["audio"].endswith(f"{ID}_30.wav")


def test_folders_of_links_that_double_end(read, tmp_path):
    """Forty folders with two links to the next: 2 ** 40 paths."""
    media = tmp_path / "media"
    for number in range(40):
        (media / str(number)).mkdir(parents=True)
        for name in ("x", "y"):
            (media / str(number) / name).symlink_to(media / str(number + 1))
    assert read(f"39/{ID}_30.wav")[1]["audio"].endswith(f"{ID}_30.wav")


def test_a_link_gives_the_pictures_of_a_folder_its_name(read, tmp_path):
    read("pictures/other/0.jpg", f"{ID}.wav")
    (tmp_path / "media" / "pictures" / ID).symlink_to("other")
    assert read()[1] == {"audio": f"{ID}.wav", "frames": f"pictures/{ID}"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_an_error(read, tmp_path):
    read(f"locked/{ID}.wav")
    (tmp_path / "media" / "locked").chmod(0)
    try:
        with pytest.raises(PermissionError, match="locked"):
            read()
    finally:
        (tmp_path / "media" / "locked").chmod(0o700)


def test_errors_name_what_is_wrong(tmp_path):
    for content, expected in (
        ("youtube_id,start_time,caption\na,1,x\n", "train.csv: has no column audiocap_id"),
        (f"{HEADER}1,{ID},soon,x\n", "train.csv, line 2: `start_time` is 'soon', expected seconds"),
        (f"{HEADER}1,{ID},nan,x\n", "train.csv, line 2: `start_time` is 'nan', expected seconds"),
        (f"{HEADER}1,{ID},1,\n", "train.csv, line 2: `caption` is empty"),
        (f"{HEADER}1,,1,x\n", "train.csv, line 2: `youtube_id` is empty"),
        (HEADER, "train.csv: has no rows"),
    ):
        (tmp_path / "train.csv").write_text(content)
        with pytest.raises(ValueError, match=expected):
            read_audiocaps(tmp_path / "train.csv", tmp_path)
    (tmp_path / "train.csv").write_text(f"{HEADER}1,{ID},1,x\n")
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        read_audiocaps(tmp_path / "train.csv", tmp_path / "nowhere")
