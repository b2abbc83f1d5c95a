"""The keys of manifests that tests have, and processes that they start beside the service."""

from vmm import seals

KEYS = seals.Keys("0badcafe", {"0badcafe": "5a" * 32})
