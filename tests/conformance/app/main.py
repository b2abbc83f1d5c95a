"""What the conformance suite talks to: HTTP/1.1 on 8080 (tests/app), the same over TLS on 8443, WebSocket on 8081, gRPC on 50051."""

import asyncio
import ssl
import time

import app
import grpc
import websockets

NAME = "grpc.testing.TestService"


async def echo(socket):
    async for message in socket:
        await socket.send(message)


async def unary(request, context):
    """Echoes, with the metadata and the status that the request's first word asks for."""
    for name, value in context.invocation_metadata():
        if name == "x-grpc-test-echo-initial":
            await context.send_initial_metadata(((name, value),))
        elif name == "x-grpc-test-echo-trailing-bin":
            context.set_trailing_metadata(((name, value),))
    if request.startswith(b"status "):
        code, _, message = request[7:].partition(b" ")
        await context.abort(next(one for one in grpc.StatusCode if one.value[0] == int(code)), message.decode())
    if request.startswith(b"sleep "):
        await asyncio.sleep(float(request[6:]))
    return request


async def client_streaming(requests, context):
    total = 0
    async for one in requests:
        total += len(one)
    return str(total).encode()


async def server_streaming(request, context):
    for size in request.split(b","):
        yield b"x" * int(size)


async def both(requests, context):
    async for one in requests:
        if one.startswith(b"status "):
            await context.abort(grpc.StatusCode.UNKNOWN, "asked for")
        if one.startswith(b"sleep "):
            await asyncio.sleep(float(one[6:]))
        yield one


async def serve_grpc():
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
    handlers = {
        "EmptyCall": grpc.unary_unary_rpc_method_handler(unary),
        "UnaryCall": grpc.unary_unary_rpc_method_handler(unary),
        "StreamingInputCall": grpc.stream_unary_rpc_method_handler(client_streaming),
        "StreamingOutputCall": grpc.unary_stream_rpc_method_handler(server_streaming),
        "FullDuplexCall": grpc.stream_stream_rpc_method_handler(both),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
    server.add_insecure_port("0.0.0.0:50051")
    await server.start()
    return server


async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("server.pem")
    await asyncio.start_server(app.serve, "0.0.0.0", 8443, ssl=context)
    await websockets.serve(echo, "0.0.0.0", 8081, max_size=1 << 24, ping_interval=None)
    server = await serve_grpc()
    asyncio.create_task(app.tick())
    await asyncio.start_server(app.serve, "0.0.0.0", 8080)
    print("serving", time.time(), flush=True)
    await server.wait_for_termination()


asyncio.run(main())
