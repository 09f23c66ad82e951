#!/usr/bin/env python3
"""Objects per second of `binvision.fetch`, compared with boto3 one by one and boto3 with 16 threads, from one server in one run.

The server is moto's, on loopback; in front of it stands the tests' proxy, which keeps the answers (so that the server is not
what is measured) and adds latency to each. `binvision.fetch` checks MD5s, decodes every picture and keeps checksums; boto3
downloads (get_object, the faster of its two ways for small objects) and writes, as people's scripts do. Each side runs in a process of its own, which reports its peak memory.

    python benchmarks/fetch.py                       # 1,500 synthetic bins of the real sizes, 0 and 30 ms
    python benchmarks/fetch.py --index 535000        # memory and open files of `binvision.fetch.index` at full scale
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / "tests"))
SIDES = ("binvision", "boto3, 16 threads", "boto3, one by one")


def peak_mb():
    "Peak resident memory of this process since it began; not inherited from the parent, as ru_maxrss would be."
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"): return int(line.split()[1]) / 1024
    return float("nan")


def one_side(side, url, ids, out):
    "Fetch pictures and documents one way; prints seconds an object and peak memory."
    keys = [key for id in ids for key in (f"bin-images/{id}.jpg", f"metadata/{id}.json")]
    if side == "binvision":
        from binvision.fetch.bucket import Bucket
        from binvision.fetch.fetch import fetch

        start = time.perf_counter()
        result = fetch(out, ids, Bucket(endpoint=url), progress=False)
        seconds = time.perf_counter() - start
        assert result.fetched == len(keys), result
    else:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        for folder in ("bin-images", "metadata"): (out / folder).mkdir(parents=True)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", config=Config(signature_version=UNSIGNED, max_pool_connections=16))
        start = time.perf_counter()
        def get(key): (out / key).write_bytes(client.get_object(Bucket="aft-vbi-pds", Key=key)["Body"].read())
        if side.endswith("one by one"):
            keys = keys[:len(keys) // 10]  # its rate does not depend on how many
            for key in keys: get(key)
        else:
            with ThreadPoolExecutor(16) as pool: list(pool.map(get, keys))
        seconds = time.perf_counter() - start
    assert sum(1 for _ in out.glob("*/*.*")) >= len(keys)
    print(json.dumps({"seconds": seconds / len(keys), "peak_mb": peak_mb()}))


def compare(n, rounds, latencies):
    from binvision.synthetic.synthesize import synthesize
    from faulty import Proxy, Store

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = synthesize(folder / "data", n=n, seed=0)
        ids = sorted(p.stem for p in (data / "bin-images").iterdir())
        size = sum(p.stat().st_size for p in data.glob("*/*.*")) / (2 * n)
        (folder / "ids.json").write_text(json.dumps(ids))
        print(f"{n} bins, {2 * n} objects of {size / 1000:.0f} kB on average; {os.cpu_count()} cores, Python {platform.python_version()}")
        store = Store()
        store.fill(data)
        server = subprocess.Popen([sys.executable, __file__, "--proxy", store.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        url = server.stdout.readline().strip()
        run(SIDES[0], url, folder, -1)  # the proxy has seen all
        for latency in latencies:
            server.stdin.write(f"{latency}\n")
            server.stdin.flush()
            found = {side: [] for side in SIDES}
            for k in range(rounds):
                for side in SIDES: found[side].append(run(side, url, folder, f"{latency}-{k}"))
            report(found, latency)
        server.kill()
        store.stop()


def run(side, url, folder, name):
    out = folder / f"out-{side[:5]}-{side[-3:]}-{name}"
    done = subprocess.run([sys.executable, __file__, "--side", side, url, folder / "ids.json", out], capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def report(found, latency):
    print(f"\nlatency added: {latency * 1000:.0f} ms")
    for side, runs in found.items():
        rate, ratios = statistics.median(1 / r["seconds"] for r in runs), [r["seconds"] / b["seconds"] for r, b in zip(runs, found["binvision"])]
        print(f"  {side:18} {rate:7.0f} objects/s   peak {max(r['peak_mb'] for r in runs):4.0f} MB   "
              f"binvision is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


def proxy(upstream):
    "The proxy in a process of its own; reads latencies from stdin."
    from faulty import Proxy

    line = Proxy(upstream)
    print(line.url, flush=True)
    for latency in sys.stdin: line.latency = float(latency)


def full_scale(n):
    "Index a made-up bucket of n documents, and watch memory and open files meanwhile."
    from endless import Endless

    bucket = Endless(n)
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen([sys.executable, __file__, "--index-from", bucket.url, str(Path(folder) / "index.parquet")], stdout=subprocess.PIPE, text=True)
        files, start = [], time.perf_counter()
        while child.poll() is None:
            time.sleep(0.5)
            try: files.append(len(os.listdir(f"/proc/{child.pid}/fd")))
            except OSError: pass
        result = json.loads(child.stdout.read())
        print(f"{result['rows']:,} documents in {time.perf_counter() - start:.0f} s, {result['rows'] / (time.perf_counter() - start):.0f}/s; "
              f"peak {result['peak_mb']:.0f} MB; open files at most {max(files)}, in the second half {max(files[len(files) // 2:])}")


def index_from(url, out):
    from binvision.fetch.bucket import Bucket
    from binvision.fetch.index import index

    table = index(out, Bucket(endpoint=url), progress=False)
    assert table["problem"].isna().all()
    print(json.dumps({"rows": len(table), "peak_mb": peak_mb()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1500, help="bins")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, nargs="*", default=[0, 0.03], help="seconds")
    parser.add_argument("--index", type=int, metavar="N", help="index a made-up bucket of N documents instead")
    parser.add_argument("--proxy", help=argparse.SUPPRESS)
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--index-from", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.proxy: proxy(a.proxy)
    elif a.side: one_side(a.side[0], a.side[1], json.loads(Path(a.side[2]).read_text()), Path(a.side[3]))
    elif a.index_from: index_from(*a.index_from)
    elif a.index: full_scale(a.index)
    else: compare(a.n, a.rounds, a.latency)
