"""Shapes of Python images that people write."""

from typing import Any

import grpc
from service import until

from fidelity.table import BASE, Call, Get, Image, Sleep, Subject

FLASK = "from flask import Flask\napp = Flask(__name__)\nhits = [0]\n@app.get('/')\ndef root():\n    hits[0] += 1\n    return f'hits {hits[0]}\\n'\n"
FASTAPI = (
    "import os\nfrom fastapi import FastAPI\napp = FastAPI()\n"
    "@app.get('/items/{item}')\ndef item(item: int, q: str = ''):\n    return {'item': item, 'q': q, 'user': os.getuid()}\n"
)
COUNTS = [
    Get("answers", contains="hits 1\\b", within=120),
    Sleep(),
    Get("its memory is as before the sleep", contains="hits 2\\b", within=60),
]
INDEX = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
JUPYTER = {"Authorization": "token secret"}
PIP = BASE + "RUN dnf install -y python3 python3-pip && dnf clean all\n"


def _is_healthy(running: Any) -> None:
    """grpc.health.v1.Health/Check of everything (an empty message) says SERVING."""
    vm, ca = running.started(), (running.instance.root / "tls/ca.crt").read_bytes()
    host, _, port = vm["endpoint"].partition(":")
    options = [("grpc.ssl_target_name_override", host), ("grpc.default_authority", vm["endpoint"])]
    metadata = [("x-aws-proxy-auth", vm["token"]), ("x-aws-proxy-port", "50051"), ("x-aws-proxy-force-h2", "true")]
    with grpc.secure_channel(f"127.0.0.1:{port or 443}", grpc.ssl_channel_credentials(ca), options) as channel:
        answer = channel.unary_unary("/grpc.health.v1.Health/Check")(b"", metadata=metadata, timeout=60)
    assert answer == b"\x08\x01", answer


def _ticks(running: Any) -> None:
    def count() -> int:
        return int(running.ask("/").body.split()[1])

    before = count()
    until(lambda: count() > before, 30, 0.2)


def _serve(code: str) -> str:
    return "import http.server, json, sys\n" + code


SUBJECT = Subject(
    "Python applications",
    "Built as their users build them; packages come from PyPI.",
    [
        Image(
            "docker-init-python",
            "`docker init` for Python: cache and bind mounts, a user of its own",
            "# syntax=docker/dockerfile:1\n\nARG PYTHON_VERSION=3.12\nFROM public.ecr.aws/lambda/microvms:al2023-minimal AS base\n"
            "RUN dnf install -y python3 python3-pip shadow-utils\nENV PYTHONDONTWRITEBYTECODE=1\nENV PYTHONUNBUFFERED=1\nWORKDIR /app\nARG UID=10001\n"
            'RUN useradd \\\n    --system \\\n    --home-dir "/nonexistent" \\\n    --shell "/sbin/nologin" \\\n    --no-create-home \\\n    --uid "${UID}" \\\n    appuser\n'
            "RUN --mount=type=cache,target=/root/.cache/pip \\\n    --mount=type=bind,source=requirements.txt,target=requirements.txt \\\n"
            "    python3 -m pip install -r requirements.txt\nUSER appuser\nCOPY . .\nEXPOSE 8000\nCMD uvicorn 'main:app' --host=0.0.0.0 --port=8000\n",
            [
                Get("answers as its user", "/items/7?q=x", 8000, contains='"item":7,"q":"x","user":10001', within=120),
                Sleep(),
                Get("goes on after a sleep", "/items/8", 8000, contains='"item":8', within=60),
            ],
            {"requirements.txt": "fastapi\nuvicorn\n", "main.py": FASTAPI, ".dockerignore": "**/__pycache__\n**/.venv\n"},
            long=True,
        ),
        Image(
            "flask-gunicorn",
            "Flask under gunicorn, requirements first",
            PIP + "WORKDIR /app\nCOPY requirements.txt .\nRUN pip install --no-cache-dir -r requirements.txt\nCOPY app.py .\nEXPOSE 8080\n"
            'CMD ["gunicorn", "--bind", "0.0.0.0:8080", "app:app"]\n',
            COUNTS,
            {"requirements.txt": "flask\ngunicorn\n", "app.py": FLASK},
            long=True,
        ),
        Image(
            "venv-copied",
            "a virtual environment made in one stage and copied into the next",
            "FROM public.ecr.aws/lambda/microvms:al2023-minimal AS build\nRUN dnf install -y python3 python3-pip\nRUN python3 -m venv /opt/venv\n"
            'ENV PATH="/opt/venv/bin:$PATH"\nCOPY requirements.txt .\nRUN pip install -r requirements.txt\n'
            "FROM public.ecr.aws/lambda/microvms:al2023-minimal\nRUN dnf install -y python3\nCOPY --from=build /opt/venv /opt/venv\n"
            'ENV PATH="/opt/venv/bin:$PATH"\nWORKDIR /srv\nCOPY app.py .\nEXPOSE 8080\nCMD ["flask", "run", "--host=0.0.0.0", "--port=8080"]\n',
            COUNTS,
            {"requirements.txt": "flask\n", "app.py": FLASK},
            long=True,
        ),
        Image(
            "uv",
            "uv: a project synchronised with a cache mount",
            PIP + "RUN pip install uv\nENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never\nWORKDIR /app\n"
            "RUN --mount=type=cache,target=/root/.cache/uv --mount=type=bind,source=pyproject.toml,target=pyproject.toml \\\n"
            '    uv sync --no-install-project --no-dev\nCOPY . /app\nENV PATH="/app/.venv/bin:$PATH"\nEXPOSE 8080\n'
            'CMD ["flask", "--app", "app", "run", "--host", "0.0.0.0", "--port", "8080"]\n',
            COUNTS,
            {
                "pyproject.toml": '[project]\nname = "app"\nversion = "0.1"\nrequires-python = ">=3.11"\ndependencies = ["flask"]\n',
                "app.py": FLASK,
            },
            long=True,
        ),
        Image(
            "poetry",
            "Poetry: a project with a source of its own, installed without a virtual environment",
            PIP
            + "RUN pip install poetry\nENV POETRY_VIRTUALENVS_CREATE=false POETRY_NO_INTERACTION=1\nWORKDIR /app\nCOPY pyproject.toml ./\n"
            f"RUN poetry source add --priority=primary index $(python3 -c '{INDEX}')\n"
            'RUN poetry install --no-root\nCOPY . .\nEXPOSE 8080\nCMD ["flask", "--app", "app", "run", "--host", "0.0.0.0", "--port", "8080"]\n',
            COUNTS,
            {
                "pyproject.toml": '[project]\nname = "app"\nversion = "0.1.0"\nrequires-python = ">=3.11,<4"\ndependencies = ["flask (>=3)"]\n'
                "[tool.poetry]\npackage-mode = false\n",
                "app.py": FLASK,
            },
            long=True,
        ),
        Image(
            "django",
            "Django: migrations and static files in the build, SQLite on the disk",
            PIP
            + "RUN pip install django gunicorn\nWORKDIR /app\nRUN django-admin startproject site_ . && echo \"ALLOWED_HOSTS = ['*']\" >> site_/settings.py "
            "&& echo \"STATIC_ROOT = '/static'\" >> site_/settings.py\nRUN python3 manage.py migrate && python3 manage.py collectstatic --noinput\n"
            'EXPOSE 8000\nCMD ["gunicorn", "--bind", ":8000", "site_.wsgi"]\n',
            [
                Get("the admin's login page is served", "/admin/login/", 8000, contains="Django", within=120),
                Sleep(),
                Get("and after a sleep", "/admin/login/", 8000, contains="csrfmiddlewaretoken", within=60),
            ],
            long=True,
        ),
        Image(
            "asyncio-task",
            "an asyncio server with a background task",
            PIP + 'RUN pip install aiohttp\nWORKDIR /app\nCOPY app.py .\nEXPOSE 8080\nENTRYPOINT ["python3", "-u", "app.py"]\n',
            [
                Get("", contains="ticks", within=120),
                Call("the task runs", _ticks),
                Sleep(),
                Call("and goes on", _ticks),
            ],
            {
                "app.py": "import asyncio\nfrom aiohttp import web\nticks = 0\nasync def tick(app):\n    async def run():\n        global ticks\n"
                "        while True:\n            ticks += 1\n            await asyncio.sleep(0.2)\n    asyncio.create_task(run())\n"
                "async def root(request):\n    return web.Response(text=f'ticks {ticks}\\n')\n"
                "app = web.Application()\napp.on_startup.append(tick)\napp.add_routes([web.get('/', root)])\nweb.run_app(app, port=8080)\n"
            },
            long=True,
        ),
        Image(
            "duckdb-pandas",
            "DuckDB and pandas: native wheels",
            PIP
            + "RUN pip install duckdb pandas flask\nWORKDIR /app\nCOPY app.py .\nEXPOSE 8080\nCMD flask run --host=0.0.0.0 --port=8080\n",
            [
                Get("a query over 200,000 rows", "/?n=200000", contains="19999900000", within=180),
                Sleep(),
                Get("the table is there after a sleep", "/?n=1000", contains="499500", within=60),
            ],
            {
                "app.py": "import duckdb, pandas, flask\napp = flask.Flask(__name__)\nc = duckdb.connect()\nframe = pandas.DataFrame({'x': range(200000)})\n"
                "c.execute('create table t as select * from frame')\n@app.get('/')\ndef root():\n"
                "    n = int(flask.request.args['n'])\n    return str(c.execute(f'select sum(x) from t where x < {n}').fetchone()[0])\n"
            },
            long=True,
        ),
        Image(
            "streamlit",
            "Streamlit",
            PIP
            + "RUN pip install streamlit\nWORKDIR /app\nCOPY app.py .\nEXPOSE 8501\nHEALTHCHECK CMD curl --fail http://localhost:8501/_stcore/health\n"
            'ENTRYPOINT ["streamlit", "run", "app.py", "--server.port=8501", "--server.address=0.0.0.0"]\n',
            [
                Get("is healthy", "/_stcore/health", 8501, contains="ok", within=180),
                Sleep(),
                Get("serves its page after a sleep", "/", 8501, contains="Streamlit", within=60),
            ],
            {"app.py": "import streamlit as st\nst.title('hello')\n"},
            long=True,
        ),
        Image(
            "gradio",
            "Gradio",
            PIP
            + 'RUN pip install gradio\nWORKDIR /app\nCOPY app.py .\nEXPOSE 7860\nENV GRADIO_SERVER_NAME=0.0.0.0 GRADIO_ANALYTICS_ENABLED=False\nCMD ["python3", "app.py"]\n',
            [
                Get("serves its configuration", "/config", 7860, contains='"version"', within=240),
                Sleep(),
                Get("and after a sleep", "/config", 7860, within=60),
            ],
            {"app.py": "import gradio as gr\ngr.Interface(lambda name: 'hello ' + name, 'text', 'text').launch()\n"},
            long=True,
        ),
        Image(
            "jupyterlab",
            "JupyterLab with a token of its own",
            PIP + "RUN pip install jupyterlab\nRUN useradd -m jovyan\nUSER jovyan\nWORKDIR /home/jovyan\nEXPOSE 8888\n"
            'CMD ["jupyter", "lab", "--ip=0.0.0.0", "--port=8888", "--no-browser", "--IdentityProvider.token=secret", "--ServerApp.allow_remote_access=True"]\n',
            [
                Get("its API answers", "/api", 8888, contains="version", within=180),
                Get("a kernel starts", "/api/kernels", 8888, 201, '"id"', "POST", b"{}", JUPYTER, within=60),
                Sleep(),
                Get("the kernel is there after a sleep", "/api/kernels", 8888, contains='"execution_state"', fields=JUPYTER, within=60),
            ],
            long=True,
        ),
        Image(
            "celery-redis",
            "a Celery worker and Redis under supervisord, beside a Flask front",
            PIP + "RUN dnf install -y redis6 && pip install celery[redis] packaging flask supervisor\nWORKDIR /app\nCOPY . .\nEXPOSE 8080\n"
            'CMD ["supervisord", "-n", "-c", "supervisord.conf"]\n',
            [
                Get("a job is done by the worker", "/add?x=20&y=22", contains="42", within=180),
                Sleep(),
                Get("and after a sleep", "/add?x=1&y=2", contains="3", within=60),
            ],
            {
                "work.py": "from celery import Celery\napp = Celery('work', broker='redis://127.0.0.1', backend='redis://127.0.0.1')\n@app.task\ndef add(x, y):\n    return x + y\n",
                "web.py": "import flask, work\napp = flask.Flask(__name__)\n@app.get('/add')\ndef add():\n    a = flask.request.args\n"
                "    return str(work.add.delay(int(a['x']), int(a['y'])).get(timeout=25))\n",
                "supervisord.conf": "[supervisord]\nnodaemon=true\nuser=root\n"
                + "".join(
                    f"[program:{name}]\ncommand={command}\nstdout_logfile=/dev/stdout\nstdout_logfile_maxbytes=0\nredirect_stderr=true\n"
                    for name, command in (
                        ("redis", "redis-server"),
                        ("worker", "celery -A work worker --concurrency=1"),
                        ("web", "flask --app web run --host=0.0.0.0 --port=8080"),
                    )
                ),
            },
            long=True,
        ),
        Image(
            "grpc-python",
            "a gRPC server with the health service",
            PIP
            + 'RUN pip install grpcio grpcio-health-checking\nWORKDIR /app\nCOPY app.py .\nEXPOSE 50051\nCMD ["python3", "-u", "app.py"]\n',
            [Call("a client's call is answered", _is_healthy), Sleep(), Call("and after a sleep, as the call that wakes", _is_healthy)],
            {
                "app.py": "from concurrent import futures\nimport grpc\nfrom grpc_health.v1 import health, health_pb2_grpc\n"
                "server = grpc.server(futures.ThreadPoolExecutor(4))\nhealth_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)\n"
                "server.add_insecure_port('0.0.0.0:50051')\nserver.start()\nserver.wait_for_termination()\n"
            },
            long=True,
        ),
        Image(
            "scipy-numpy",
            "NumPy and SciPy",
            PIP
            + "RUN pip install numpy scipy flask\nCOPY app.py /app.py\nEXPOSE 8080\nCMD flask --app /app run --host 0.0.0.0 --port 8080\n",
            [Get("solves a system of equations", contains="x = 2", within=240)],
            {
                "app.py": "import numpy, scipy.linalg, flask\napp = flask.Flask(__name__)\n@app.get('/')\ndef root():\n"
                "    return f'x = {scipy.linalg.solve(numpy.array([[3.0]]), numpy.array([6.0]))[0]:.0f}'\n"
            },
            long=True,
        ),
        Image(
            "native-wheel",
            "a package that compiles C in the build",
            PIP
            + 'RUN dnf install -y gcc python3-devel && pip install --no-binary :all: markupsafe\nCOPY app.py /app.py\nEXPOSE 8080\nCMD ["python3", "/app.py"]\n',
            [Get("the compiled part is used", contains="_speedups", within=120)],
            {
                "app.py": _serve(
                    "import markupsafe._speedups as s\nclass H(http.server.BaseHTTPRequestHandler):\n    def do_GET(self):\n        self.send_response(200)\n"
                    "        self.end_headers()\n        self.wfile.write(s.__name__.encode())\nhttp.server.HTTPServer(('', 8080), H).serve_forever()\n"
                )
            },
            long=True,
        ),
        Image(
            "mkdocs",
            "a site made in the build, served by http.server as an unprivileged user",
            "FROM public.ecr.aws/lambda/microvms:al2023-minimal AS site\nRUN dnf install -y python3 python3-pip && pip install mkdocs\n"
            "COPY <<END /site/mkdocs.yml\nsite_name: Torpor\nEND\nCOPY <<END /site/docs/index.md\n# Hello\nEND\nRUN cd /site && mkdocs build\n"
            + BASE
            + 'RUN dnf install -y python3\nCOPY --from=site --chown=1000:1000 /site/site /www\nUSER 1000\nEXPOSE 8080\nCMD ["python3", "-m", "http.server", "-d", "/www", "8080"]\n',
            [Get("serves the site", contains="<h1[^>]*>Hello", within=60)],
            long=True,
        ),
        Image(
            "sandbox-interpreter",
            "an agent's sandbox: runs code that it is sent, as another user",
            BASE
            + 'RUN dnf install -y python3 util-linux && useradd -m sandbox\nCOPY app.py /app.py\nEXPOSE 8080\nCMD ["python3", "-u", "/app.py"]\n',
            [
                Get(
                    "runs code as another user",
                    "/",
                    8080,
                    200,
                    "sandbox 42",
                    "POST",
                    b"import getpass; print(getpass.getuser(), 6 * 7)",
                    within=60,
                ),
                Sleep(),
                Get("and after a sleep", "/", 8080, 200, "7", "POST", b"print(3 + 4)", within=60),
            ],
            {
                "app.py": _serve(
                    "import subprocess\nclass H(http.server.BaseHTTPRequestHandler):\n    def do_POST(self):\n"
                    "        code = self.rfile.read(int(self.headers['content-length']))\n"
                    "        done = subprocess.run(['runuser', '-u', 'sandbox', '--', 'python3', '-c', code], capture_output=True, timeout=20)\n"
                    "        self.send_response(200)\n        self.end_headers()\n        self.wfile.write(done.stdout + done.stderr)\n"
                    "http.server.ThreadingHTTPServer(('', 8080), H).serve_forever()\n"
                )
            },
            long=True,
        ),
    ],
    corpus=True,
)
