"""An HTTP proxy that does what bad lines and busy stores do, and an S3 server to put behind it. For tests and benchmarks."""
import asyncio
import contextlib
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

SLOW_DOWN = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
FAULTS = ("slowdown", "reset", "truncate", "corrupt", "stall")


class Proxy:
    """A proxy on loopback in a thread of its own; its attributes can be changed while it runs.

    faults: what to do wrong, of FAULTS, drawn for each request; rate: how often; tries: how often for one object at most
    (None: without end); latency: seconds added to each answer; always: key ending → fault; log: the requests' first lines.
    Answers of the server behind are kept, so that it does not slow a measurement down.
    """

    def __init__(self, upstream, faults=(), rate=0.0, tries=2, latency=0.0, seed=0, always=None):
        self.upstream, self.faults, self.rate, self.tries, self.latency = upstream.rstrip("/"), faults, rate, tries, latency
        self.random, self.always, self.done, self.log = random.Random(seed), always or {}, Counter(), []
        self.headers, self.kept, self.busy, self.most_busy = [], {}, 0, 0  # requests being answered at a time
        self.loop, started = asyncio.new_event_loop(), threading.Event()
        threading.Thread(target=self._serve, args=(started,), daemon=True).start()
        started.wait()

    def _serve(self, started):
        asyncio.set_event_loop(self.loop)
        server = self.loop.run_until_complete(asyncio.start_server(self._client, "127.0.0.1", 0, backlog=1024))
        self.url = "http://127.0.0.1:%d" % server.sockets[0].getsockname()[1]
        started.set()
        self.loop.run_forever()

    def stop(self): self.loop.call_soon_threadsafe(self.loop.stop)

    def counts(self):
        "Number of faults by kind."
        return Counter(kind for kind, _ in self.done.elements())

    def _upstream(self, method, target, headers):
        passed = {k: v for k, v in headers.items() if k.lower() not in ("host", "connection", "accept-encoding")}
        request = urllib.request.Request(self.upstream + target, method=method, headers=passed)
        try: answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as e: answer = e
        except urllib.error.URLError: return 502, [], b""
        with answer:
            head = [(k, v) for k, v in answer.headers.items() if k.lower() not in ("connection", "transfer-encoding", "date", "server")]
            return answer.status, head, answer.read()

    async def _answer(self, method, target, headers):
        key = method, target
        if key not in self.kept:
            found = await self.loop.run_in_executor(None, self._upstream, method, target, headers)
            if method not in ("GET", "HEAD") or found[0] >= 500: return found
            self.kept[key] = found
        return self.kept[key]

    def _fault(self, target):
        for ending, fault in self.always.items():
            if target.endswith(ending): return fault
        if not self.faults or self.random.random() >= self.rate: return None
        if self.tries is not None and sum(n for (_, t), n in self.done.items() if t == target) >= self.tries: return None
        return self.random.choice(self.faults)

    async def _client(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").split("\r\n")
                method, target, _ = lines[0].split(" ", 2)
                headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
                self.log.append(f"{method} {target}")
                self.headers.append({k.lower(): v for k, v in headers.items()})
                self.busy += 1
                self.most_busy = max(self.busy, self.most_busy)
                try: going_on = await self._reply(writer, method, target, headers)
                finally: self.busy -= 1
                if not going_on: return
        except (asyncio.IncompleteReadError, ConnectionError): pass
        finally:
            with contextlib.suppress(Exception): writer.close()

    async def _reply(self, writer, method, target, headers):
        "Answer one request, well or badly; False ends the connection."
        status, fields, body = await self._answer(method, target, headers)
        if self.latency: await asyncio.sleep(self.latency)
        fault = self._fault(target)
        if fault: self.done[fault, target] += 1
        if fault == "slowdown": status, fields, body = 503, [("Content-Type", "application/xml")], SLOW_DOWN
        if fault == "reset": return self._reset(writer)
        fields = [(k, v) for k, v in fields if k.lower() != "content-length"] if method != "HEAD" else fields
        if method != "HEAD": fields = [*fields, ("Content-Length", len(body))]
        middle = len(body) // 2
        if fault == "corrupt" and body: body = body[:middle] + bytes([body[middle] ^ 0x55]) + body[middle + 1:]
        lines = "".join(f"{k}: {v}\r\n" for k, v in fields)
        writer.write(f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode("latin-1"))
        if method == "HEAD": body = b""
        if fault in ("truncate", "stall"):
            writer.write(body[:middle])
            await writer.drain()
            if fault == "stall": await asyncio.sleep(3600)
            return False
        writer.write(body)
        await writer.drain()
        return True

    def _reset(self, writer):
        "Close with RST instead of FIN."
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        return False


class Store:
    "moto's S3 server in a process of its own, with a bucket that everybody may read."

    def __init__(self, bucket="aft-vbi-pds"):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url, self.bucket = f"http://127.0.0.1:{port}", bucket
        self.process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url + "/moto-api/data.json").close()
                break
            time.sleep(0.1)
        else: raise RuntimeError("the S3 server did not start")
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{bucket}", method="PUT", headers={"x-amz-acl": "public-read"})).close()

    def fill(self, folder, prefix=""):
        "Put the files of a data set folder into the bucket."
        from obstore.store import S3Store

        store = S3Store(self.bucket, endpoint=self.url, region="us-east-1", skip_signature=True, client_options={"allow_http": True})
        for file in sorted(Path(folder).glob("*/*.*")): store.put(prefix + file.relative_to(folder).as_posix(), file.read_bytes())

    def put(self, key, raw):
        "One object."
        headers = {"Content-Type": "application/octet-stream"}
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{self.bucket}/{key}", data=raw, method="PUT", headers=headers), timeout=30).close()

    def stop(self):
        self.process.terminate()
        self.process.wait()
