import duckdb
from flask import Flask, jsonify, request, send_file

app = Flask(__name__)
database = duckdb.connect("/app/data.duckdb")


@app.post("/make")
def make():
    """Rows in a table, and as many in a temporary one."""
    rows = int(request.args["rows"])
    database.execute(f"create table kept as select range as n, hash(range) as h from range({rows})")
    database.execute(f"create temporary table passing as select range as n from range({rows})")
    return "made"


@app.get("/sum")
def sums():
    return jsonify([int(database.execute(f"select sum(n) from {table}").fetchone()[0]) for table in ("kept", "passing")])


@app.put("/csv")
def csv():
    with open("/tmp/in.csv", "wb") as file:
        while piece := request.stream.read(65536):
            file.write(piece)
    database.execute("create table csv as select * from read_csv('/tmp/in.csv')")
    return jsonify(database.execute("select count(*), sum(a)::bigint from csv").fetchone())


@app.get("/parquet")
def parquet():
    database.execute("copy csv to '/tmp/out.parquet' (format parquet, compression uncompressed)")
    return send_file("/tmp/out.parquet")
