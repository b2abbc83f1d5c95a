"""A game's server: what a player says, all players hear, in one order; and ticks, when they are asked for."""

import asyncio

from aiohttp import WSMsgType, web

players = set()
order = 0


async def tell(words):
    for player in list(players):
        await player.send_json(words)


async def play(request):
    global order
    socket = web.WebSocketResponse(heartbeat=60)
    await socket.prepare(request)
    players.add(socket)
    await socket.send_json({"players": len(players)})
    async for message in socket:
        if message.type == WSMsgType.TEXT and message.data.startswith("ticks "):
            request.app["ticking"] = asyncio.create_task(tick(int(message.data.split()[1])))
        elif message.type == WSMsgType.TEXT:
            order += 1
            await tell({"order": order, "said": message.data})
    players.discard(socket)
    return socket


async def tick(count):
    for number in range(count):
        await tell({"tick": number})
        await asyncio.sleep(0.1)


app = web.Application()
app.add_routes([web.get("/play", play)])
web.run_app(app, port=8080)
