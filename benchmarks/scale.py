"""Workers on Ray against the one-machine command, and what a hundred machines would need, on paper.

    python benchmarks/scale.py [MODEL [PICTURES]] [--n 2000] [--rounds 3] [--names 100000]

Each rate is of the pictures after the first one: a run of one picture is timed too, and its time, the start, is subtracted. So is the processor
time of the command and of all processes that it started, Ray's own among them: others on the machine change it little. Everything runs on this
machine, in turn, for several rounds, and each ratio is the median over the rounds, of rates of the same round. Workers and the command get the same number
of threads. Without MODEL the small model of the repository is asked, whose pictures take a few milliseconds each; without PICTURES
synthetic bins are drawn.

The second half measures what the driver alone does for each picture and for each part, with names of pictures that are not there, and puts it into a model of
10 million pictures on 100 machines.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

GOALS = {1: .85, 2: .9}  # share of the one-machine command's rate, by number of workers


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path(__file__).parents[1] / "nbs/models/small")
    parser.add_argument("pictures", nargs="?", type=Path)
    parser.add_argument("--n", type=int, default=2000, help="pictures of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--names", type=int, default=100_000, help="pictures that the driver is measured with")
    return parser.parse_args()


def family(root):
    "The processes that a process has started, and theirs."
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try: parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError: pass  # it has ended meanwhile
    found, todo = set(), [root]
    while todo:
        found.add(now := todo.pop())
        todo += [child for child, parent in parents.items() if parent == now and child not in found]
    return found


SEEN = {}  # process → processor time when it was last seen, ticks


def processor_time():
    "Seconds of processor time that this process and its family have taken so far."
    for pid in family(os.getpid()):
        try: about = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError: continue
        SEEN[pid, about[19]] = int(about[11]) + int(about[12])
    return sum(list(SEEN.values())) / os.sysconf("SC_CLK_TCK")


def watch():
    "Look at the processes now and then, since the time of one that has ended cannot be read."
    while True:
        time.sleep(.5)
        processor_time()


def taken(work):
    "Seconds that pass, and seconds of processor time, during `work()`."
    wall, processor = time.perf_counter(), processor_time()
    work()
    return time.perf_counter() - wall, processor_time() - processor


def rates(ways, lists, home, rounds):
    "Way → for each round: rates by time that passes and by processor time, and the start by both."
    found = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            costs = {}
            for n, source in lists.items():
                out = home / "r.jsonl"
                costs[n] = taken(lambda: way(source, out))
                out.unlink()
            one, many = costs
            found[name].append([*((many - one) / (b - a) for a, b in zip(costs[one], costs[many])), *costs[one]])
            print(name, [round(x, 2) for x in found[name][-1]], file=sys.stderr, flush=True)
    return found


def compare(args, home):
    "Workers 1 and 2 against the command with as many threads."
    import ray

    from binvision.model.bulk import predict_to
    from binvision.scale.engine import predict_on

    names = sorted(str(p.resolve()) for p in args.pictures.iterdir())[:args.n]
    lists = {n: home / f"{n}.txt" for n in (1, len(names))}
    for n, path in lists.items(): path.write_text("\n".join(names[:n]))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ways = {}
    for k in GOALS:
        ways[f"command, {k} threads"] = lambda source, out, k=k: predict_to(args.model, source, out, threads=k)
        ways[f"workers, {k}"] = lambda source, out, k=k: predict_on(args.model, source, out, workers=k, shard_size=100)
    predict_on(args.model, lists[1], home / "warm.jsonl")  # Ray's own start
    found = rates(ways, lists, home, args.rounds)
    ray.shutdown()
    print(f"\n| {len(names):,} pictures | pictures a second | a second of processor time | start, s | start, s of processor time |\n| --- | --- | --- | --- | --- |")
    for name, rows in found.items(): print(f"| {name} | " + " | ".join(f"{statistics.median(x):,.1f}" for x in zip(*rows)) + " |")
    for k, goal in GOALS.items():
        pairs = list(zip(found[f"workers, {k}"], found[f"command, {k} threads"]))
        by = [[many[i] / one[i] for many, one in pairs] for i in (0, 1)]
        told = [f"{statistics.median(x):.2f} [{min(x):.2f}, {max(x):.2f}]" for x in by]
        print(f"\nworkers {k}: {told[0]} of the command by the time that passes, {told[1]} by processor time; goal {goal}")
    return statistics.median(row[1] for row in found["workers, 1"])


def peak_memory(): return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024  # MB


def driver(model, n, home):
    "In a process of its own: the driver's work for n pictures, with an answer that costs nothing. Seconds by step, and its peak memory in MB."
    from binvision.data.sources import Shard
    from binvision.model.bulk import about_part
    from binvision.scale import engine
    from binvision.scale.pool import Task
    from binvision.scale.shards import merge

    reader = engine.prediction_reader(engine.load_model(model, threads=1))
    answer = {"count": 2, "confidence": 1 / 3, "mean": 2.123456789, "probabilities": {c: 1 / 7 for c in reader.about["counts"]}, "error": None}
    folder, out, clock, spent = home / "r.parquet.parts", home / "r.parquet", time.process_time, {}
    folder.mkdir(parents=True)
    start = clock()
    plan = engine._begun(folder, reader.about | {"source": "", "root": None}, lambda: ((f"s3://b/{k:08d}.jpg",) * 2 for k in range(n)), 1000)
    spent["listing"], files, spent["parts"] = clock() - start, engine._files(out, plan), 0.
    for k, path in files.items():
        named = engine._pictures(folder / "lists", k)
        lines = "".join(json.dumps(answer | {"source": name}) + "\n" for name, _ in named).encode()
        start = clock()
        named = engine._pictures(folder / "lists", k)
        engine._write_part(path, about_part(reader, Shard(k, plan["of"])), named, lines)
        spent["parts"] += clock() - start
    start = clock()
    merge(list(files.values()), out)
    spent["merge"] = clock() - start
    print(json.dumps(spent | {"memory": peak_memory(), "bytes": sum(p.stat().st_size for p in files.values()) / n}))


def measured_driver(args, n, home):
    command = [sys.executable, __file__, "--driver", str(args.model), str(n), str(home)]
    done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(home)
    return done


def on_paper(args, rate, home, pictures=10_000_000, machines=100, cores=8):
    "What 100 machines of 8 cores would take for 10 million pictures, with one driver."
    small, large = (measured_driver(args, n, home / "driver") for n in (args.names // 10, args.names))
    each = {k: large[k] / args.names * 1e6 for k in ("listing", "parts", "merge")}
    print(f"\ndriver, microseconds of processor time a picture: " + ", ".join(f"{k} {v:.0f}" for k, v in each.items()) + f"; bytes a picture {large['bytes']:.0f}")
    print(f"driver, peak memory: {small['memory']:.0f} MB for {args.names // 10:,} pictures, {large['memory']:.0f} MB for {args.names:,}")
    workers, parts = machines * cores, 4096
    answering = -(-parts // workers) * pictures / parts / rate
    rows = {"list a bucket in pieces: 35 pages of 1,000 keys a second, as measured at 0.2 s each (see RESULTS.md)": pictures / 1000 / 35,
            "spread the names over the parts": each["listing"] * pictures / 1e6,
            f"answer: {parts:,} parts on {workers} workers, {-(-parts // workers)} each at most": answering,
            "the driver's part of that, in the same time": each["parts"] * pictures / 1e6,
            "merge": each["merge"] * pictures / 1e6}
    print(f"\n| {pictures:,} pictures, {machines} machines, {cores} workers each | minutes |\n| --- | --- |")
    for name, seconds in rows.items(): print(f"| {name} | {seconds / 60:,.1f} |")


def main():
    from binvision.ground.machine import hardware
    from binvision.synthetic.synthesize import synthesize

    args = arguments()
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray gives its workers less than others, which tells on a busy machine
    threading.Thread(target=watch, daemon=True).start()
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        if args.pictures is None: args.pictures = synthesize(home / "bins", n=args.n, seed=1, max_side=500) / "bin-images"
        print(f"{hardware()}, load average {os.getloadavg()[0]:.1f}")
        on_paper(args, compare(args, home), home)
        print(f"\nload average at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--driver"]: driver(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    else: main()
