"""`cvg-kernels info`: what is installed, what it runs on, and which backends work."""

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
    tables = {title: facts[title] for title in ("versions", "devices", "native modules")}
    tables |= {f"backends of {name}": answers for name, answers in facts["backends"].items()}
    for title, rows in tables.items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:16}{value}")
    return 0
