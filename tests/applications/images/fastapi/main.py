import asyncio
from contextlib import asynccontextmanager

from fastapi import FastAPI, Header
from fastapi.responses import StreamingResponse

ticks = []
count = 0


async def tick():
    while True:
        ticks.append(len(ticks))
        await asyncio.sleep(0.2)


@asynccontextmanager
async def lifespan(app):
    task = asyncio.create_task(tick())
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/count")
async def add():
    global count
    count += 1
    return {"count": count}


@app.get("/events")
async def events(last_event_id: int | None = Header(None)):
    """Goes on behind the last event that the client has had."""

    async def stream():
        yield "retry: 5000\n\n"
        at = len(ticks) if last_event_id is None else last_event_id + 1
        while True:
            while at < len(ticks):
                yield f"id: {at}\ndata: tick {ticks[at]}\n\n"
                at += 1
            await asyncio.sleep(0.05)

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
