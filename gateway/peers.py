"""Who may call what of whom. A process that was taken over has its peers' sockets, and on them what it needs for its own work alone."""

from __future__ import annotations

from typing import Final

# Edge workers speak with strangers.
EDGE_ASKS_VMM: Final = frozenset({"sockets"})
EDGE_ASKS_CONTROL: Final = frozenset({"hello", "lookup", "resume", "counters", "listened", "faults", "shell", "activity"})
VMM_ASKS_CONTROL: Final = frozenset({"ended"})
# Relays, which read what guests send.
RELAY_ASKS_CONTROL: Final = frozenset({"decide", "ended", "walls"})
# The embedded object store, which does too.
STORE_ASKS_CONTROL: Final = frozenset({"store_key"})
# The host's root, through `torpor`.
ROOT_ASKS_CONTROL: Final = frozenset(
    {
        "microvm_log", "egress_log", "traces", "tiers", "recover", "accounts", "account_create", "account_delete", "keys", "key_create",
        "key_delete", "roles", "role_put", "role_delete", "quota", "tokens_revoke", "tokens_rotate",
    }
)  # fmt: skip
