"""Web frameworks and servers, and clients of HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time

from service import until

from applications.table import Application
from applications.visit import Visit


def fastapi(visit: Visit) -> None:
    with visit.http() as client, visit.node("events.mjs", "/events") as source:
        assert [client.post("/count").json()["count"] for _ in range(3)] == [1, 2, 3]
        source.hear("open")
        first = source.hear("id")["id"]
        until(lambda: source.hear("id")["id"] > first + 5)
        follower = subprocess.Popen(
            visit.curl_words("-N", f"{visit.url}/events"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert follower.stdout is not None
        had = "".join(follower.stdout.readline() for _ in range(8))
        assert had.startswith("retry: 5000\n\nid: "), had
        visit.sleep()
        rest, _ = follower.communicate(timeout=60)
        assert follower.returncode in (18, 56, 92), "curl says that its transfer was cut"
        source.hear("error")
        source.hear("open")  # its own, five seconds later: that woke the microVM
        until(lambda: source.hear("id")["id"] > first + 20)
        ids = [one["id"] for one in source.seen if "id" in one]
        assert ids == list(range(first, ids[-1] + 1)), "none lost, none twice"
        assert client.post("/count").json()["count"] == 4
        last = int(re.findall(r"id: (\d+)\ndata: .*\n\n", had + rest)[-1])
        follower = subprocess.Popen(
            visit.curl_words("-N", "-H", f"Last-Event-ID: {last}", f"{visit.url}/events"), stdout=subprocess.PIPE, text=True
        )
        assert follower.stdout is not None
        until(lambda: follower.stdout is not None and follower.stdout.readline() == f"id: {last + 1}\n", 20)
        follower.kill()
        follower.communicate()


def flask(visit: Visit) -> None:
    """A session's cookie, and work that nobody waits for: it stands still in the sleep, which the idle policy brings."""
    with visit.http() as client:
        assert client.post("/login", data={"user": "ada"}).text == "welcome"
        before = client.get("/me").json()
        steps, each = 400, 0.05  # seconds that a step takes at least
        began = time.monotonic()
        client.post("/scan", data={"steps": str(steps)})
        until(lambda: client.get("/scan").json()["done"] > 5)
        visit.asleep()
        asleep = time.monotonic()
        time.sleep(10)  # the length of the sleep is what is looked at: it would be two hundred steps
        wakes = time.monotonic()
        woken = client.get("/scan").json()
        awake = asleep - began + time.monotonic() - wakes
        assert 5 < woken["done"] < min(steps, awake / each + 1), (woken, awake)
        assert client.get("/me").json() == before == {"user": "ada", "pid": before["pid"]}
        until(lambda: client.get("/scan").json()["done"] == steps, 240, 0.5)


def django(visit: Visit) -> None:
    """The admin's pages, as a browser goes through them."""
    secure = {"X-Forwarded-Proto": "https"}

    def token(page: str) -> str:
        found = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
        assert found, page[:2000]
        return found[1]

    with visit.http(timeout=240, headers=secure | {"Referer": f"{visit.url}/admin/"}) as client:
        login = client.get("/admin/login/?next=/admin/").text
        form = {"csrfmiddlewaretoken": token(login), "username": "admin", "password": "secret", "next": "/admin/"}
        page = client.post("/admin/login/?next=/admin/", data=form)
        assert page.status_code == 200 and "Site administration" in page.text, page.text[:2000]
        adding = client.get("/admin/auth/group/add/").text
        visit.sleep()
        page = client.post("/admin/auth/group/add/", data={"csrfmiddlewaretoken": token(adding), "name": "readers"})
        assert "was added successfully" in page.text, page.text[:2000]
        visit.sleep()
        assert "readers" in client.get("/admin/auth/group/").text


def duckdb(visit: Visit) -> None:
    rows = 2_000_000
    with visit.http(timeout=300) as client:
        assert client.post("/make", params={"rows": rows}).text == "made"
        visit.sleep()
        lines = 500_000
        csv = "a,b\n" + "".join(f"{number},{number % 97}\n" for number in range(lines))
        assert client.put("/csv", content=csv.encode()).json() == [lines, lines * (lines - 1) // 2], "an upload wakes it, and is whole"
        visit.sleep()
        parquet = client.get("/parquet").content
        assert parquet[:4] == parquet[-4:] == b"PAR1" and len(parquet) > 1_000_000
        visit.sleep()
        assert client.get("/sum").json() == [rows * (rows - 1) // 2] * 2, "the temporary table, too"


def nginx(visit: Visit) -> None:
    assert "hello" in visit.curl("/")
    head = visit.curl("/", "-I")
    tag = re.search(r"(?i)etag: (\S+)", head)
    assert tag, head
    visit.sleep()
    assert visit.curl("/", "-o", "/dev/null", "-w", "%{http_code}", "-H", f"If-None-Match: {tag[1]}") == "304"
    visit.sleep()
    assert visit.curl("/large", "-r", "5-9") == "\0" * 5
    # A download that is under way is cut, and goes on where it was.
    file = visit.directory / "large"
    download = subprocess.Popen(visit.curl_words("-o", str(file), f"{visit.url}/large"), stderr=subprocess.DEVNULL)
    until(lambda: file.exists() and file.stat().st_size > 1_000_000)
    visit.sleep()
    assert download.wait(60) in (18, 56, 92) and file.stat().st_size < 40_000_000
    visit.curl("/large", "-C", "-", "-o", str(file))
    assert file.stat().st_size == 40_000_000
    log = visit.instance.command("torpor", "logs", visit.identifier).stdout
    assert '"GET / HTTP/1.1" 304' in log and '"GET /large HTTP/1.1" 206' in log, log


def php(visit: Visit) -> None:
    jar = str(visit.directory / "cookies")
    before = json.loads(visit.curl("/", "-c", jar, "-b", jar))
    visit.sleep()
    after = json.loads(visit.curl("/", "-c", jar, "-b", jar))
    assert before["visits"] == 1 and after == {"visits": 2, "pid": before["pid"]}


def java(visit: Visit) -> None:
    with visit.http() as client:
        client.put("/colour", content="blue")
        began = time.monotonic()
        ticks = int(client.get("/ticks").text)
        visit.sleep()
        asleep = time.monotonic()
        time.sleep(10)  # the length of the sleep is what is looked at: it would be a hundred ticks
        wakes = time.monotonic()
        woken = int(client.get("/ticks").text)
        awake = asleep - began + time.monotonic() - wakes
        assert woken - ticks <= 10 * awake + 10, (ticks, woken, awake)
        assert client.get("/colour").text == "blue"
        until(lambda: int(client.get("/ticks").text) > woken + 5)


def go(visit: Visit) -> None:
    assert visit.curl("/count", "--http2") == "1\n"
    ticks = int(visit.curl("/ticks"))
    visit.sleep()
    assert visit.curl("/slow", "-N", "--http1.1") == "0\n1\n2\n3\n4\n"
    assert visit.curl("/count") == "2\n"
    until(lambda: int(visit.curl("/ticks")) > ticks)


def rust(visit: Visit) -> None:
    with visit.http(http2=False) as client:
        assert client.get("/").text == "1\n"
        visit.sleep()
        assert client.get("/").text == "2\n"


def git(visit: Visit) -> None:
    """Its HTTP carries the fields by git's own settings."""
    said = [*(f"http.extraHeader={name}: {value}" for name, value in visit.fields.items()), "user.name=a", "user.email=a@example.com"]
    settings = [word for one in said for word in ("-c", one)]
    environment = os.environ | {"GIT_SSL_CAINFO": visit.ca}  # which wins over http.sslCAInfo where somebody has set it
    one, two = visit.directory / "one", visit.directory / "two"

    def run(*words: str) -> str:
        return visit.run("git", *settings, *words, env=environment).stdout

    run("clone", f"{visit.url}/code.git", str(one))
    (one / "file").write_bytes(bytes(range(256)) * 8000)
    run("-C", str(one), "checkout", "-qb", "main")
    run("-C", str(one), "add", "file")
    run("-C", str(one), "commit", "-qm", "first")
    visit.sleep()
    run("-C", str(one), "push", "-q", "origin", "main")
    visit.sleep()
    run("clone", "-q", f"{visit.url}/code.git", str(two))
    assert (two / "file").read_bytes() == (one / "file").read_bytes()


def chromium(visit: Visit) -> None:
    page = b"<!doctype html><body style='background: rgb(255, 0, 0)'><h1>hello</h1>"
    with visit.http(timeout=420) as client:
        one = client.post("/", content=page)
        assert one.content.startswith(b"\x89PNG") and one.headers["x-taken"] == "1"
        visit.sleep()
        two = client.post("/", content=page)
        assert two.content.startswith(b"\x89PNG") and two.headers["x-taken"] == "2"


SHORT = {"idlePolicy": {"maxIdleDurationSeconds": 3, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}}
ROWS = [
    Application("fastapi", "FastAPI under uvicorn, with server-sent events", "httpx; npm's `eventsource`; curl -N", fastapi, 8000, "counters; the generator of events", "the event stream ends at the suspend (`error`, then `open`); `Last-Event-ID` brings what came since: none is lost, none comes twice"),
    Application("flask", "Flask under gunicorn, with work in a thread", "httpx, with the idle policy", flask, 8080, "sessions (also those signed by a key of this process), threads", "work that no request waits for stands still while it sleeps, and ends after it", launch=SHORT),
    Application("django", "Django's admin under gunicorn, SQLite", "httpx, as a browser goes through its forms", django, 8000, "logins, forms' tokens, rows"),
    Application("duckdb", "DuckDB, 2 million rows", "httpx", duckdb, 8080, "tables, temporary tables; an upload and a download wake as any request does"),
    Application("nginx", "nginx", "curl", nginx, 8080, "validators (ETag), logs", "a download that is under way at the suspend is cut; `curl -C -` goes on where it was, which wakes"),
    Application("php", "php-fpm behind nginx", "curl with cookies", php, 8080, "sessions, the pool's processes"),
    Application("java", "Java's own HTTP server, with a scheduled executor", "httpx", java, 8080, "maps, threads", "scheduled tasks do not make up for the sleep"),
    Application("go", "Go's net/http, FROM scratch", "curl", go, 8080, "counters, goroutines"),
    Application("rust", "Rust, standard library only", "httpx", rust, 8080, "counters"),
    Application("git", "git-http-backend behind nginx and fcgiwrap", "git (`http.extraHeader`)", git, 8080, "what was pushed"),
    Application("chromium", "a service that takes pictures with headless Chromium", "httpx", chromium, 8080, "the service; as an unprivileged user, with Chromium's own sandbox", memory=1024),
]  # fmt: skip
