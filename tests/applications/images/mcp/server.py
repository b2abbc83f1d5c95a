"""An MCP server with a memory for each session, over streamable HTTP."""

from mcp.server.fastmcp import Context, FastMCP
from mcp.server.transport_security import TransportSecuritySettings

server = FastMCP("notes", host="0.0.0.0", port=8000, transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False))
notes = {}


@server.tool()
def remember(words: str, context: Context) -> int:
    """Keeps words for this session; returns how many it has."""
    mine = notes.setdefault(id(context.session), [])
    mine.append(words)
    return len(mine)


@server.tool()
def recall(context: Context) -> str:
    return " ".join(notes.get(id(context.session), []))


server.run(transport="streamable-http")
