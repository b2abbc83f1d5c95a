"""A gRPC service whose messages are bytes as they are: a chat with a memory, a unary call, and a stream of the server's."""

import time
from concurrent import futures

import grpc

said = []


def total(request, context):
    return str(len(said)).encode()


def chat(requests, context):
    mine = 0
    for request in requests:
        said.append(request)
        mine += 1
        yield b"%d %d %s" % (mine, len(said), request)


def watch(request, context):
    number = 0
    while context.is_active():
        yield str(number).encode()
        number += 1
        time.sleep(0.2)


calls = {
    "Total": grpc.unary_unary_rpc_method_handler(total),
    "Chat": grpc.stream_stream_rpc_method_handler(chat),
    "Watch": grpc.unary_stream_rpc_method_handler(watch),
}
server = grpc.server(futures.ThreadPoolExecutor(8))
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("chat.Chat", calls)])
server.add_insecure_port("0.0.0.0:50051")
server.start()
server.wait_for_termination()
