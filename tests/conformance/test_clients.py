"""Clients as people use them, each doing its ordinary work: with a microVM that runs, and with one that is asleep."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import shutil
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from service import ROLE, Instance, until
from websockets.asyncio.client import connect

pytestmark = [pytest.mark.vm, pytest.mark.conformance]
POLICY = {"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True}
BODY = b"torpor " * 30_000


def headers(guest: dict[str, Any], port: int = 8080) -> dict[str, str]:
    return {"X-aws-proxy-auth": guest["token"], "X-aws-proxy-port": str(port)}


def run(*command: str, seconds: float = 60, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, **options)
    assert not done.returncode, (command[0], done.stdout[-500:], done.stderr[-1000:])
    return done.stdout


def curl(guest: dict[str, Any], *words: str, port: int = 8080) -> str:
    fields = [part for name, value in headers(guest, port).items() for part in ("-H", f"{name}: {value}")]
    return run("curl", "-sS", "--cacert", guest["ca"], *fields, *words)


def context(guest: dict[str, Any]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=guest["ca"])


@pytest.mark.parametrize("version", ["--http1.0", "--http1.1", "--http2"])
def test_curl(guest: dict[str, Any], state: str, version: str, tmp_path: Path) -> None:
    url = f"https://{guest['endpoint']}"
    (tmp_path / "body").write_bytes(BODY)
    echoed = run(
        "curl",
        "-sS",
        "--cacert",
        guest["ca"],
        version,
        "-H",
        f"X-aws-proxy-auth: {guest['token']}",
        "--data-binary",
        f"@{tmp_path / 'body'}",
        f"{url}/echo",
    )
    assert echoed.encode() == BODY
    assert len(curl(guest, version, f"{url}/big?n=3000000")) == 3_000_000
    assert curl(guest, version, "-I", "-o", "/dev/null", "-w", "%{http_code} %{http_version}", f"{url}/state").split()[0] == "200"
    assert curl(guest, version, "-o", "/dev/null", "-w", "%{http_code}", f"{url}/empty") == "204"
    assert curl(guest, version, "-N", f"{url}/stream?n=3") == "data: 0\n\ndata: 1\n\ndata: 2\n\n"


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl_to_an_application_with_tls(guest: dict[str, Any], state: str, version: str) -> None:
    assert json.loads(curl(guest, version, f"https://{guest['endpoint']}/state", port=8443))["pid"] > 0


def test_curl_many_at_once(guest: dict[str, Any], state: str) -> None:
    url = f"https://{guest['endpoint']}/state?n=[1-50]"
    out = curl(guest, "--http2", "--parallel", "--parallel-max", "20", "-o", "/dev/null", "-w", "%{http_code}\n", url)
    assert out.split() == ["200"] * 50


def test_requests(guest: dict[str, Any], state: str) -> None:
    with requests.Session() as session:
        session.trust_env = False  # the environment's own bundle would win
        session.verify, session.headers = guest["ca"], headers(guest)  # type: ignore[assignment]
        url = f"https://{guest['endpoint']}"
        assert session.post(f"{url}/echo", data=BODY, timeout=40).content == BODY
        assert session.post(f"{url}/echo", data=iter([b"a" * 10, b"b" * 10]), timeout=40).content == b"a" * 10 + b"b" * 10
        assert session.get(f"{url}/fields", timeout=40).json()["method"] == "GET"
        with session.get(f"{url}/stream?n=5", stream=True, timeout=40) as streamed:
            assert sum(1 for line in streamed.iter_lines() if line) == 5


@pytest.mark.parametrize("http2", [False, True])
async def test_httpx(guest: dict[str, Any], state: str, http2: bool) -> None:
    async with httpx.AsyncClient(verify=context(guest), http2=http2, headers=headers(guest), timeout=40) as client:
        url = f"https://{guest['endpoint']}"
        answer = await client.post(f"{url}/echo", content=BODY)
        assert answer.content == BODY and answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        answers = await asyncio.gather(*(client.get(f"{url}/state") for _ in range(30)))
        assert {one.status_code for one in answers} == {200}
        async with client.stream("GET", f"{url}/stream?n=5") as streamed:
            assert [line async for line in streamed.aiter_lines() if line] == [f"data: {n}" for n in range(5)]


async def test_aiohttp(guest: dict[str, Any], state: str) -> None:
    connector = aiohttp.TCPConnector(ssl=context(guest))
    async with aiohttp.ClientSession(f"https://{guest['endpoint']}", connector=connector, headers=headers(guest)) as session:
        async with session.post("/echo", data=BODY) as answer:
            assert await answer.read() == BODY
        async with session.ws_connect("/ws") as socket:
            await socket.send_str("hello")
            assert await socket.receive_str() == "hello"


async def test_websockets(guest: dict[str, Any], state: str) -> None:
    offered = ["lambda-microvms", f"lambda-microvms.authentication.{guest['token']}", "lambda-microvms.port.8081"]
    async with connect(f"wss://{guest['endpoint']}/", ssl=context(guest), subprotocols=offered, open_timeout=30) as socket:  # type: ignore[arg-type]
        assert socket.subprotocol == "lambda-microvms"
        for message in ("text", b"\x00\xff" * 1000, "x" * 200_000):
            await socket.send(message)
            assert await socket.recv() == message
        await (await socket.ping())


NODE = """
const [url, ca, token] = process.argv.slice(1);
const http2 = require('node:http2'), fs = require('node:fs');
const fields = {'x-aws-proxy-auth': token, 'x-aws-proxy-port': '8080'};
(async () => {
  const body = 'torpor '.repeat(30000);
  const answer = await fetch(url + '/echo', {method: 'POST', headers: fields, body});
  if (await answer.text() !== body) throw new Error('fetch: not what was sent');
  const session = http2.connect(url, {ca: fs.readFileSync(ca)});
  const ask = (path, text) => new Promise((done, failed) => {
    const stream = session.request({':path': path, ':method': text ? 'POST' : 'GET', ...fields});
    let all = '', status;
    stream.on('response', head => status = head[':status']).on('data', part => all += part).on('error', failed);
    stream.on('end', () => done([status, all]));
    stream.end(text);
  });
  const answers = await Promise.all([ask('/echo', body), ...Array.from({length: 20}, () => ask('/state'))]);
  if (answers[0][1] !== body || answers.some(([status]) => status !== 200)) throw new Error('http2: ' + JSON.stringify(answers.map(a => a[0])));
  session.close();
  console.log('good');
})().catch(error => { console.error(error); process.exit(1); });
"""


def test_node(guest: dict[str, Any], state: str) -> None:
    words = ["node", "-e", NODE, f"https://{guest['endpoint']}", guest["ca"], guest["token"]]
    assert run(*words, env=os.environ | {"NODE_EXTRA_CA_CERTS": guest["ca"]}).strip() == "good"


def test_h2load(guest: dict[str, Any], state: str) -> None:
    fields = [part for name, value in headers(guest).items() for part in ("-H", f"{name}: {value}")]
    out = run("h2load", "-n200", "-c4", "-m10", f"--connect-to=127.0.0.1:{guest['port']}", *fields, f"https://{guest['endpoint']}/state")
    assert "200 succeeded, 0 failed" in out and "200 2xx" in out


def test_nghttp(guest: dict[str, Any], state: str) -> None:
    fields = [part for name, value in headers(guest).items() for part in ("-H", f"{name}: {value}")]
    out = run("nghttp", "-v", "--no-verify-peer", *fields, f"https://{guest['endpoint']}/stream?n=3")
    assert "data: 2" in out and "x-end: yes" in out  # the trailer, too


PAGE = """<!doctype html><title>page</title><script>
async function work(token) {
  const headers = {'X-aws-proxy-auth': token, 'X-aws-proxy-port': '8080'};
  const echoed = await (await fetch('/echo', {method: 'POST', headers, body: 'torpor '.repeat(3000)})).text();
  const many = await Promise.all(Array.from({length: 20}, () => fetch('/state', {headers}).then(a => a.status)));
  const offered = ['lambda-microvms', 'lambda-microvms.authentication.' + token, 'lambda-microvms.port.8081'];
  const socket = new WebSocket(`wss://${location.host}/`, offered);
  const message = await new Promise((done, failed) => {
    socket.onopen = () => socket.send('hello'); socket.onmessage = event => done(event.data); socket.onerror = () => failed('WebSocket');
  });
  return JSON.stringify([echoed.length, many.filter(s => s === 200).length, message, socket.protocol]);
}
let going = true, good = 0, lanes, failures = [];
function begin(token) {  // five requests at a time are under way, until finish()
  const headers = {'X-aws-proxy-auth': token, 'X-aws-proxy-port': '8080'};
  lanes = Array.from({length: 5}, async () => {
    while (going) {
      try {
        const answer = await fetch('/slow?s=0.3', {headers});
        if (answer.status === 200 && await answer.text() === 'slow') good++; else failures.push(answer.status);
      } catch (error) { failures.push(String(error)); }
    }
  });
}
async function finish() {
  going = false;
  await Promise.all(lanes);
  return JSON.stringify([good, failures]);
}
function events() {
  const source = new EventSource('/stream?n=3&s=0.05'), seen = [];
  return new Promise((done, failed) => {
    source.onmessage = event => { seen.push(event.data); if (seen.length === 3) { source.close(); done(seen.join()); } };
    source.onerror = () => failed('EventSource');
  });
}
</script>"""


class Browser:
    """Chromium by its debugging protocol. The certificate is known by its key; its profile is a directory of its own."""

    def __init__(self, guest: dict[str, Any], profile: Path) -> None:
        certificate = x509.load_pem_x509_certificate((Path(guest["ca"]).parent / "edge.crt").read_bytes())
        key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        pin = base64.b64encode(hashlib.sha256(key).digest()).decode()
        name = shutil.which("chromium")
        assert name, "make conformance installs it"
        self.profile = profile
        self.process = subprocess.Popen(
            [name, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--remote-debugging-port=0",
             f"--ignore-certificate-errors-spki-list={pin}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.last = 0

    async def open(self) -> None:
        file = self.profile / "DevToolsActivePort"
        async with asyncio.timeout(60):
            while not (file.exists() and len(file.read_text().splitlines()) == 2):
                assert self.process.poll() is None
                await asyncio.sleep(0.05)
        port = file.read_text().splitlines()[0]
        pages = await asyncio.to_thread(lambda: requests.get(f"http://127.0.0.1:{port}/json", timeout=10).json())
        self.socket = await connect(next(one["webSocketDebuggerUrl"] for one in pages if one["type"] == "page"), max_size=None)

    async def say(self, method: str, **parameters: Any) -> Any:
        self.last += 1
        await self.socket.send(json.dumps({"id": self.last, "method": method, "params": parameters}))
        async with asyncio.timeout(60):
            while True:
                answer = json.loads(await self.socket.recv())
                if answer.get("id") == self.last:
                    assert "error" not in answer, answer
                    return answer["result"]

    async def visit(self, guest: dict[str, Any]) -> None:
        """Opens the page that the microVM serves, which needs the token's field from outside the page."""
        await self.say("Network.enable")
        await self.say("Network.setExtraHTTPHeaders", headers=headers(guest))
        await self.say("Page.navigate", url=f"https://{guest['endpoint']}/page")
        async with asyncio.timeout(60):
            while await self.evaluate("document.title") != "page":
                await asyncio.sleep(0.05)
        await self.say("Network.setExtraHTTPHeaders", headers={})

    async def evaluate(self, text: str) -> Any:
        result = await self.say("Runtime.evaluate", expression=text, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def close(self) -> None:
        await self.say("Browser.close")
        await self.socket.close()
        await asyncio.to_thread(self.process.wait, 30)


async def test_chromium(service: Instance, guest: dict[str, Any], state: str, tmp_path: Path) -> None:
    """A page that the microVM itself serves. fetch and WebSocket carry the token as a page can; an EventSource has no fields of
    its own, so it is given them from outside."""
    curl(guest, "-X", "PUT", "--data-binary", PAGE, f"https://{guest['endpoint']}/page")
    if state == "asleep":  # the browser is to wake it
        service.client().suspend_microvm(microvmIdentifier=guest["microvmId"])
        service.state(guest["microvmId"], "SUSPENDED")
    browser = Browser(guest, tmp_path)
    try:
        await browser.open()
        await browser.visit(guest)
        worked = json.loads(await browser.evaluate(f"work({json.dumps(guest['token'])})"))
        assert worked == [21000, 20, "hello", "lambda-microvms"]
        await browser.say("Network.setExtraHTTPHeaders", headers=headers(guest))
        assert await browser.evaluate("events()") == "0,1,2"
        await browser.close()
    finally:
        browser.process.kill()
        browser.process.wait()


async def test_chromium_keeps_its_connections_while_microvms_come_and_go(service: Instance, guest: dict[str, Any], tmp_path: Path) -> None:
    """It ends its requests with ERR_NETWORK_CHANGED whenever an address of the host's changes."""
    curl(guest, "-X", "PUT", "--data-binary", PAGE, f"https://{guest['endpoint']}/page")
    browser = Browser(guest, tmp_path)
    try:
        await browser.open()
        await browser.visit(guest)
        await browser.evaluate(f"begin({json.dumps(guest['token'])})")
        for _ in range(3):
            await asyncio.to_thread(others_come_and_go, service, guest)
        good, failures = json.loads(await browser.evaluate("finish()"))
        assert not failures and good > 10
        await browser.close()
    finally:
        browser.process.kill()
        browser.process.wait()


def others_come_and_go(service: Instance, guest: dict[str, Any]) -> None:
    """One is launched, suspended, woken and ended; its link goes, and another is made to be ready for the next."""
    links = service.run / service.name / "netns"
    before = set(links.iterdir())
    vm = service.launch(guest["imageArn"], idlePolicy=POLICY)
    service.client().suspend_microvm(microvmIdentifier=vm["microvmId"])
    service.state(vm["microvmId"], "SUSPENDED")
    fields = {"X-aws-proxy-auth": service.token(vm["microvmId"])}
    assert requests.get(f"https://{vm['endpoint']}/state", headers=fields, verify=guest["ca"], timeout=30).status_code == 200
    service.terminate(vm["microvmId"])
    until(lambda: before - set(links.iterdir()) and set(links.iterdir()) - before)


def test_aws_logs_tail_follows(service: Instance, guest: dict[str, Any]) -> None:
    """`aws logs tail --follow` of the AWS CLI's version 2, under the service's name of the group and the announcement's."""
    vm = service.launch(guest["imageArn"], idlePolicy=POLICY, executionRoleArn=ROLE)
    token = service.token(vm["microvmId"])
    environment = service.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{service.environment['TORPOR_API__PORT']}"}
    try:
        for group in ("/aws/lambda-microvms/conformance", "/aws/lambda/microvms/conformance"):
            command = ["/usr/bin/aws", "logs", "tail", group, "--follow", "--since", "1h", "--format", "short"]
            command += ["--endpoint-url", environment["AWS_ENDPOINT_URL"]]
            tail = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            deadline = threading.Timer(60, tail.kill)  # its lines then end, and so does the wait for them
            deadline.start()
            try:
                assert tail.stdout is not None
                assert "torpor: fetched" in tail.stdout.readline(), "the build's log, an hour back"
                fields = {"X-aws-proxy-auth": token}
                visits = requests.get(f"https://{vm['endpoint']}/", headers=fields, verify=guest["ca"], timeout=30).json()["counter"]
                seen = ""
                while f"visit {visits}" not in seen:
                    line = tail.stdout.readline()
                    assert line, tail.stderr.read() if tail.stderr else ""
                    seen += line
            finally:
                deadline.cancel()
                tail.terminate()
                tail.wait(20)
    finally:
        service.terminate(vm["microvmId"])
