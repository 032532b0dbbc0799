"""A hub on the loopback: as much of its interface as the datasets client asks for."""

import contextlib
import hashlib
import http.server
import json
import re
import threading

COMMIT = "c0ffee" + "0" * 34


@contextlib.contextmanager
def serve_hub(repositories):
    """Serve `{"owner/name": {"path": bytes}}`; gives the address and the list of what was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append(path)
            match = re.match(r"(?:/api)?/datasets/([^/]+/[^/]+)", path)
            files = repositories.get(match[1]) if match else None
            if files is None:
                return self.reply(b"{}", status=404, X_Error_Code="RepoNotFound")
            rest = path[match.end():]
            if rest.startswith("/resolve/"):
                body = files.get(rest.split("/", 3)[3])
                if body is None:
                    return self.reply(status=404, X_Error_Code="EntryNotFound")
                return self.reply(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)
            if rest.startswith("/tree/"):
                folder = "".join(f"{part}/" for part in rest.split("/")[3:])
                return self.reply(json.dumps(self.entries(files, folder)).encode())
            return self.reply(json.dumps({"id": match[1], "sha": COMMIT, "private": False, "tags": [], "downloads": 0,
                                          "likes": 0, "siblings": [{"rfilename": name} for name in files]}).encode())

        do_HEAD = do_GET

        def entries(self, files, folder):
            below = [name.removeprefix(folder) for name in files if name.startswith(folder)]
            return [{"type": "directory", "path": folder + name, "oid": "0", "size": 0}
                    for name in sorted({name.partition("/")[0] for name in below if "/" in name})] + [
                   {"type": "file", "path": folder + name, "oid": "1", "size": len(files[folder + name])}
                   for name in below if "/" not in name]

        def reply(self, body=b"", status=200, **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()
