"""The real service on loopback, asked over HTTP: answers, refusals, load, broken input, stopping."""
import base64
import functools
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from binvision.check.alone import EVIDENCE, load_alone, read_evidence
from binvision.ground.core import ModelError, UsageError
from binvision.model.backends import load_model
from binvision.model.folder import read_card
from binvision.model.predict import predict
from binvision.data.images import find_images
from binvision.serve.app import make_app
from binvision.serve.limits import ServeSettings
from binvision.serve.run import running

PROGRAM = [sys.executable, "-c", "from binvision.cli.main import main; main()", "serve"]
TOKEN = "a-token-for-these-tests"
JSON, FORM = {"Content-Type": "application/json"}, {"Content-Type": "multipart/form-data; boundary=x"}
JPEG, PNG = {"Content-Type": "image/jpeg"}, {"Content-Type": "image/png"}


def client(url, **kwargs): return httpx.Client(base_url=url, trust_env=False, verify=False, timeout=60, **kwargs)


def saved(image, format="JPEG", **how):
    buffer = io.BytesIO()
    image.save(buffer, format, **how)
    return buffer.getvalue()


def encoded(raw): return base64.b64encode(raw).decode()


def problem(reply, status, code):
    "The body of a refusal, after checking that it is one."
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/problem+json"), reply.text
    body = reply.json()
    assert (body["code"], body["status"], body["request_id"]) == (code, status, reply.headers["x-request-id"])
    assert body["detail"]
    assert "Traceback" not in reply.text and 'File "' not in reply.text
    return body


def close(answer, prediction):
    "Whether an answer is the prediction of its picture; a batch may differ from a single picture in the last digits."
    said, wanted = list(answer["probabilities"].values()), list(prediction.probabilities.values())
    return answer["count"] == prediction.count and np.allclose(said, wanted, atol=1e-4)


@pytest.fixture(scope="session")
def model():
    "The small trained model of the notebooks."
    return Path(__file__).resolve().parent.parent / "nbs/models/small"


@pytest.fixture(scope="module")
def opened(model): return load_model(model)


@pytest.fixture(scope="module")
def bins(data): return {f"{id}.jpg": path.read_bytes() for id, path in list(find_images(data).items())[:16]}


@pytest.fixture(scope="module")
def jpeg(bins): return bins["00001.jpg"]


@pytest.fixture(scope="module")
def expected(opened, bins): return {name: predict(opened, raw) for name, raw in bins.items()}


@pytest.fixture(scope="module")
def url(opened):
    with running(make_app(opened)) as url: yield url


@pytest.fixture
def http(url):
    with client(url) as http: yield http


# Answers

def test_all_ways_to_ask_get_the_prediction_of_the_picture(http, jpeg, expected):
    ways = [dict(files={"image": ("a.jpg", jpeg)}), dict(json={"images": [{"data": encoded(jpeg)}]}),
            dict(content=jpeg, headers=JPEG), dict(content=jpeg, headers=PNG)]
    for path in ("/predict", "/invocations"):
        for way in ways:
            reply = http.post(path, **way)
            assert reply.status_code == 200, reply.text
            [answer] = reply.json()["predictions"]
            assert close(answer, expected["00001.jpg"]) and answer["agreement"] is None
            probabilities = {int(count): p for count, p in answer["probabilities"].items()}
            assert abs(sum(probabilities.values()) - 1) < 1e-4 and answer["confidence"] == max(probabilities.values())
            assert answer["mean"] == pytest.approx(sum(count * p for count, p in probabilities.items()), abs=1e-4)


def test_many_pictures_come_back_in_order_with_their_names_and_records(http, bins, expected):
    names, quantities = list(bins), ["", "1", "2", "3"] * 4
    form = http.post("/predict", files=[("image", (name, bins[name])) for name in names], data={"quantity": quantities})
    recorded = [int(q) if q else None for q in quantities]
    images = [{"data": encoded(bins[name]), "name": name, "quantity": q} for name, q in zip(names, recorded)]
    as_json = http.post("/predict", json={"images": images})
    for reply in (form, as_json):
        assert reply.status_code == 200, reply.text
        for name, quantity, answer in zip(names, quantities, reply.json()["predictions"], strict=True):
            assert answer["name"] == name and close(answer, expected[name])
            assert (answer["agreement"] is None) == (quantity == "")
            if quantity: assert answer["agreement"]["quantity"] == int(quantity)


def test_a_quantity_with_a_bare_picture_and_one_that_the_model_cannot_count(http, jpeg, expected):
    said = http.post("/predict?quantity=99", content=jpeg, headers=JPEG).json()["predictions"][0]
    assert said["agreement"] == {"quantity": 99, "probability": None, "verdict": "unsure", "p_value": None, "reason": "the model counts 1 to 5 items"}
    top = expected["00001.jpg"].count
    said = http.post(f"/predict?quantity={top}", content=jpeg, headers=JPEG).json()["predictions"][0]
    assert said["agreement"]["probability"] == pytest.approx(said["confidence"])
    assert said["agreement"]["verdict"] == "unsure" and "binvision evidence MODEL DATA MANIFEST" in said["agreement"]["reason"]
    assert said["plausible"] is None


def with_evidence(folder, least=(.05, .3, .3, .2, .1)):
    "A model folder whose evidence is made up: right records are never odder than 0.05, wrong ones never less than 0.02."
    odd = np.concatenate([np.linspace(.001, .05, 99), np.linspace(.02, 1, 99)])
    arrays = {"counts": np.arange(1., 6), "alone_odds": .01 * (1 - np.eye(5)), "alone_groups": np.zeros(5),
              "alone_group": np.repeat([0., -1], 99), "alone_odd": odd}
    card = json.loads((folder / "card.json").read_text())
    save_file(arrays, folder / EVIDENCE, {"network": card["files"]["model.onnx"]})
    (folder / "card.json").write_text(json.dumps(card | {"plausible": {"level": .9, "least": list(least)}}))
    return folder


def test_a_model_with_evidence_says_what_is_plausible_and_whether_the_record_agrees(model, bins, tmp_path):
    folder = with_evidence(Path(shutil.copytree(model, tmp_path / "m")))
    said = {name: predict(folder, raw) for name, raw in bins.items()}
    alone, seen = load_alone(folder), Counter()
    images = [{"data": encoded(raw), "name": name, "quantity": q} for name, raw in bins.items() for q in (1, said[name].count)]
    with running(make_app(folder, ServeSettings(false_alarms=.03, missed=.05))) as url, client(url) as http:
        answers = http.post("/predict", json={"images": images}).json()["predictions"]
        metrics = http.get("/metrics").text
    for answer in answers:
        wanted, told = said[answer["name"]], answer["agreement"]
        assert answer["plausible"] == {"low": wanted.low, "high": wanted.high, "level": .9}
        right, wrong = alone.compare(np.array(list(answer["probabilities"].values())), told["quantity"])
        assert told["p_value"] == pytest.approx(right, abs=1e-6)
        assert told["verdict"] == ("disagrees" if right <= .03 else "agrees" if wrong <= .05 else "unsure")
        assert (told["reason"] is None) == (told["verdict"] != "unsure")
        seen[told["verdict"]] += 1
    assert seen["disagrees"] and seen["agrees"]
    for verdict, n in seen.items(): assert f'binvision_agreement_total{{verdict="{verdict}"}} {n}.0' in metrics


@pytest.mark.parametrize("raw", [b"", b"no", b"\xff" * 500, "another network", "other counts", "older"])
def test_evidence_that_cannot_be_used_stops_the_start(model, tmp_path, raw):
    folder = with_evidence(Path(shutil.copytree(model, tmp_path / "m")))
    arrays, network = read_evidence(folder)[1], read_card(folder)["files"]["model.onnx"]
    if isinstance(raw, bytes): (folder / EVIDENCE).write_bytes(raw)
    elif raw == "another network": save_file(arrays, folder / EVIDENCE, {"network": "0" * 64})
    elif raw == "other counts": save_file(arrays | {"counts": np.arange(4.)}, folder / EVIDENCE, {"network": network})
    else: save_file({"counts": arrays["counts"]}, folder / EVIDENCE, {"network": network})
    with pytest.raises(ModelError, match="evidence.safetensors: .*(cannot be used|another network)"): make_app(folder)


@pytest.mark.parametrize("name", ["FALSE_ALARMS", "MISSED"])
def test_the_shares_of_wrong_verdicts_come_from_the_environment(monkeypatch, name):
    assert (ServeSettings().false_alarms, ServeSettings().missed) == (.02, .1)
    monkeypatch.setenv(f"BINVISION_{name}", ".05")
    assert getattr(ServeSettings(), name.lower()) == .05
    for wrong in ("0", "1", "-1", "nan", "many"):
        monkeypatch.setenv(f"BINVISION_{name}", wrong)
        with pytest.raises(UsageError, match=f"BINVISION_{name} {wrong}: "): ServeSettings()


def test_the_documented_example_works_and_the_documentation_needs_no_other_server(http):
    docs = http.get("/openapi.json").json()
    for path in ("/predict", "/invocations"):
        post = docs["paths"][path]["post"]
        example = post["requestBody"]["content"]["application/json"]["example"]
        assert http.post(path, json=example).status_code == 200
        assert {"200", "400", "401", "413", "415", "422", "503"} <= set(post["responses"])
    page = http.get("/docs")
    assert page.status_code == 200 and "http" not in page.text.replace("http-equiv", "")
    for name in ("swagger-ui.css", "swagger-ui-bundle.js"):
        assert f"docs/{name}" in page.text and http.get(f"/docs/{name}").status_code == 200
    problem(http.get("/docs/..%2f__init__.py"), 404, "no-such-path")


def test_health_model_and_metrics(http, opened):
    for path in ("/healthz", "/readyz", "/ping"):
        assert http.get(path).status_code == http.head(path).status_code == 200
    said = http.get("/model").json()
    assert (said["card"], said["backend"], said["why"]) == (opened.card, opened.backend, opened.why)
    assert said["id"].startswith(f"{opened.card['arch']}-")
    for path in ("/a", "/b/c", "/predict.php"): problem(http.get(path), 404, "no-such-path")
    assert http.get("/predict").headers["allow"] == "POST"
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'path="other",status="404"' in metrics.text and "predict.php" not in metrics.text
    assert "process_resident_memory_bytes" in metrics.text


# Refusals

def png_of(width, height, depth, colour):
    "A PNG of zeros, by hand."
    def number(n): return struct.pack(">I", n)
    def chunk(kind, data): return number(len(data)) + kind + data + number(zlib.crc32(kind + data))
    rows = zlib.compress(bytes(10_000))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@functools.cache
def bad_pictures():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    jpeg, png, progressive = saved(image), saved(image, "PNG"), saved(image, progressive=True)
    png16 = saved(Image.fromarray(np.full((8, 8), 300, np.uint16)), "PNG")
    return {
        "empty": (b"", 400, "empty"), "half a JPEG": (jpeg[:len(jpeg) // 2], 422, "truncated"),
        "half a PNG": (png[:len(png) // 2], 422, "truncated"), "a JPEG's head": (jpeg[:4], 422, "not-a-picture"),
        "text": (b"two books", 422, "not-a-picture"), "a page": (b"<html>", 422, "not-a-picture"),
        "a GIF": (saved(image, "GIF"), 422, "not-a-picture"), "a WebP": (saved(image, "WEBP"), 422, "not-a-picture"),
        "a TIFF": (saved(image, "TIFF"), 422, "not-a-picture"), "zeros": (bytes(5000), 422, "not-a-picture"),
        "animated": (saved(image, "PNG", save_all=True, append_images=[image.rotate(90)]), 422, "animated"),
        "CMYK": (saved(image.convert("CMYK")), 422, "cmyk"), "16-bit grey": (png16, 422, "16-bit"),
        "16-bit RGB": (png_of(8, 8, 16, 2), 422, "16-bit"),
        "a bomb": (saved(Image.new("1", (10_000, 6000)), "PNG"), 413, "too-many-pixels"),
        "a bomb that lies": (png_of(2**31 - 1, 2**31 - 1, 8, 2), 413, "too-many-pixels"),
        "too many scans": (progressive[:-2] + b"\xff\xda\0\x08\1\1\0\1\x3f\x10" * 200 + progressive[-2:], 422, "costly"),
    }


@pytest.mark.parametrize("what", bad_pictures())
def test_a_bad_picture_is_refused_by_name_however_it_is_sent(http, what):
    raw, status, code = bad_pictures()[what]
    named = problem(http.post("/predict", files={"image": ("bin 7.jpg", raw)}), status, code)
    assert named["detail"].startswith("bin 7.jpg: ")
    problem(http.post("/predict", json={"images": [{"data": encoded(raw)}]}), status, code)
    problem(http.post("/invocations", content=raw, headers=JPEG), status, code)


PART = b"--x\r\nContent-Disposition: form-data; "  # how a part of a form begins
BAD_BODIES = {
    "nothing": (dict(content=b""), 400, "empty"), "no content type": (dict(content=b"x"), 415, "content-type"),
    "text": (dict(content=b"x", headers={"Content-Type": "text/plain"}), 415, "content-type"),
    "a urlencoded form": (dict(data={"image": "bin.jpg"}), 415, "content-type"),
    "compressed": (dict(content=b"x", headers=JSON | {"Content-Encoding": "gzip"}), 415, "content-encoding"),
    "not JSON": (dict(content=b"{]", headers=JSON), 400, "not-json"),
    "not UTF-8": (dict(content=b'"\xff"', headers=JSON), 400, "not-json"),
    "deep JSON": (dict(content=b"[" * 1_000_000, headers=JSON), 413, "too-many-parts"),
    "deep and complete": (dict(content=b'{"a":' * 5000 + b"1" + b"}" * 5000, headers=JSON), 400, "not-json"),
    "a list": (dict(json=[1]), 422, "wrong-shape"), "no images": (dict(json={}), 422, "wrong-shape"),
    "none": (dict(json={"images": []}), 422, "wrong-shape"),
    "a number": (dict(json={"images": [{"data": 5}]}), 422, "wrong-shape"),
    "an address": (dict(json={"images": [{"data": "", "url": "http://localhost/a.jpg"}]}), 422, "wrong-shape"),
    "a path": (dict(json={"images": [{"path": "/etc/passwd"}]}), 422, "wrong-shape"),
    "a path as data": (dict(json={"images": [{"data": "/etc/hostname!"}]}), 400, "not-base64"),
    "not base64": (dict(json={"images": [{"data": "%%%"}]}), 400, "not-base64"),
    "not ASCII": (dict(json={"images": [{"data": "é"}]}), 400, "not-base64"),
    "half base64": (dict(json={"images": [{"data": "QUJDR"}]}), 400, "not-base64"),
    "a data address": (dict(json={"images": [{"data": "data:image/png;base64,QUJD"}]}), 400, "not-base64"),
    "a negative record": (dict(json={"images": [{"data": "", "quantity": -1}]}), 422, "wrong-shape"),
    "a huge record": (dict(json={"images": [{"data": "", "quantity": 10**30}]}), 422, "wrong-shape"),
    "a long name": (dict(json={"images": [{"data": "", "name": "a" * 256}]}), 422, "wrong-shape"),
    "33 in JSON": (dict(json={"images": [{"data": ""}] * 33}), 413, "too-many-pictures"),
    "33 in a form": (dict(files=[("image", ("a", b"x"))] * 33), 413, "too-many-pictures"),
    "no boundary": (dict(content=b"x", headers={"Content-Type": "multipart/form-data"}), 400, "not-a-form"),
    "not a form": (dict(content=b"x", headers=FORM), 400, "not-a-form"),
    "half a form": (dict(content=PART + b'name="image"; filename="a"\r\n\r\nabc', headers=FORM), 400, "not-a-form"),
    "many headers": (dict(content=b"--x\r\n" + b"A: b\r\n" * 1000, headers=FORM), 400, "not-a-form"),
    "an unknown field": (dict(files={"image": b"x"}, data={"url": "http://localhost/"}), 422, "wrong-shape"),
    "only a record": (dict(content=PART + b'name="quantity"\r\n\r\n3\r\n--x--\r\n', headers=FORM), 422, "no-picture"),
    "two records for one": (dict(files={"image": b"x"}, data={"quantity": ["1", "2"]}), 422, "quantity"),
    "a word as record": (dict(files={"image": b"x"}, data={"quantity": "two"}), 422, "quantity"),
}


@pytest.mark.parametrize("what", BAD_BODIES)
def test_a_bad_body_is_refused(http, what):
    request, status, code = BAD_BODIES[what]
    problem(http.post("/predict", **request), status, code)


def test_of_several_pictures_all_bad_ones_are_named(http, jpeg):
    pictures = {"a.jpg": jpeg, "b.jpg": jpeg[:900], "c.jpg": b"no"}
    reply = http.post("/predict", files=[("image", picture) for picture in pictures.items()])
    body = problem(reply, 422, "truncated")
    named = [(i["image"], i["name"], i["code"]) for i in body["images"]]
    assert named == [(1, "b.jpg", "truncated"), (2, "c.jpg", "not-a-picture")]


def test_limits_hold_for_bytes_and_for_bodies_without_a_length(opened, jpeg):
    limits = ServeSettings(max_bytes=len(jpeg) - 1, max_request=3 * len(jpeg))
    with running(make_app(opened, limits)) as url, client(url) as http:
        problem(http.post("/predict", files={"image": jpeg}), 413, "too-many-bytes")
        problem(http.post("/predict", json={"images": [{"data": encoded(jpeg)}]}), 413, "too-many-bytes")
        problem(http.post("/predict", content=b"x" * (3 * len(jpeg) + 1), headers=JSON), 413, "too-many-bytes")
        problem(http.post("/predict", content=iter([b"x" * len(jpeg)] * 4), headers=JSON), 413, "too-many-bytes")
        assert "binvision_held_bytes 0.0" in http.get("/metrics").text


def test_no_file_is_opened_or_written_for_a_request(http, jpeg):
    "Python's audit events show every file and every connection that is opened, by whatever thread."
    http.post("/predict", files={"image": jpeg})  # what is loaded once is loaded now
    opened, on, caller = [], True, threading.current_thread()
    watched = ("open", "socket.connect", "os.rename", "os.remove", "os.mkdir")

    def note(event, args):
        if on and event in watched and threading.current_thread() is not caller: opened.append((event, args))

    sys.addaudithook(note)
    names = ["../../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/a.jpg",
             "a\0b.jpg", "C:\\a.jpg", "=1+1"]
    for name in names:
        assert http.post("/predict", files={"image": (name, jpeg)}).status_code in (200, 400)
        reply = http.post("/predict", json={"images": [{"data": encoded(jpeg), "name": name}]})
        assert reply.json()["predictions"][0]["name"] == name
        http.post("/predict", json={"images": [{"data": name}]})
    http.post("/predict", files={"image": ("large.jpg", jpeg + bytes(3 << 20))})
    on = False
    assert opened == []


def test_one_error_in_the_service_is_a_plain_500_and_a_line_in_the_log(opened, jpeg, caplog):
    app = make_app(opened)
    app.state.service.batcher._run = lambda batch, others: 1 / 0
    with running(app) as url, client(url) as http:
        body = problem(http.post("/predict", files={"image": jpeg}, headers={"X-Request-Id": "abc-1"}), 500, "failed")
        assert body["request_id"] == "abc-1" and "division" not in json.dumps(body)
        assert http.get("/readyz").status_code == 200
    [record] = [r for r in caplog.records if r.message == "failed"]
    assert record.exc_info and record.fields == {"request_id": "abc-1"}


# Who may ask

def test_a_token_is_asked_for_everywhere_but_where_nothing_is_told(opened, jpeg):
    with running(make_app(opened, ServeSettings(token=TOKEN))) as url, client(url) as http:
        right = {"Authorization": f"Bearer {TOKEN}"}
        locked = [("POST", "/predict"), ("POST", "/invocations"), ("GET", "/model"), ("GET", "/metrics"), ("GET", "/x")]
        for wrong in (None, "Bearer wrong", TOKEN, f"Bearer {TOKEN}x", "Bearer \xff"):
            headers = {"Authorization": wrong.encode("latin-1")} if wrong else {}
            for method, path in locked:
                reply = http.request(method, path, headers=headers)
                problem(reply, 401, "token")
                assert reply.headers["www-authenticate"] == "Bearer"
        for path in ("/healthz", "/readyz", "/ping", "/", "/docs", "/openapi.json"):
            assert http.get(path).status_code == 200
        assert http.post("/predict", files={"image": jpeg}, headers=right).status_code == 200
        assert http.get("/metrics", headers=right).status_code == 200


def test_other_sites_may_call_only_if_allowed(opened, url, jpeg):
    friend, picture = {"Origin": "https://audit.example"}, {"image": jpeg}
    ask = friend | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with client(url) as http:
        assert "access-control-allow-origin" not in http.post("/predict", files=picture, headers=friend).headers
        assert http.options("/predict", headers=ask).status_code == 405
    app = make_app(opened, ServeSettings(cors=("https://audit.example",), token=TOKEN))
    with running(app) as url, client(url) as http:
        allowed = http.options("/predict", headers=ask)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://audit.example"
        refused = http.post("/predict", files=picture, headers=friend)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://audit.example"
        other = http.get("/healthz", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


# Load

def test_answers_are_not_mixed_up_among_many_callers(url, bins, expected):
    names = list(bins) * 12

    def ask(name):
        with client(url) as http:
            reply = http.post("/predict", files={"image": (name, bins[name])})
            return name, reply.status_code, reply.json()

    with ThreadPoolExecutor(24) as pool: replies = list(pool.map(ask, names))
    assert Counter(status for _, status, _ in replies) == {200: len(names)}
    for name, _, body in replies:
        assert body["predictions"][0]["name"] == name and close(body["predictions"][0], expected[name])
    with client(url) as http: lines = http.get("/metrics").text.splitlines()
    def metric(name): return float(next(line for line in lines if line.startswith(name)).split()[-1])
    singles, batches = metric('binvision_batch_images_bucket{le="1.0"}'), metric("binvision_batch_images_count")
    assert singles < batches, "no two pictures ever went together"


def slow(opened, seconds):
    "An application whose network takes some seconds a batch."
    def run(batch, others):
        time.sleep(seconds)
        return opened.logits(batch)
    def app(**limits):
        made = make_app(opened, ServeSettings(**limits))
        made.state.service.batcher._run = run
        return made
    return app


def test_above_capacity_callers_hear_at_once_when_to_come_again(opened, jpeg):
    app = slow(opened, 1)(queue=4, batch=2, max_images=4)

    def ask(_):
        with client(url) as http:
            start = time.perf_counter()
            reply = http.post("/predict", files={"image": jpeg})
            return reply, time.perf_counter() - start

    with running(app) as url, ThreadPoolExecutor(17) as pool:
        waiting = [pool.submit(ask, i) for i in range(16)]
        time.sleep(.6)
        with client(url) as http:
            start = time.perf_counter()
            assert http.get("/readyz").status_code == http.get("/ping").status_code == 200
            assert time.perf_counter() - start < .5, "health checks wait for the network"
            problem(http.post("/predict", files=[("image", jpeg)] * 4), 503, "busy")
        replies = [w.result() for w in waiting]
        assert Counter(reply.status_code for reply, _ in replies) == {200: 4, 503: 12}
        for reply, seconds in replies:
            if reply.status_code == 503:
                problem(reply, 503, "busy")
                assert 1 <= int(reply.headers["retry-after"]) <= 60 and seconds < .9
        assert app.state.service.batcher.pending == app.state.service.held == 0
        assert ask(0)[0].status_code == 200


def raw_request(url, head, body=b""):
    "A socket on which a request has been begun."
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=20)
    sock.sendall(head.encode() + b"\r\n\r\n" + body)
    return sock


def test_slow_and_vanishing_callers_hold_nothing(opened, jpeg):
    app = make_app(opened, ServeSettings(timeout=.5, max_request=1 << 20, memory=1 << 20))
    head = "POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000000"
    with running(app) as url, client(url) as http:
        gone = raw_request(url, head, bytes(1000))
        gone.close()
        full = raw_request(url, head, bytes(990_000))
        deadline = time.monotonic() + 5
        while app.state.service.held < 990_000 and time.monotonic() < deadline: time.sleep(.01)
        problem(http.post("/predict", content=bytes(500_000), headers=JSON), 503, "busy")
        assert full.recv(100).startswith(b"HTTP/1.1 408")
        full.close()
        deadline = time.monotonic() + 5
        while app.state.service.held and time.monotonic() < deadline: time.sleep(.01)
        assert app.state.service.held == 0
        assert http.post("/predict", files={"image": jpeg}).status_code == 200


# Broken input in bulk

EXTREMES = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xda\xff\xd8"]


def mutated(rng, raw):
    "Some bytes after one to eight of: a flipped bit, a changed, removed, repeated or inserted stretch, a cut."
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 9)):
        if not raw: break
        at, length = int(rng.integers(len(raw))), int(rng.integers(1, 40))
        if rng.random() < .5: at %= 700  # most of what a decoder believes stands at the beginning
        at = min(at, len(raw) - 1)
        kind = rng.integers(6)
        if kind == 0: raw[at] ^= 1 << int(rng.integers(8))
        elif kind == 1: raw[at:at + length] = rng.bytes(length)
        elif kind == 2: del raw[at:at + length]
        elif kind == 3: raw[at:at] = raw[at:at + length]
        elif kind == 4: raw[at:at + 4] = EXTREMES[rng.integers(4)]
        elif rng.random() < .3: del raw[at:]
    return bytes(raw)


def seeds(jpeg):
    "Bodies to start from, each with its content type."
    image = Image.open(io.BytesIO(jpeg)).resize((90, 60))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    film = saved(image, "PNG", save_all=True, append_images=[image.rotate(90)])
    pictures = [saved(image), saved(image, exif=exif), saved(image, progressive=True), saved(image.convert("L")),
                saved(image.convert("CMYK")), saved(image, "PNG"), saved(image.convert("P"), "PNG", transparency=3),
                saved(image.convert("RGBA"), "PNG"), saved(image.convert("1"), "PNG"), film]
    files = [("image", ("a.jpg", pictures[0])), ("image", ("b.png", pictures[5]))]
    form = httpx.Request("POST", "http://a", files=files, data={"quantity": ["1", "2"]})
    form.read()
    small = {"data": encoded(saved(image.resize((16, 16)), "PNG")), "name": "a.png", "quantity": 3}
    document = json.dumps({"images": [small] * 2}).encode()
    return [*((p, "image/jpeg") for p in pictures), *[(form.content, form.headers["content-type"])] * 4,
            *[(document, "application/json")] * 4]


def test_a_thousand_mutated_bodies_get_only_2xx_and_4xx(opened, jpeg, expected):
    rng, known = np.random.default_rng(0), seeds(jpeg)
    bodies = [(mutated(rng, raw), kind) for raw, kind in (known[i % len(known)] for i in range(1000))]
    with running(make_app(opened)) as url, client(url) as http:
        def ask(body): return http.post("/predict", content=body[0], headers={"Content-Type": body[1]})
        with ThreadPoolExecutor(4) as pool: replies = list(pool.map(ask, bodies))
        fine = (200, *range(400, 500))
        failed = [(i, r.status_code) for i, r in enumerate(replies) if r.status_code not in fine]
        assert not failed
        codes = Counter(r.json()["code"] if r.status_code != 200 else "answered" for r in replies)
        assert len(codes) >= 8 and codes["answered"] >= 50, codes  # the mutations reach many places
        assert close(http.post("/predict", files={"image": jpeg}).json()["predictions"][0], expected["00001.jpg"])
        assert "Traceback" not in "".join(r.text for r in replies)


KEYS = ["images", "data", "name", "quantity", "url"]
texts = st.text(max_size=20) | st.sampled_from(["QUJD", "", "data", "images"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12)
pictures = st.fixed_dictionaries({}, optional={"data": values, "name": values, "quantity": values})
documents = values | st.fixed_dictionaries({"images": st.lists(pictures, max_size=3)})


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(document=documents)
def test_any_json_document_gets_an_answer_or_a_refusal(http, document):
    reply = http.post("/predict", content=json.dumps(document).encode(), headers=JSON)
    assert 400 <= reply.status_code < 500 and reply.json()["detail"]


# The command

@pytest.fixture
def started(model, tmp_path):
    "Start the command on a free port: the process, its address and its log file; it is ended afterwards."
    processes = []

    def start(*args, env=None, model=model):
        log = tmp_path / f"log{len(processes)}"
        with log.open("wb") as out:
            command = [*PROGRAM, *([str(model)] if model else []), "--port", "0", *args]
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | (env or {}))
        processes.append(process)
        deadline = time.monotonic() + 60
        while not (lines := log.read_text().splitlines()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(.05)
        assert lines and process.poll() is None, log.read_text()
        return process, json.loads(lines[0])["url"], log

    yield start
    for process in processes:
        if process.poll() is None: process.kill()
        process.wait()


def test_sigterm_under_load_answers_all_that_was_accepted(started, bins, expected):
    process, url, log = started("--batch", "4")
    names, outcomes, stop = list(bins), [], threading.Event()

    def ask(i):
        with client(url) as http:
            while not stop.is_set():
                name = names[(len(outcomes) + i) % len(names)]
                try: reply = http.post("/predict", files={"image": (name, bins[name])})
                except httpx.TransportError as e:
                    outcomes.append(type(e).__name__)
                    return
                outcomes.append(reply.status_code)
                assert reply.status_code == 200 and close(reply.json()["predictions"][0], expected[name])

    with ThreadPoolExecutor(12) as pool:
        callers = [pool.submit(ask, i) for i in range(12)]
        deadline = time.monotonic() + 30
        while len(outcomes) < 100 and time.monotonic() < deadline: time.sleep(.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        stop.set()
        for caller in callers: caller.result()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1]["event"] == "stopped" and lines[-1]["accepted"] == lines[-1]["answered"]
    assert outcomes.count(200) == lines[-1]["accepted"] >= 100, Counter(outcomes)


def test_the_log_is_json_without_anything_of_the_callers(started, jpeg, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    process, url, log = started("--token-file", str(tmp_path / "token"))
    known = {"Authorization": f"Bearer {TOKEN}"}
    with client(url) as http:
        http.post("/predict?quantity=7", files={"image": ("secret-name.jpg", jpeg)}, headers=known)
        http.post("/predict", files={"image": ("secret-name.jpg", b"secret-bytes")}, headers=known)
        http.post("/predict", content=b"--x\r\nsecret\x00header", headers=FORM | known)
        http.get("/secret-path", headers={"X-Request-Id": "bad id\t{}"})
        http.get("/", headers={"X-Request-Id": "mine.7"})
    process.terminate()
    assert process.wait(20) == 0
    text = log.read_text()
    assert "secret" not in text and TOKEN not in text and encoded(jpeg)[:40] not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["event"] for line in lines] == ["listening", *["request"] * 5, "stopped"]
    asked = [(line["path"], line["status"]) for line in lines[1:-1]]
    assert asked == [("/predict", 200), ("/predict", 422), ("/predict", 400), ("other", 401), ("/", 200)]
    assert lines[2]["code"] == "not-a-picture" and lines[5]["request_id"] == "mine.7"
    assert {"ms", "images", "bytes", "time", "level"} <= set(lines[1])


def test_options_come_from_the_environment_too(started, model, jpeg):
    env = {"MODEL": str(model), "MAX_IMAGES": "1", "TOKEN": TOKEN, "BACKEND": "fp32"}
    _, url, _ = started(env={f"BINVISION_{name}": value for name, value in env.items()}, model=None)
    with client(url, headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        assert http.get("/model").json()["limits"]["max_images"] == 1 and http.get("/model").json()["backend"] == "fp32"
        problem(http.post("/predict", files=[("image", jpeg)] * 2), 413, "too-many-pictures")


def test_wrong_arguments_end_the_command_with_one_message(model, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            ([str(model), "--port", port], {}, "cannot listen"),
            ([str(model), "--queue", "2"], {}, "could never be accepted"),
            ([str(model)], {"BINVISION_TOKEN": ""}, "16 characters"),
            ([str(model), "--token-file", str(tmp_path / "none")], {}, "No such file"),
            ([], {}, "/opt/ml/model: not a model folder"),
            ([str(model)], {"BINVISION_BATCH": "many"}, "BINVISION_BATCH many: not a whole number"),
        ]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        runs = [(subprocess.Popen([*PROGRAM, *args], env=os.environ | env, **how), says) for args, env, says in cases]
        for process, says in runs:
            _, err = process.communicate(timeout=60)
            assert process.returncode == 2 and says in err and "Traceback" not in err, err


def test_the_service_knows_no_torch():
    heavy = ("torch", "fastai", "timm", "pandas", "matplotlib")
    code = f"import sys, binvision.serve.run; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
