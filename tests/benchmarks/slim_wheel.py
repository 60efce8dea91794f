"""Leave out of a Ray wheel what a driver and its actors do without, for machines that are handed few bytes.

    python tests/benchmarks/slim_wheel.py WHEEL TARGET

Java, source maps, the libraries for reinforcement learning, serving and tuning, and the dashboard's pages go: half of
the bytes. Never for users.
"""

import argparse
import base64
import csv
import hashlib
import io
import re
import zipfile
from pathlib import Path

LEFT_OUT = re.compile(
    r"^ray/(jars|rllib|llm|serve|tune|train|dashboard/client/build)/|\.js\.map$|^ray/cpp/|^ray/core/generated/.*\.pyi$"
)


def slim(source, target):
    """Write a wheel anew, without what is left out, and with a record of what is there."""
    record, rows = None, []
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for item in whole.infolist():
            if item.filename.endswith(".dist-info/RECORD"):
                record = item.filename
            elif not LEFT_OUT.search(item.filename):
                data = whole.read(item)
                new.writestr(item, data, zipfile.ZIP_DEFLATED, 9)
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                rows.append((item.filename, f"sha256={digest}", len(data)))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*rows, (record, "", "")])
        new.writestr(record, text.getvalue())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    slim(options.wheel, options.target)
