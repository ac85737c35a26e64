"""Videos and images come out as a player shows them, to the frame, and go in with size and sound kept."""

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.video import decoding, encoding
from tests.helpers.clips import MEDIA, encode, moving_picture

TRAILER = str(MEDIA / "trailer_bbb.mp4")


def difference(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other).mean())


CODECS = {
    "open_gop.mp4": ("libx264", "yuv420p", {"g": "9", "x264-params": "open-gop=1:bframes=3"}),
    "ten_bit.mp4": ("libx265", "yuv420p10le", {"x265-params": "log-level=none:keyint=10"}),
    "packed.avi": ("mpeg4", "yuv420p", {"g": "12", "bf": "2"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"cpu-used": "8", "g": "10"}),
    "mpeg2.ts": ("mpeg2video", "yuv420p", {"g": "12", "bf": "2", "qscale": "2"}),
}


@pytest.mark.parametrize("name", CODECS)
def test_a_span_is_the_same_frames_as_in_the_whole(name, tmp_path):
    path = encode(tmp_path / name, *CODECS[name])
    whole = list(decoding.decode_frames(path))
    stamps = [stamp for stamp, _, _ in decoding.decode_video(path)]
    assert len(whole) == len(stamps) == 30
    assert difference(whole[20], moving_picture()[20]) < 8
    for first in (0, 1, 8, 13, 24):
        row = {"media": "video", "start_pts": stamps[first], "end_pts": stamps[first + 5]}
        span = decoding.read_frames(row, path, 1, 3)
        assert all(np.array_equal(a, b) for a, b in zip(span, whole[first + 1 : first + 4], strict=True))
        with pytest.raises(ValueError, match="only 4 decode"):
            decoding.read_frames(row, path, 1, 5)


def test_probe_says_what_the_file_is(tmp_path):
    found = decoding.probe(encode(tmp_path / "ten_bit.mp4", *CODECS["ten_bit.mp4"]))
    assert (found.media, found.codec, found.bit_depth, found.pix_fmt) == ("video", "hevc", 10, "yuv420p10le")
    assert (found.width, found.height, found.num_frames, found.fps) == (256, 144, 30, 25)
    trailer = decoding.probe(TRAILER)
    assert trailer.has_audio and trailer.fps == 24 and trailer.num_frames == 1323 and not trailer.interlaced


def test_frames_are_turned_and_squared_as_displayed(tmp_path):
    frames = moving_picture(3)
    turned = encode(
        tmp_path / "turned.mp4",
        "libx264",
        "yuv420p",
        {"crf": "8"},
        lambda s: s.set_display_rotation(-90),
        frames,
    )
    found = decoding.probe(turned)
    assert (found.width, found.height, found.rotation) == (144, 256, 90)
    shown = next(decoding.decode_frames(turned))
    assert difference(shown, np.rot90(frames[0], -1)) < 6

    def anamorphic(stream) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    wide = encode(tmp_path / "wide.mp4", "libx264", "yuv420p", {"crf": "8"}, anamorphic, frames)
    found = decoding.probe(wide)
    assert (found.width, found.height, found.sample_aspect) == (341, 144, "4/3")
    stretched = cv2.resize(frames[0], (341, 144), interpolation=cv2.INTER_CUBIC)
    assert difference(next(decoding.decode_frames(wide)), stretched) < 8


def test_high_dynamic_range_is_brought_to_standard_range(tmp_path):
    def perceptual_quantiser(stream) -> None:
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = 16, 9, 9

    # 58% of PQ is 203 cd/m2, the white of graphics: washed-out grey if the curve were taken for sRGB.
    white = [np.full((64, 64, 3), 148, np.uint8)] * 2
    path = encode(
        tmp_path / "pq.mp4",
        "libx264",
        "yuv420p10le",
        {},
        perceptual_quantiser,
        white,
    )
    assert decoding.probe(path).color_transfer == "smpte2084"
    shown = next(decoding.decode_frames(path))
    assert shown.mean() > 190


WRITTEN = (("lossless.mkv", "ffv1"), ("small.mp4", "h264"), ("edit.mov", "prores"))


@pytest.mark.parametrize("size", [(641, 273), (64, 48), (33, 64)])
def test_written_videos_keep_size_count_and_pixels(size, tmp_path):
    width, height = size
    frames = moving_picture(7, height, width)
    for name, codec in WRITTEN:
        path = str(tmp_path / name)
        with encoding.VideoWriter(path, Fraction(30000, 1001), width, height, codec=codec) as writer:
            for frame in frames:
                writer.write(frame)
        back = list(decoding.decode_frames(path))
        assert len(back) == 7 and decoding.probe(path).fps == Fraction(30000, 1001)
        for one, other in zip(frames, back, strict=True):
            assert difference(one, other) == 0 if codec == "ffv1" else difference(one, other) < 4
    with (
        pytest.raises(ValueError, match="64x48 in a video of 66x48"),
        encoding.VideoWriter(str(tmp_path / "x.mp4"), 25, 66, 48) as writer,
    ):
        writer.write(np.zeros((48, 64, 3), np.uint8))


def test_images_become_rgb_as_shown(tmp_path):
    picture = moving_picture(1)[0]
    image = Image.fromarray(picture)
    image.convert("L").save(tmp_path / "grey.png")
    grey = decoding.load_image(str(tmp_path / "grey.png"))
    assert grey.shape == picture.shape and np.array_equal(grey[..., 0], grey[..., 2])
    half = image.convert("RGBA")
    half.putalpha(128)
    half.save(tmp_path / "half.png")
    assert difference(decoding.load_image(str(tmp_path / "half.png")), (picture * (128 / 255)).round()) < 1
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(decoding.load_image(str(tmp_path / "turned.png")), np.rot90(picture, -1))
    found = decoding.probe(str(tmp_path / "turned.png"))
    assert (found.media, found.width, found.height, found.rotation) == ("image", 144, 256, 90)
    deep = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(decoding.load_image(str(tmp_path / "deep.png"))[..., 1], (deep / 257).round())


def test_unusable_files_say_why(tmp_path):
    def reason(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError) as caught:
            decoding.probe(str(tmp_path / name))
        return str(caught.value)

    whole = Path(encode(tmp_path / "whole.mp4", "libx264", "yuv420p", {})).read_bytes()
    assert "moov atom not found" in reason("cut.mp4", whole[: len(whole) // 2])
    assert "FFmpeg cannot read it" in reason("text.mp4", b"not a video\n" * 40)
    assert "empty" in reason("empty.mp4", b"")
    # A playlist would make FFmpeg open other files.
    playlist = f"#EXTM3U\n#EXTINF:10,\nfile://{tmp_path}/whole.mp4\n#EXT-X-ENDLIST\n"
    assert "FFmpeg cannot read it" in reason("playlist.mp4", playlist.encode())
    Image.fromarray(moving_picture(1)[0]).save(tmp_path / "whole.jpg")
    assert "cannot be decoded" in reason("cut.jpg", (tmp_path / "whole.jpg").read_bytes()[:3000])
    with pytest.raises(ValueError, match="256x144 pixels are more than the limit of 10000"):
        decoding.probe(str(tmp_path / "whole.mp4"), max_pixels=10_000)
    with pytest.raises(ValueError, match="more than the limit"):
        decoding.probe(str(tmp_path / "whole.jpg"), max_pixels=10_000)
