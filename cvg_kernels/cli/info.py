"""`cvg-kernels info`: what is installed, what it runs on, which kernels work, and which table `auto` goes by."""

from __future__ import annotations

import argparse
import json

from cvg_kernels.environment import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `info`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(options: argparse.Namespace) -> int:
    """Prints the report."""
    facts = report()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(facts["summary"])
    tables = {title: facts[title] for title in ("versions", "devices", "native modules")}
    for device, rows in facts["auto"].items():
        tables[f"auto on {device}"] = rows
    for title, rows in tables.items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:16}{value}")
    for operation, kernels in facts["kernels"].items():
        print(f"kernels of {operation}")
        for backend, line in kernels.items():
            print(f"  {backend:20}{line['available']}")
            print(f"  {'':20}on {', '.join(line['devices'])}: {', '.join(line['dtypes'])}")
            for limit in line["limits"]:
                print(f"  {'':20}takes {limit}")
    return 0
