"""A made-up bucket for measurements at full scale: it lists and gives any number of documents, and holds none of them."""
import asyncio
import hashlib
import threading
from urllib.parse import parse_qs, urlsplit


class Endless:
    "An S3 server in a thread of its own that answers ListObjectsV2 of `metadata/` and GET of n documents, made when asked for."

    def __init__(self, n):
        self.n, started = n, threading.Event()
        threading.Thread(target=self._serve, args=(started,), daemon=True).start()
        started.wait()

    def _serve(self, started):
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(asyncio.start_server(self._client, "127.0.0.1", 0, backlog=1024))
        self.url = "http://127.0.0.1:%d" % server.sockets[0].getsockname()[1]
        started.set()
        loop.run_forever()

    def _list(self, query):
        after = query.get("start-after", query.get("continuation-token", ["metadata/0000000"]))[0]
        first = int(after.removeprefix("metadata/").removesuffix(".json")) + 1
        last = min(first + 999, self.n)
        keys = "".join(f"<Contents><Key>metadata/{k:07d}.json</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>600</Size></Contents>"
                       for k in range(first, last + 1))
        more = f"<NextContinuationToken>metadata/{last:07d}.json</NextContinuationToken>" if last < self.n else ""
        return f'<?xml version="1.0"?><ListBucketResult><IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}{keys}</ListBucketResult>'.encode()

    def _document(self, id):
        items = "".join(f'"B{id}{k}": {{"asin": "B{id}{k}", "name": "{"item " * 10}", "quantity": 1}},' for k in range(int(id) % 5 + 1))
        return f'{{"BIN_FCSKU_DATA": {{{items[:-1]}}}, "EXPECTED_QUANTITY": {int(id) % 5 + 1}, "image_fname": "{id}.jpg"}}'.encode()

    async def _client(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                url = urlsplit(head.split(b" ", 2)[1].decode())
                key = url.path.rpartition("/metadata/")[2]
                body = self._document(key.removesuffix(".json")) if key.endswith(".json") else self._list(parse_qs(url.query))
                tag = hashlib.md5(body).hexdigest()
                writer.write(f'HTTP/1.1 200 OK\r\nETag: "{tag}"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Length: {len(body)}\r\n\r\n'.encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError): pass
        finally: writer.close()
