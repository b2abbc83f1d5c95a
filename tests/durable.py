"""An object store that keeps what it has (nanio: buckets are directories), with the keys of an instance."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from service import free_port

_SECONDS = 60.0


class DurableStore:
    def __init__(self, directory: Path, key: str, secret: str) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._directory = directory
        self._keys = key, secret
        self._environment = {**os.environ, "NANIO_ACCESS_KEY": key, "NANIO_SECRET_KEY": secret}
        self._process: subprocess.Popen[bytes] | None = None

    def client(self) -> Any:
        return boto3.client(
            "s3", region_name="us-east-1", endpoint_url=self.endpoint, aws_access_key_id=self._keys[0], aws_secret_access_key=self._keys[1],
            config=Config(s3={"addressing_style": "path"}),
        )  # fmt: skip

    def start(self) -> None:
        """Returns when it answers."""
        where = ["--data-dir", str(self._directory), "--host", "127.0.0.1", "--port", str(self.port)]
        command = [sys.executable, "-m", "nanio", "serve", *where, "--no-access-log", "--log-level", "error"]
        self._process = subprocess.Popen(command, env=self._environment)
        deadline = time.monotonic() + _SECONDS
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert time.monotonic() < deadline and self._process.poll() is None, "the object store does not start"
            time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
