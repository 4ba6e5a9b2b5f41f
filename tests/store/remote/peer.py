"""An engine's nixl tier in a process of its own: `python -m tests.store.remote.peer URL CAPACITY`.

Reads a line of numbers and puts the chunks of `kept.spec` of these; answers with the outcomes.
`churn` puts ever others, in turn, until the next line.
"""

from __future__ import annotations

import json
import select
import sys
from itertools import count

from lmc.store.remote.nixl import NixlConfig
from tests.store.disk.chunks import LAYOUT
from tests.store.remote.kept import CHURNED, large, put


def main() -> None:
    url, prefix, capacity = sys.argv[1:]
    tier = NixlConfig(url, int(capacity), prefix=prefix, timeout_s=5.0).open(LAYOUT)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "churn":
            for i in count():
                put(tier, large(i % CHURNED))
                if select.select([sys.stdin], [], [], 0)[0]:
                    break
        else:
            print(json.dumps(put(tier, *(large(int(i)) for i in line.split()))), flush=True)
    tier.close()


if __name__ == "__main__":
    main()
