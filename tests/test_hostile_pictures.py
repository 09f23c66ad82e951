"""Pictures and requests made to cost a lot, to hang or to break: the library and the service refuse them quickly and by name."""
import base64
import functools
import io
import json
import math
import os
import struct
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from binvision.data.images import find_images
from binvision.ground.core import ImageError
from binvision.ground.pictures import load_image, open_picture
from binvision.model.backends import load_model
from binvision.model.predict import predict
from binvision.serve.app import make_app
from binvision.serve.limits import ServeSettings
from binvision.serve.run import running

LIMIT = 10  # seconds that nothing may take
pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of odd files


@pytest.fixture(scope="session")
def model():
    "The small trained model of the notebooks."
    return Path(__file__).resolve().parent.parent / "nbs/models/small"


@pytest.fixture(scope="module")
def opened(model): return load_model(model)


@pytest.fixture(scope="module")
def http(opened):
    with TestClient(make_app(opened)) as http: yield http


@pytest.fixture(scope="module")
def jpeg(data): return find_images(data)["00001"].read_bytes()


def saved(image, format="JPEG", **how):
    buffer = io.BytesIO()
    image.save(buffer, format, **how)
    return buffer.getvalue()


def within_limit(function, *args):
    "What a function returns, which must neither take long nor work much."
    start, work = time.perf_counter(), time.process_time()
    try: return function(*args)
    finally: assert time.perf_counter() - start < LIMIT and time.process_time() - work < 4


def kind_of(source):
    "The kind of `ImageError` that a picture ends in; None for one that opens."
    try: assert load_image(source).mode == "RGB"
    except ImageError as e: return e.kind


# Files that ask for much work

def segment(code, content=b""): return b"\xff" + bytes([code]) + struct.pack(">H", len(content) + 2) + content


def chunk(name, content=b""): return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(chunks, width=8, height=8):
    "A black PNG with some chunks in front of its pixels."
    rows = zlib.compress(bytes((3 * width + 1) * height))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunks
            + chunk(b"IDAT", rows) + chunk(b"IEND"))


def progressive(side, scans):
    "A progressive JPEG whose last scan is repeated."
    raw = saved(Image.new("RGB", (side, side), (120, 130, 140)), progressive=True)
    last = raw[raw.rindex(b"\xff\xda"):-2]
    return raw[:-2] + last * (scans - raw.count(b"\xff\xda")) + raw[-2:]


def tiff(tags, content, width=16, height=16):
    "An RGB TIFF: its content begins at byte 8; tags are tuples of number, type, count and value or bytes."
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, struct.pack("<3H", 8, 8, 8)), (259, 3, 1, 1), (262, 3, 1, 2),
            (277, 3, 1, 3), *tags]
    places, at = [], 8 + len(content)
    for number, type, count, value in sorted(tags):
        if isinstance(value, bytes): content, value, at = content + value, at, at + len(value)
        places.append(struct.pack("<HHII", number, type, count, value))
    return b"II*\0" + struct.pack("<I", at) + content + struct.pack("<H", len(places)) + b"".join(places) + bytes(4)


def same_strips(width, height):
    "A TIFF of one row a strip, all of them the same bytes."
    places = struct.pack(f"<{height}I", *[8] * height), struct.pack(f"<{height}I", *[3 * width] * height)
    return tiff([(273, 4, height, places[0]), (278, 3, 1, 1), (279, 4, height, places[1])], bytes(3 * width), width, height)


def with_fractions(megabytes):
    "A TIFF whose EXIF data are fractions, which Pillow reads one by one."
    n = megabytes << 17
    exif = struct.pack("<H", 1) + struct.pack("<HHII", 0x9000, 5, n, 8 + 768) + bytes(4)
    pixels = [(273, 4, 1, 8), (278, 3, 1, 16), (279, 4, 1, 768)]
    return tiff([*pixels, (34665, 4, 1, 8 + 768 + 8 * n)], bytes(768) + struct.pack("<II", 7, 3) * n + exif)


def run_lengths(side, bits):
    "A BMP of run lengths: one pixel a row, the rest of which is filled up."
    colours, rows = bytes(4 << bits), b"\1\7\0\0" * side + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, bits, 1 if bits == 8 else 2, len(rows), 0, 0, 1 << bits, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(colours) + len(rows), 0, 0, 54 + len(colours)) + head + colours + rows


def in_gif(blocks):
    "A GIF with something in front of its picture."
    raw = saved(Image.new("P", (8, 8)), "GIF")
    at = raw.index(b"\x2c\0\0\0\0\x08\0\x08\0")
    return raw[:at] + blocks + raw[at:]


@functools.cache
def costly():
    "Name → a file, the kind of error, and whether the service calls it costly as well."
    small = saved(Image.new("RGB", (8, 8)))
    profile = b"a\0\0" + zlib.compress(bytes(1 << 20), 9)
    text = b"a\0\0" + zlib.compress(b"b" * 600)
    def before(*segments): return small[:2] + b"".join(segments) + small[2:]
    return {
        "49 million pixels in 99 scans": (progressive(7000, 99), "large"),
        "16 million pixels in 99 scans": (progressive(3992, 99), "costly"),
        "few pixels in 10,000 scans": (progressive(64, 10_000), "costly"),
        "filled markers of scans": (progressive(3992, 99).replace(b"\xff\xda", b"\xff\xff\xff\xda"), "costly"),
        "100,000 texts": (png(chunk(b"tEXt", b"a\0b") * 100_000), "costly"),
        "100,000 compressed texts": (png(chunk(b"zTXt", text) * 100_000), "costly"),
        "5,000 colour profiles": (png(chunk(b"iCCP", profile) * 5000), "costly"),
        "100,000 private chunks": (png(chunk(b"prVt") * 100_000), "costly"),
        "100,000 empty pieces of pixels": (png(chunk(b"IDAT") * 100_000), "costly"),
        "texts behind the pixels": (png(b"")[:-12] + chunk(b"tEXt", b"a\0b") * 10_000 + chunk(b"IEND"), "costly"),
        "a PNG of much EXIF": (png(chunk(b"eXIf", b"II*\0\x08\0\0\0" + bytes(1_000_000))), "costly"),
        "a million comments": (before(segment(0xFE) * 1_000_000), "costly"),
        "EXIF in many pieces": (before(segment(0xE1, b"Exif\0\0abc") * 100_000), "costly"),
        "EXIF in large pieces": (before(segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 100), "costly"),
        "15 million filling bytes": (before(b"\xff" * 15_000_000), "costly"),
        "an arithmetic JPEG": (small.replace(b"\xff\xc0", b"\xff\xc9"), "costly"),
        "a million comments in a GIF": (in_gif(b"\x21\xfe\1a\0" * 1_000_000), "costly"),
        "a comment of a million pieces": (in_gif(b"\x21\xfe" + b"\1a" * 1_000_000 + b"\0"), "costly"),
        "5,000 strips in one place": (same_strips(5000, 5000), "costly"),
        "a million narrow strips": (same_strips(16, 1_000_000), "costly"),
        "16 MB of fractions": (with_fractions(16), "costly"),
        "a JPEG in a TIFF": (saved(Image.new("RGB", (64, 64)), "TIFF", compression="jpeg"), "costly"),
        "large tiles": (tiff([(322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 8), (325, 4, 1, 768)], bytes(768)), "costly"),
        "run lengths": (run_lengths(4000, 8), "costly"), "short run lengths": (run_lengths(4000, 4), "costly"),
        "a bomb": (saved(Image.new("1", (10_000, 6000)), "PNG"), "large"),
        "a format for printers": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "unknown"),
        "a plain bitmap": (b"P1\n4000 4000\n" + b"1 " * 1000, "unknown"),
    }


@pytest.mark.parametrize("what", costly())
def test_a_costly_picture_is_refused_before_the_work(what, tmp_path):
    raw, kind = costly()[what]
    assert within_limit(kind_of, raw) == kind
    (tmp_path / "bin.jpg").write_bytes(raw)
    with pytest.raises(ImageError, match="bin.jpg: ") as e: load_image(tmp_path / "bin.jpg")
    assert e.value.kind == kind


@pytest.mark.parametrize("what", [what for what, (raw, _) in costly().items() if raw[:2] in (b"\xff\xd8", b"\x89P")])
def test_the_service_refuses_a_costly_picture_by_name(http, what):
    raw, kind = costly()[what]
    reply = within_limit(lambda: http.post("/predict", files={"image": ("bin 7.jpg", raw)}))
    assert (reply.status_code, reply.json()["code"]) == ((413, "too-many-pixels") if kind == "large" else (422, "costly"))
    assert reply.json()["detail"].startswith("bin 7.jpg: ")


def test_ordinary_pictures_are_not_taken_for_costly(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x010F] = "a camera" * 1000
    profile = bytes(600_000)
    ways = [dict(progressive=True), dict(exif=exif), dict(icc_profile=profile), dict(comment=b"a" * 60_000), dict(quality=100, subsampling=0)]
    raws = [saved(image, **how) for how in ways]
    raws += [saved(image, "PNG", icc_profile=profile, exif=exif), saved(image.convert("P"), "PNG"), saved(image, "PNG", compress_level=0)]
    raws += [saved(image, "TIFF", compression=c, icc_profile=profile) for c in ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate")]
    raws += [saved(image.convert("1"), "TIFF", compression=c) for c in ("group3", "group4")]
    raws += [saved(image, format) for format in ("BMP", "GIF", "WEBP")]
    films = dict(save_all=True, append_images=[image.rotate(90)] * 3)
    raws += [saved(image, format, **films) for format in ("GIF", "WEBP", "PNG", "TIFF")]
    assert [kind_of(raw) for raw in raws] == [None] * len(raws)
    with open_picture(saved(Image.new("RGB", (5700, 4280)))) as phone: assert phone.size == (5700, 4280)


def test_odd_exif_turns_a_picture_or_leaves_it(jpeg):
    "The rest of the EXIF data does not matter for how a picture is held."
    odd = b"".join(struct.pack("<HHII", 0x8000 + k, 2, 10, 8) for k in range(2000))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2001) + struct.pack("<HHII", 0x0112, 3, 1, 6) + odd + bytes(40)
    assert load_image(jpeg[:2] + segment(0xE1, exif) + jpeg[2:]).size == load_image(jpeg).size[::-1]


# Files that are none

def test_special_files_are_refused_and_never_waited_for(tmp_path, opened):
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    (tmp_path / "noise.jpg").symlink_to("/dev/urandom")
    (tmp_path / "nothing.jpg").symlink_to("/dev/null")
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    with open(tmp_path / "heavy.jpg", "wb") as file: file.truncate(200_000_000)  # takes no room on the disk
    kinds = {"endless": "special", "noise": "special", "nothing": "special", "pipe": "special", "folder": "folder",
             "empty": "empty", "heavy": "heavy", "circle": "unreadable", "gone": "missing"}
    found = within_limit(lambda: {name: kind_of(tmp_path / f"{name}.jpg") for name in kinds})
    assert found == kinds
    for name in kinds.keys() - {"folder"}:
        with pytest.raises(ImageError, match=f"{name}.jpg: "): within_limit(predict, opened, tmp_path / f"{name}.jpg")


def test_open_files_are_read_up_to_the_limit(jpeg):
    class Endless(io.RawIOBase):
        def readable(self): return True
        def readinto(self, buffer): return len(buffer)

    assert within_limit(kind_of, io.BufferedReader(Endless())) == "heavy"
    file = io.BytesIO(jpeg)
    assert kind_of(file) is kind_of(file) is None  # from the beginning each time


# Stopping

def test_a_service_that_stops_answers_everybody(opened, jpeg):
    "A request whose pictures are still being opened when the time is up is told to come again."
    app = make_app(opened, ServeSettings(grace=.5, decoders=1))
    service, begun, go_on = app.state.service, threading.Event(), threading.Event()
    read = service.read

    def slow(raw):
        begun.set()
        go_on.wait(30)

    service.read = lambda raw: service.in_thread(slow, raw) if raw == b"slow" else read(raw)
    with ThreadPoolExecutor(2) as pool:
        with running(app) as url:
            def ask(raw): return httpx.post(f"{url}/predict", files={"image": ("a.jpg", raw)}, trust_env=False, timeout=30)
            assert ask(jpeg).status_code == 200
            hostile = pool.submit(ask, b"slow")
            assert begun.wait(LIMIT)
            honest = pool.submit(ask, jpeg)
            deadline = time.monotonic() + LIMIT
            while service.active < 2 and time.monotonic() < deadline: time.sleep(.01)
            threading.Timer(3, go_on.set).start()
        for reply in (hostile.result(), honest.result()):
            assert (reply.status_code, reply.headers["content-type"]) == (503, "application/problem+json")
            assert reply.json()["code"] == "stopping" and int(reply.headers["retry-after"]) > 0
    assert service.accepted == service.answered and service.active == service.held == 0


def test_many_pictures_of_one_caller_do_not_hold_up_another(opened, jpeg):
    app = make_app(opened, ServeSettings(decoders=1))
    service = app.state.service
    done, read = [], service.read

    def slow(raw):
        time.sleep(.1)
        return np.zeros((3, opened.card["size"], opened.card["size"]), np.float32)

    service.read = lambda raw: service.in_thread(slow, raw) if raw == b"slow" else read(raw)
    with running(app) as url, ThreadPoolExecutor(2) as pool:
        def ask(name, *raws):
            reply = httpx.post(f"{url}/predict", files=[("image", raw) for raw in raws], trust_env=False, timeout=30)
            done.append(name)
            return reply.status_code
        many = pool.submit(ask, "many", *[b"slow"] * 30)
        deadline = time.monotonic() + LIMIT
        while not service.accepted and time.monotonic() < deadline: time.sleep(.01)
        assert pool.submit(ask, "one", jpeg).result() == many.result() == 200
    assert done == ["one", "many"]


# Requests

NAMES = ["a\u202egpj.exe", "\x1b[2J\x1b[31mred", "a\0b", "a\r\nX-Evil: 1", "<script>alert(1)</script>", "=1+1", "@SUM(A1)",
         "＝1+1", "\u2066\u2069", "\x9b31m", "é" * 200, "🙂", "\ufeff", "", " ", "." * 255, "..", "con", "a" * 255]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_comes_back_as_it_was_and_acts_nowhere(http, jpeg, name):
    picture = base64.b64encode(jpeg).decode()
    for data, status in ((picture, 200), ("QUJD", 422)):
        reply = http.post("/predict", json={"images": [{"data": data, "name": name}]})
        assert reply.status_code == status
        assert reply.text.isprintable(), "something acts unseen in the answer"
        said = reply.json()["predictions" if status == 200 else "images"][0]
        assert said["name"] == (name if status == 422 else name or None)
        assert "detail" not in reply.json() or reply.json()["detail"].isprintable()
        assert not any(name and name in value for value in reply.headers.values())
    form = http.post("/predict", files={"image": (name or "x", b"two books")})
    assert 400 <= form.status_code < 500 and form.text.isprintable()


PART = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
FORMS = {
    "an empty part": PART + b"\r\n--x--\r\n", "30 empty parts": (PART + b"\r\n") * 30 + b"--x--\r\n",
    "100,000 empty parts": (PART + b"\r\n") * 100_000 + b"--x--\r\n", "no end": PART + b"abc", "only an end": b"--x--\r\n",
    "a huge part": PART + bytes(21 << 20) + b"\r\n--x--\r\n", "a huge header": b"--x\r\nA: " + b"b" * (1 << 20) + b"\r\n\r\n\r\n--x--\r\n",
    "a million headers": b"--x\r\n" + b"A: b\r\n" * 1_000_000 + b"\r\n\r\n--x--\r\n", "nested forms": (PART * 1000) + b"--x--\r\n",
    "a million fields": b'--x\r\nContent-Disposition: form-data; name="quantity"\r\n\r\n1\r\n' * 100_000 + b"--x--\r\n",
    "no name": b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n", "no disposition": b"--x\r\n\r\nabc\r\n--x--\r\n",
    "a name of marks": PART.replace(b"a.jpg", "\u202egpj".encode()) + b"abc\r\n--x--\r\n", "only new lines": b"\r\n" * 1_000_000,
    "half boundaries": b"\r\n--" * 500_000, "a name that is not UTF-8": PART.replace(b"a.jpg", b"\xff\xfe") + b"abc\r\n--x--\r\n",
    "near boundaries": PART + b"\r\n--xy" * 5_000_000 + b"\r\n--x--\r\n",
    "an encoding": PART[:-2] + b"Content-Transfer-Encoding: base64\r\n\r\n%%%\r\n--x--\r\n",
    "an odd encoding": PART[:-2] + b"Content-Transfer-Encoding: \xff\r\n\r\nabc\r\n--x--\r\n",
}


@pytest.mark.parametrize("what", FORMS)
def test_a_hostile_form_is_refused(http, what):
    reply = within_limit(lambda: http.post("/predict", content=FORMS[what], headers=FORM))
    assert 400 <= reply.status_code < 500 and reply.headers["content-type"] == "application/problem+json"
    assert http.app.state.service.held == 0


BODIES = {
    "many keys": b'{"images":[{' + b",".join(b'"k%d":1' % i for i in range(1_000_000)) + b"}]}",
    "many pictures": b'{"images":[' + b",".join([b'{"data":""}'] * 1_000_000) + b"]}", "many objects": b"[" + b"{}," * 5_000_000 + b"1]",
    "a long number": b'{"images":[{"data":"","quantity":' + b"9" * 1_000_000 + b"}]}", "half a letter": b'{"images":[{"data":"","name":"\\ud800"}]}',
    "not a number": b'{"images":[{"data":"","quantity":NaN}]}', "infinity": b'{"images":[{"data":"","quantity":1e999}]}',
    "a long name": b'{"images":[{"data":"","name":"' + b"a" * 1_000_000 + b'"}]}', "spaces": b" " * 5_000_000,
    "spaces for data": b'{"images":[{"data":"' + b" " * 20_000_000 + b'"}]}', "twice": b'{"images":[{"data":"","data":""}]}',
    "a key of marks": '{"images":[{"\u202e\x9b":1}]}'.encode(), "UTF-16": '{"images":[]}'.encode("utf-16"), "a mark": b"\xef\xbb\xbf{}",
}


@pytest.mark.parametrize("what", BODIES)
def test_a_hostile_document_is_refused(http, what):
    reply = within_limit(lambda: http.post("/predict", content=BODIES[what], headers={"Content-Type": "application/json"}))
    assert 400 <= reply.status_code < 500 and reply.headers["content-type"] == "application/problem+json" and reply.text.isprintable()


HEADERS = [
    {"Content-Type": "multipart/form-data; boundary=" + "x" * 60_000}, {"Content-Type": "multipart/form-data; boundary=\"\""},
    {"Content-Type": "multipart/form-data; boundary*=utf-8''%ff"}, {"Content-Type": ";;;;"}, {"Content-Type": "\xff\xfe".encode("latin-1")},
    {"Content-Type": "image/jpeg", "Content-Length": "-1"}, {"Content-Type": "image/jpeg", "Content-Length": "9" * 40},
    {"Content-Type": "image/jpeg", "Content-Length": "²"}, {"Content-Type": "image/jpeg", "Content-Encoding": "\x9b"},
    {"Content-Type": "image/jpeg", "X-Request-Id": "\x1b[31m"}, {"Content-Type": "image/jpeg" + ";a=b" * 10_000},
]


@pytest.mark.parametrize("headers", HEADERS, ids=range(len(HEADERS)))
def test_hostile_headers_are_refused(http, headers):
    encoded = [(k, v if isinstance(v, bytes) else v.encode()) for k, v in headers.items()]
    reply = within_limit(lambda: http.post("/predict", content=b"abc", headers=encoded))
    assert 400 <= reply.status_code < 500 and reply.text.isprintable()
    assert http.post("/predict?quantity=%00%ff%e2%80%ae", content=b"abc", headers={"Content-Type": "image/png"}).status_code == 422


# Mutations

EXTREMES = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xda\xff\xd8", b"\0\0\0\1", b"\1\0\0\0"]


def mutated(rng, raw):
    "Some bytes after one to eight of: a flipped bit, a changed, removed, repeated or inserted stretch, a cut."
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 9)):
        if not raw: break
        at, length = int(rng.integers(len(raw))), int(rng.integers(1, 40))
        if rng.random() < .5: at = min(at % 200, len(raw) - 1)  # most of what a decoder believes stands at the beginning
        kind = rng.integers(8)
        if kind == 0: raw[at] ^= 1 << int(rng.integers(8))
        elif kind == 1: raw[at:at + length] = rng.bytes(length)
        elif kind == 2: del raw[at:at + length]
        elif kind == 3: raw[at:at] = raw[at:at + length] * int(rng.integers(1, 2000))
        elif kind == 4: raw[at:at + 4] = EXTREMES[rng.integers(len(EXTREMES))]
        elif kind == 5: raw[at] = int(rng.integers(256))
        elif kind == 6: raw[at:at + length] = raw[(start := int(rng.integers(len(raw)))):start + length]
        elif rng.random() < .3: del raw[at:]
    return bytes(raw)


def mended(raw):
    "A PNG with right check sums, so that more of it is believed."
    parts, at = [raw[:8]], 8
    while at + 12 <= len(raw):
        size = int.from_bytes(raw[at:at + 4], "big")
        parts.append(chunk(raw[at + 4:at + 8], raw[at + 8:at + 8 + size]) if at + 12 + size <= len(raw) else raw[at:])
        at += 12 + size
    return b"".join(parts)


@functools.cache
def seeds():
    "Pictures of every format to start from."
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    film = dict(save_all=True, append_images=[image.rotate(90)])
    jpegs = [saved(image), saved(image, exif=exif), saved(image, progressive=True), saved(image.convert("L")), saved(image.convert("CMYK"))]
    pngs = [saved(image, "PNG"), saved(image.convert("P"), "PNG", transparency=3), saved(image.convert("RGBA"), "PNG", exif=exif),
            saved(image.convert("1"), "PNG"), saved(Image.fromarray(rng.integers(0, 60_000, (9, 9), dtype=np.uint16)), "PNG"), saved(image, "PNG", **film)]
    tiffs = [saved(image, "TIFF", compression=c) for c in ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate")]
    tiffs += [saved(image.convert("1"), "TIFF", compression="group4"), saved(image.convert("F"), "TIFF"), saved(image, "TIFF", exif=exif)]
    others = [saved(image, "GIF"), saved(image, "GIF", **film), saved(image, "WEBP"), saved(image, "WEBP", lossless=True),
              saved(image, "WEBP", **film), saved(image, "BMP"), saved(image.convert("P"), "BMP"), run_lengths(20, 8), run_lengths(20, 4)]
    return jpegs, pngs, [*tiffs, *others]


@pytest.mark.parametrize("part", range(3), ids=["JPEG", "PNG", "others"])
def test_mutated_pictures_open_or_end_in_an_image_error(part):
    "800 files; the time is the processor's, as other programs may be busy."
    rng, kinds, slowest, known = np.random.default_rng(part), Counter(), 0, seeds()[part]
    for i in range((200, 200, 400)[part]):
        raw, start = mutated(rng, known[i % len(known)]), time.process_time()
        if part == 1 and i % 3: raw = mended(raw)
        kinds[kind_of(raw)] += 1  # anything but an ImageError fails the test
        slowest = max(slowest, time.process_time() - start)
    assert slowest < LIMIT
    assert kinds[None] >= 3 and len(kinds) >= 4, kinds  # the mutations reach many places


def finite(value):
    "Whether all numbers in a document are finite."
    if isinstance(value, dict): value = list(value.values())
    if isinstance(value, list): return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def test_mutated_pictures_get_an_answer_or_a_refusal(http):
    "300 pictures and 100 forms."
    rng, known, codes = np.random.default_rng(9), [raw for group in seeds() for raw in group], Counter()
    form = httpx.Request("POST", "http://a", files=[("image", ("a.jpg", known[0])), ("image", ("b.png", known[5]))], data={"quantity": ["1", "2"]})
    bodies = [(mutated(rng, known[i % len(known)]), "image/jpeg") for i in range(300)]
    bodies += [(mutated(rng, form.read()), form.headers["content-type"]) for _ in range(100)]
    for body, kind in bodies:
        reply = within_limit(lambda: http.post("/predict", content=body, headers={"Content-Type": kind}))
        assert reply.status_code in (200, *range(400, 500)), reply.text
        said = json.loads(reply.content)
        assert finite(said) and reply.text.isprintable()
        codes[said.get("code", "answered")] += 1
    assert codes["answered"] >= 20 and len(codes) >= 6, codes
