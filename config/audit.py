"""`make audit`: holds the lock against the database of known faults, by pip-audit, and says so where that database was not to be had.

By itself pip-audit ends well where it could ask about no package at all. Status 0: nothing is known of any; 1: faults, a line each; 2: not
all could be asked about."""

from __future__ import annotations

import json
import subprocess
import sys

_SECONDS = 600


def audit(program: str, lock: str) -> tuple[int, list[str]]:
    """Returns a status, and lines that say why."""
    words = [program, "--disable-pip", "--require-hashes", "--progress-spinner", "off", "--format", "json", "-r", lock]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
        packages = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return 2, [f"audit: the database of known faults could not be had: no answer within {_SECONDS} s"]
    except (OSError, ValueError, KeyError) as error:
        said = str(error) if isinstance(error, OSError) else (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return 2, [f"audit: the database of known faults could not be had: {said}"]
    faults = [
        f"audit: {one['name']} {one['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions']) or 'no release'}"
        for one in packages
        for fault in one.get("vulns", [])
    ]
    skipped = [one for one in packages if "skip_reason" in one]
    if skipped:
        of = f"for {len(skipped)} of {len(packages)} packages"
        return 2, [*faults, f"audit: the database of known faults could not be had {of}: {skipped[0]['skip_reason']}"]
    return (1, faults) if faults else (0, [f"audit: nothing is known of the lock's {len(packages)} packages"])


if __name__ == "__main__":
    status, lines = audit(*sys.argv[1:])
    print("\n".join(lines), file=sys.stderr if status else sys.stdout)
    sys.exit(status)
