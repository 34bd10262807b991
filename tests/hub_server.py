"""A server that takes uploads as the Hub does, for the real client, which reads its address when it is imported."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as an upload needs; what was committed is in the server's `files`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = f"http://{self.headers['Host']}/somebody/toy"
        if self.path == "/api/repos/create":
            self.answer({"url": url})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            # Files of a Space have its kind before their name.
            kind = "spaces/" if self.path.startswith("/api/spaces/") else ""
            self.server.files |= {f"{kind}{file['path']}": base64.b64decode(file["content"]) for file in files}
            self.answer({"success": True, "commitUrl": f"{url}/commit/0", "commitOid": "0", "hookOutput": ""})
        else:
            self.answer({})

    def do_GET(self):
        self.answer({})

    def answer(self, content: dict):
        content = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@contextmanager
def hub_server() -> Iterator[tuple[dict[str, bytes], dict[str, str]]]:
    """What is committed, by its path, and the environment in which the client finds the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.files, {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_none"}
    finally:
        server.shutdown()
        server.server_close()
