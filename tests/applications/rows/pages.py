"""Notebooks, dashboards, development servers and agents' tools: what people use in a browser, or by a client library."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from service import until
from websockets.sync.client import ClientConnection

from applications.table import Application
from applications.visit import Visit


class Kernel:
    """What JupyterLab's page speaks with a kernel."""

    def __init__(self, visit: Visit, kernel: str) -> None:
        self.session = uuid.uuid4().hex
        path = f"/api/kernels/{kernel}/channels?session_id={self.session}"
        self.socket: ClientConnection = visit.websocket(path, additional_headers={"Authorization": "token secret"})

    def begin(self, code: str) -> str:
        identifier = uuid.uuid4().hex
        header = {"msg_id": identifier, "msg_type": "execute_request", "username": "", "session": self.session, "version": "5.3"}
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        self.socket.send(
            json.dumps({"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content, "buffers": []})
        )
        return identifier

    def hear(self, identifier: str, kind: str) -> Any:
        while True:
            said = json.loads(self.socket.recv(timeout=120))
            if said["parent_header"].get("msg_id") == identifier:
                assert said["msg_type"] != "error", said["content"]
                if said["msg_type"] == kind:
                    return said["content"]

    def run(self, code: str) -> str:
        return str(self.hear(self.begin(code), "execute_result")["data"]["text/plain"])


def jupyterlab(visit: Visit) -> None:
    with visit.http(headers={"Authorization": "token secret"}) as web:
        kernel = until(lambda: web.post("/api/kernels", json={"name": "python3"}).json(), 60)["id"]
        one = Kernel(visit, kernel)
        assert one.run("x = 41; x") == "41"
        visit.sleep()
        assert one.run("x + 1") == "42", "on the same socket"
        # A cell that is under way at the suspend goes on where it was.
        cell = one.begin("import time\nfor n in range(30): time.sleep(0.1)\nprint('done', x)")
        one.hear(cell, "execute_input")
        visit.sleep()
        assert web.get(f"/api/kernels/{kernel}").json()["id"] == kernel, "which wakes it"
        assert one.hear(cell, "stream")["text"] == "done 41\n"
        one.socket.close()
        visit.sleep()
        again = Kernel(visit, kernel)
        assert again.run("x + 2") == "43", "by a socket of its own"
        again.socket.close()
        terminal = web.post("/api/terminals").json()["name"]
        with visit.websocket(f"/terminals/websocket/{terminal}", additional_headers={"Authorization": "token secret"}) as shell:
            shell.send(json.dumps(["stdin", "y=41; echo kept-$y\r"]))
            until(lambda: "kept-41" in shell.recv(timeout=60))
            visit.sleep()
            shell.send(json.dumps(["stdin", "echo after-$((y + 1))\r"]))
            until(lambda: "after-42" in shell.recv(timeout=60))
    with visit.browser() as page:
        page.goto(f"{visit.url}/lab?token=secret")
        page.locator(".jp-Launcher").wait_for()
        visit.nod()
        page.locator(".jp-LauncherCard[data-category=Notebook]").first.click()
        page.locator(".jp-NotebookPanel").wait_for()


def streamlit(visit: Visit) -> None:
    with visit.browser() as page:
        page.goto(visit.url)
        page.get_by_text("n is 0.").wait_for()
        page.get_by_role("button", name="more").click()
        page.get_by_text("n is 1.").wait_for()
        visit.sleep()
        page.get_by_role("button", name="more").click()
        page.get_by_text("n is 2.").wait_for()


def gradio(visit: Visit) -> None:
    from gradio_client import Client, handle_file

    fields = visit.fields | {"X-Forwarded-Proto": "https"}
    client = Client(
        visit.url,
        headers=fields,
        ssl_verify=visit.ca,
        httpx_kwargs={"timeout": 90},
        analytics_enabled=False,
        verbose=False,
        download_files=str(visit.directory),
    )
    assert client.predict(41, api_name="/add") == 41
    visit.sleep()
    assert client.predict(1, api_name="/add") == 42, "the state of its session"
    words = visit.directory / "words.txt"
    words.write_text("hello")
    visit.sleep()
    with open(client.predict(handle_file(str(words)), api_name="/shout")) as file:
        assert file.read() == "HELLO"
    with visit.http() as web:
        assert web.get("/config").json()["root"] == f"http://{visit.host}"
        assert web.get("/config", headers={"X-Forwarded-Proto": "https"}).json()["root"] == visit.url
    with visit.browser() as page:
        page.set_extra_http_headers(fields)
        page.goto(visit.url)
        page.get_by_label("number").fill("20")
        page.get_by_role("button", name="add", exact=True).click()
        page.wait_for_function("document.querySelector('[aria-label=total]')?.value == 20")
        visit.sleep()
        page.get_by_label("number").fill("22")
        page.get_by_role("button", name="add", exact=True).click()
        page.wait_for_function("document.querySelector('[aria-label=total]')?.value == 42")


def vite(visit: Visit) -> None:
    with visit.http() as editor, visit.browser() as page:
        page.goto(visit.url)
        page.get_by_text("first").wait_for()
        page.evaluate("window.mark = 1")
        editor.get("/edit/second")
        page.get_by_text("second").wait_for()
        visit.sleep()
        editor.get("/edit/third")
        page.get_by_text("third").wait_for()
        assert page.evaluate("window.mark") == 1, "by its socket, without a reload"


def nextjs(visit: Visit) -> None:
    compiled = 900  # seconds: it compiles a page when it is asked for first, which takes minutes where processors are emulated and shared
    with visit.http(timeout=compiled) as editor, visit.browser() as page:
        page.goto(visit.url, timeout=1000 * compiled)
        page.get_by_text("first").wait_for()
        until(lambda: [page.get_by_role("button").click(), page.get_by_role("button").inner_text() != "0"][1], 120, 0.5)
        count = page.get_by_role("button").inner_text()
        editor.get("/edit", params={"words": "second"})
        page.get_by_text("second").wait_for()
        visit.sleep()
        editor.get("/edit", params={"words": "third"})
        page.get_by_text("third").wait_for()
        assert page.get_by_role("button").inner_text() == count, "the component's state: no reload"


def code_server(visit: Visit) -> None:
    with visit.browser() as page:
        page.goto(f"{visit.url}/?folder=/home/coder")
        page.locator(".monaco-workbench .part.statusbar").wait_for()
        page.evaluate("window.mark = 1")
        visit.nod()  # its own keep-alives wake it
        page.keyboard.press("F1")
        page.locator(".quick-input-widget input").wait_for()
        assert page.evaluate("window.mark") == 1 and not page.get_by_text("Attempting to reconnect").count()


def mcp(visit: Visit) -> None:
    import httpx
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    def make(headers: Any = None, timeout: Any = None, auth: Any = None) -> httpx.AsyncClient:
        return httpx.AsyncClient(headers=headers, timeout=timeout or 90, auth=auth, verify=visit.trust, follow_redirects=True)

    @contextlib.asynccontextmanager
    async def session() -> AsyncIterator[ClientSession]:
        async with (
            streamablehttp_client(f"{visit.url}/mcp", headers=visit.fields, httpx_client_factory=make) as (read, write, _),
            ClientSession(read, write) as one,
        ):
            await one.initialize()
            yield one

    async def talk() -> None:
        async with session() as one:

            async def call(name: str, **words: str) -> str:
                answer = await one.call_tool(name, words)
                assert not answer.isError, answer
                return str(answer.content[0].text)  # type: ignore[union-attr]

            assert {tool.name for tool in (await one.list_tools()).tools} == {"remember", "recall"}
            assert await call("remember", words="before") == "1"
            await asyncio.to_thread(visit.sleep)
            assert await call("remember", words="after") == "2", "the session it had"
            assert await call("recall") == "before after"

    asyncio.run(talk())


ROWS = [
    Application("jupyterlab", "JupyterLab", "the kernel's and the terminal's protocol (`websockets`), Chromium", jupyterlab, 8888, "kernels and their variables, terminals, both on their sockets; a cell that was under way goes on; an open page polls, and so wakes it soon"),
    Application("streamlit", "Streamlit", "Chromium", streamlit, 8501, "the session's state, on the page's socket"),
    Application("gradio", "Gradio", "gradio_client, Chromium", gradio, 7860, "the session's state, files", "it makes `http://` links unless its clients send `X-Forwarded-Proto: https`"),
    Application("vite", "Vite's development server with its defaults", "Chromium", vite, 5173, "the page's socket: an edit after the sleep is shown without a reload"),
    Application("nextjs", "Next.js' development server", "Chromium", nextjs, 3000, "the page's socket, what was compiled: an edit after the sleep is shown, and components keep their state", memory=1024),
    Application("code-server", "code-server (VS Code in a browser)", "Chromium", code_server, 8080, "the workbench on its sockets; its own keep-alives wake it at once", memory=1024, times=1200),
    Application("mcp", "an MCP server over streamable HTTP (FastMCP)", "the MCP library's client", mcp, 8000, "the session"),
]  # fmt: skip
