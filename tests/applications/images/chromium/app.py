"""Takes pictures of pages: POST the HTML, and get a PNG."""

import http.server
import subprocess
import tempfile

taken = 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        global taken
        with tempfile.TemporaryDirectory() as directory:
            with open(f"{directory}/page.html", "wb") as page:
                page.write(self.rfile.read(int(self.headers["Content-Length"])))
            command = ["chromium", "--headless", "--disable-gpu", "--window-size=300,200", f"--screenshot={directory}/page.png"]
            subprocess.run([*command, f"file://{directory}/page.html"], check=True, cwd=directory)
            with open(f"{directory}/page.png", "rb") as file:
                picture = file.read()
        taken += 1
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(picture)))
        self.send_header("X-Taken", str(taken))
        self.end_headers()
        self.wfile.write(picture)


http.server.ThreadingHTTPServer(("", 8080), Handler).serve_forever()
