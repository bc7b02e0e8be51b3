"""python stand_in_server.py PORT JOURNAL [options]: answers like an SGLang server, in no time.

Every request's path and body go to JOURNAL, a line of JSON each. ``--child`` starts a process in a session of its own
and writes its id to FILE; ``--stubborn`` ignores the request to end. A POST to /hang makes
the server answer nothing more, to /scheduler_hang only its scheduler, and to /refuse the path that its body names.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATE = {"hang": False, "scheduler": True, "paused": False, "version": "default", "refused": None}
LOCK = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body: dict[str, object] | None) -> None:
        path = self.path.partition("?")[0]
        with LOCK, open(self.server.journal, "a") as file:
            file.write(json.dumps({"path": path, "body": body}) + "\n")
        while STATE["hang"]:
            time.sleep(0.05)
        code, answer = self.react(path, body or {})
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def react(self, path: str, body: dict[str, object]) -> tuple[int, object]:
        if path == "/hang":
            STATE["hang"] = True
        if path == "/refuse":
            STATE["refused"] = body["path"]
        if path == STATE["refused"]:
            return 500, {"error": {"message": "refused"}}
        if path == "/scheduler_hang":
            STATE["scheduler"] = False
        if path == "/health_generate" and not STATE["scheduler"]:
            return 503, None
        if path == "/update_weights_from_disk":
            if not os.path.isdir(str(body["model_path"])):
                return 400, {"success": False, "message": "no such folder"}
            STATE["version"] = body["weight_version"]
            return 200, {"success": True}
        if path == "/get_model_info":
            return 200, {"model_path": "x", "weight_version": STATE["version"]}
        if path == "/get_server_info":
            return 200, {"version": "0.5.21"}
        return 200, {"success": True}

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.answer(json.loads(self.rfile.read(length) or b"null"))

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("journal")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--child")
    parser.add_argument("--exit", type=int)
    parser.add_argument("--stubborn", action="store_true")
    options = parser.parse_args()
    print("starting up", flush=True)
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.child:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        with open(options.child, "w") as file:
            file.write(str(child.pid))
    time.sleep(options.slow)
    if options.exit is not None:
        print("out of memory, for instance", flush=True)
        sys.exit(options.exit)
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    server.daemon_threads = True
    server.journal = options.journal
    server.serve_forever()


if __name__ == "__main__":
    main()
