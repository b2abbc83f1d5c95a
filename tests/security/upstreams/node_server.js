// Node's server of HTTP/1.1, which says what it has received, as python_servers.py does.
"use strict";
let seen = [];

function answer(request, response) {
  const pieces = [];
  const end = () => {
    const body = Buffer.concat(pieces).toString("latin1"), fields = [];
    for (let at = 0; at < request.rawHeaders.length; at += 2)
      fields.push([request.rawHeaders[at].toLowerCase(), request.rawHeaders[at + 1]]);
    let said = request.url;
    if (request.url === "/log") {
      said = JSON.stringify(seen);
      seen = [];
    } else {
      seen.push({ connection: request.socket.remotePort, method: request.method, target: request.url, fields, body });
    }
    response.writeHead(200, { "Content-Length": Buffer.byteLength(said) });
    response.end(said);
  };
  if (request.url.startsWith("/early")) return end();
  request.on("data", (piece) => pieces.push(piece));
  request.on("end", end);
}

const server = require("node:http").createServer(answer);
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
