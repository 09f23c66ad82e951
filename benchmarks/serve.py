"""The service under load: 2, 16 and 64 callers, each sending the next picture as soon as the last is answered.

    python benchmarks/serve.py [--model FOLDER] [--images FOLDER] [--seconds 30] [--clients 2 16 64] [--out FILE]

The service is the command `binvision serve` in a process of its own, the callers are threads of this one, on the same
machine: what they cost is part of the result. Every answer is compared with the prediction of its picture by itself.
Before and after, the offline `predict` runs over the same files with the same model, backend and threads; the ratio is
the service's pictures per second divided by the mean of the two. Without --images full-size synthetic bins are drawn;
without --model a network with random weights is written, as speed does not depend on them.
"""
import argparse
import http.client
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; default: --arch with random weights")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="side of the square input, pixels")
    parser.add_argument("--images", type=Path, help="folder of JPEG files; default: synthetic bins at full size")
    parser.add_argument("--n", type=int, default=64, help="different pictures")
    parser.add_argument("--backend", help="fp32, int8 or cuda; default: the fastest available")
    parser.add_argument("--threads", type=int, default=2, help="of the network, online and offline")
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--seconds", type=float, default=30, help="of each load, and of each offline run")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args()


def prepare(args, home):
    "The model's folder and the pictures."
    from binvision.ground.pictures import list_pictures
    from binvision.synthetic.synthesize import synthesize

    data = None if args.images and args.model else synthesize(home / "bins", n=max(args.n, 64), seed=0)
    pictures = list_pictures(args.images or data / "bin-images")[:args.n]
    if args.model: return args.model, pictures
    from binvision.train.loaders import bin_dataloaders
    from binvision.train.learner import bin_learner
    from binvision.train.publish import write_model
    from binvision.data.catalogue import catalogue
    from binvision.split.split import split
    from binvision.split.manifest import write_manifest

    write_manifest(split(catalogue(data)), home / "manifest.csv")
    dls = bin_dataloaders(data, home / "manifest.csv", size=args.size, workers=0)
    return write_model(bin_learner(dls, args.arch, weights=None, path=home), home / "model"), pictures


def offline(model, pictures, seconds):
    "Pictures per second of `predict` over the files, again and again."
    from binvision.model.predict import predict

    predict(model, pictures[:16])
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds: done += len(predict(model, pictures))
    return done / (time.perf_counter() - start)


class Service:
    "The command in a process of its own."

    def __init__(self, model, backend, threads):
        program = [sys.executable, "-c", "from binvision.cli.main import main; main()"]
        options = ["--port", "0", "--threads", str(threads), *(["--backend", backend] if backend else [])]
        command = [*program, "serve", str(model), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = json.loads(self.process.stdout.readline())["url"]
        threading.Thread(target=lambda: [None for _ in self.process.stdout], daemon=True).start()

    def memory(self):
        "Resident memory, MB, as its own metrics say."
        with urllib.request.urlopen(f"{self.url}/metrics") as reply: text = reply.read().decode()
        return float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)[1]) / 1e6

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


class Callers:
    "Threads that ask one picture after another, and what they got."

    def __init__(self, url, bodies, expected):
        self.host, self.bodies, self.expected = url.removeprefix("http://"), bodies, expected
        self.times, self.outcomes, self.largest, self.lock = [], Counter(), 0., threading.Lock()

    def judge(self, i, status, raw):
        "What to call an answer, and how far its probabilities are from the picture's own."
        if status != 200: return f"HTTP {status}", 0.
        said = json.loads(raw)["predictions"][0]
        own = self.expected[i].probabilities
        off = max(abs(said["probabilities"][str(c)] - p) for c, p in own.items())
        right = off < 1e-3 and own[said["count"]] > max(own.values()) - 1e-3
        return ("right" if right else "another picture's"), off

    def one(self, number, until):
        connection, i = http.client.HTTPConnection(self.host, timeout=60), number
        while time.perf_counter() < until:
            i = (i + 7) % len(self.bodies)
            start = time.perf_counter()
            try:
                connection.request("POST", "/predict", self.bodies[i], {"Content-Type": "image/jpeg"})
                reply = connection.getresponse()
                raw, status = reply.read(), reply.status
                took = time.perf_counter() - start
                outcome, off = self.judge(i, status, raw)
            except (OSError, http.client.HTTPException) as e:
                connection.close()
                took, outcome, off = time.perf_counter() - start, type(e).__name__, 0.
            with self.lock:
                self.times.append(took)
                self.outcomes[outcome] += 1
                self.largest = max(self.largest, off)
        connection.close()

    def run(self, n, seconds):
        start = time.perf_counter()
        threads = [threading.Thread(target=self.one, args=(i, start + seconds)) for i in range(n)]
        for t in threads: t.start()
        for t in threads: t.join()
        return time.perf_counter() - start


def load(service, bodies, expected, n, seconds):
    "One row of results."
    import numpy as np

    Callers(service.url, bodies, expected).run(n, min(3, seconds))  # warm up
    before, callers = service.memory(), Callers(service.url, bodies, expected)
    took = callers.run(n, seconds)
    p50, p95, p99 = (float(x) for x in np.percentile(callers.times, [50, 95, 99]) * 1000)
    answered, right, refused = len(callers.times), callers.outcomes["right"], callers.outcomes["HTTP 503"]
    return {"clients": n, "seconds": took, "answers": answered, "per_second": right / took,
            "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "refused_503": refused, "errors": answered - right - refused,
            "largest_difference": callers.largest, "memory_start_mb": before, "memory_end_mb": service.memory(),
            "outcomes": dict(callers.outcomes)}


def processor():
    "The processor's name."
    try: return re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError): return platform.processor() or platform.machine()


def main():
    args = arguments()
    from binvision.model.predict import load_model, predict

    with tempfile.TemporaryDirectory() as home:
        folder, pictures = prepare(args, Path(home))
        model, bodies = load_model(folder, args.backend, args.threads), [p.read_bytes() for p in pictures]
        expected = [predict(model, p) for p in pictures]
        rates = [offline(model, pictures, args.seconds)]
        service = Service(folder, args.backend, args.threads)
        try: rows = [load(service, bodies, expected, n, args.seconds) for n in args.clients]
        finally: status = service.stop()
        rates.append(offline(model, pictures, args.seconds))
    rate = sum(rates) / 2
    for row in rows: row["of_offline"] = row["per_second"] / rate
    average = sum(map(len, bodies)) / len(bodies) / 1000
    result = {"hardware": f"{processor()}, {os.cpu_count()} cores", "threads": args.threads,
              "load_average": os.getloadavg()[0], "python": platform.python_version(),
              "date": time.strftime("%Y-%m-%d"),
              "model": f"{model.card['arch']}, {model.card['size']} px, {model.backend}",
              "pictures": f"{len(bodies)} JPEG files, {average:.0f} kB on average",
              "offline_per_second": rates, "exit_status": status, "rows": rows}
    show(result)
    if args.out:
        from binvision.ground.core import atomic_write

        with atomic_write(args.out, "w") as file: file.write(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if status or any(row["errors"] for row in rows) else 0)


COLUMNS = { # column → its width, the key of its numbers and their format
    "clients": (7, "clients", ""), "answers": (9, "answers", ""), "per s": (8, "per_second", ".1f"),
    "of offline": (12, "of_offline", ".2f"), "p50 ms": (8, "p50_ms", ".0f"), "p95": (8, "p95_ms", ".0f"),
    "p99": (8, "p99_ms", ".0f"), "503": (6, "refused_503", ""), "errors": (8, "errors", ""),
    "MB start": (10, "memory_start_mb", ".0f"), "end": (7, "memory_end_mb", ".0f"),
}


def show(result):
    "Print the results as a table."
    rates = " and ".join(f"{rate:.1f}" for rate in result["offline_per_second"])
    print(f"{result['model']}; {result['pictures']}; {result['hardware']}, {result['threads']} threads")
    print(f"offline {rates} pictures/s\n")
    print("".join(f"{name:>{width}}" for name, (width, _, _) in COLUMNS.items()))
    for row in result["rows"]:
        print("".join(f"{format(row[key], how):>{width}}" for width, key, how in COLUMNS.values()))


if __name__ == "__main__": main()
