"""PostgreSQL with a writer that never stops: each row is its predecessor's number plus one, and says so to who asks."""

import glob
import http.server
import json
import subprocess
import threading
import time

import psycopg2

BIN = glob.glob("/usr/lib/postgresql/*/bin")[0]
told = {"committed": 0, "errors": []}


def connect():
    return psycopg2.connect(host="127.0.0.1", user="postgres", dbname="postgres")


def start():
    subprocess.Popen(["su", "postgres", "-c", f"{BIN}/postgres -D /data -k /tmp -c shared_buffers=16MB"])
    while True:
        try:
            connect().close()
            return
        except psycopg2.OperationalError:
            time.sleep(0.1)


def write():
    """One connection for ever: it must live through every sleep."""
    start()
    link = connect()
    link.autocommit = True
    cursor = link.cursor()
    cursor.execute("create table rows (number integer primary key, at timestamptz default now(), filler text)")
    number = 0
    while True:
        number += 1
        try:
            cursor.execute("insert into rows (number, filler) values (%s, repeat(md5(%s::text), 8))", (number, number))
        except psycopg2.Error as error:
            told["errors"].append(str(error))
            return
        told["committed"] = number
        time.sleep(0.005)


def check():
    """What the database itself says of its files: every index against its table, every page against its checksum."""
    with connect() as link, link.cursor() as cursor:
        cursor.execute("select count(*), min(number), max(number) from rows")
        count, least, most = cursor.fetchone()
        cursor.execute("select checksum_failures from pg_stat_database where datname = 'postgres'")
        broken = cursor.fetchone()[0]
    done = subprocess.run([f"{BIN}/pg_amcheck", "-U", "postgres", "-h", "127.0.0.1", "--install-missing", "--heapallindexed", "postgres"],
                          check=False, capture_output=True, text=True)  # fmt: skip
    return {"count": count, "least": least, "most": most, "broken": broken, "amcheck": done.returncode, "words": done.stdout + done.stderr}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(check() if self.path == "/check" else told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


threading.Thread(target=write, daemon=True).start()
http.server.ThreadingHTTPServer(("", 8080), Handler).serve_forever()
