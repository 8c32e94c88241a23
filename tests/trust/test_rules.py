"""What the code itself must keep to: nothing unpickles, and every file is written in the one way."""

from __future__ import annotations

import ast
from pathlib import Path

import cvg_kernels

PACKAGE = Path(cvg_kernels.__file__).parent
#: Where something that these rules forbid is right: file → what, and why.
UNPICKLES: dict[str, set[str]] = {}
WRITES = {
    "writing.py": {"write_text", "save_file", "open"},  # the one way itself, and logs that are only added to
    "worklist.py": {"open"},  # locks, and a log that is only added to
    "bench/harness.py": {"write_text"},  # /proc
    "capturing/viewer.py": {"save"},  # a picture into memory, which becomes text of the page
}
_WRITERS = {
    "write_text",
    "write_bytes",
    "savefig",
    "save_file",
    "save_pretrained",
    "save_config",
    "imwrite",
    "imsave",
    "tofile",
    "dump",
    "save",
    "savez",
}


def calls(tree: ast.AST, inside: bool = False):
    """Every call of a file, with whether it stands in a `with written(…)`."""
    for node in ast.iter_child_nodes(tree):
        within = inside
        if isinstance(node, ast.With):
            names = {
                ast.unparse(item.context_expr.func).rpartition(".")[2]
                for item in node.items
                if isinstance(item.context_expr, ast.Call)
            }
            within = inside or bool(names & {"written", "written_folder"})
        if isinstance(node, ast.Call):
            yield node, within
        yield from calls(node, within)


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


def test_nothing_unpickles():
    found = {}
    for file, tree in files():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                wrong = {n for n in names if n.split(".")[0] in ("pickle", "cPickle", "dill", "joblib", "shelve")}
                found.setdefault(file, set()).update(wrong)
        for call, _ in calls(tree):
            name, options = name_of(call), {word.arg for word in call.keywords}
            if name in ("torch.load", "np.load", "numpy.load", "eval", "exec") or "allow_pickle" in options:
                found.setdefault(file, set()).add(name)
            if name.endswith(".from_pretrained"):
                given = {word.arg: ast.unparse(word.value) for word in call.keywords}
                local = "local_files_only" in given or None in given  # None: `**options`, of `options_for`
                if not local or given.get("trust_remote_code", "False") != "False":
                    found.setdefault(file, set()).add(f"{ast.unparse(call)[:80]}")
    assert {file: names for file, names in found.items() if names} == UNPICKLES


def test_every_file_is_written_whole():
    found = {}
    for file, tree in files():
        for call, within in calls(tree):
            if name_of(call) == "Image.open":  # PIL only reads by it
                continue
            name = name_of(call).rpartition(".")[2]
            mode = [ast.unparse(one) for one in call.args[1:2] + [w.value for w in call.keywords if w.arg == "mode"]]
            if name_of(call).endswith(".open"):
                mode = [ast.unparse(one) for one in call.args[:1]]
            opens = name == "open" and any(set(one) & set("wax+") for one in mode)
            if not within and (
                opens or (name in _WRITERS and isinstance(call.func, ast.Attribute)) or name == "save_file"
            ):
                found.setdefault(file, set()).add(name)
    extra = {file: names - WRITES.get(file, set()) for file, names in found.items()}
    methods = {"save"}  # of a checkpoint and a classifier, which write in the one way themselves
    extra = {
        file: names - (methods if file.startswith(("shapes/", "training/")) else set())
        for file, names in extra.items()
    }
    assert {file: names for file, names in extra.items() if names} == {}
