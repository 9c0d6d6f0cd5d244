"""Make a small real corpus of SymPy, which torch brings: no download, and the same for every Python.

    python scripts/quickstart_corpus.py OUT_DIR

writes two sources, each as JSON lines {"text", "source"} in a training and a held-out part:
`code`, one document per source file, and `prose`, the docstrings of one file per document.
About 3% of the files are held out, whole, so that no docstring of a held-out file is trained on.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# Tests, long lists of equations to time, tables that a parser generator wrote, and caches.
_SKIPPED_FOLDERS = {"tests", "benchmarks", "_antlr", "__pycache__"}
_HELD_OUT_PER_MILLE = 30
_SHORTEST_PROSE = 200  # characters


def main(root: Path, out_dir: Path) -> None:
    """Write {code,prose}.{train,heldout}.jsonl from the Python files under root; print a line for each.

    Raises:
        ValueError: there are none. OSError: out_dir cannot be written.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    documents: dict[str, list[str]] = {
        f"{source}.{part}": [] for source in ("code", "prose") for part in ("train", "heldout")
    }
    for name, code in sources(root):
        part = "heldout" if is_held_out(name) else "train"
        if code.strip():
            documents[f"code.{part}"].append(_line(code, name))
        prose = _docstrings(code)
        if len(prose) >= _SHORTEST_PROSE:
            documents[f"prose.{part}"].append(_line(prose, name))
    if not documents["code.train"]:
        raise ValueError(f"no Python sources under {root}")

    for name, lines in documents.items():
        content = "".join(lines).encode()
        path, temporary = out_dir / f"{name}.jsonl", out_dir / f"{name}.jsonl.tmp"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        print(f"{path}: {len(lines)} documents, {len(content) / 1e6:.1f} MB")


def folder_of_sympy() -> Path:
    """Raises ValueError if it is not installed."""
    found = importlib.util.find_spec("sympy")
    if found is None or found.origin is None:
        raise ValueError("SymPy is not installed, although torch needs it: pip install sympy")
    return Path(found.origin).parent


def sources(root: Path) -> Iterator[tuple[str, str]]:
    """Relative path and content of each file, sorted by path: the filesystem's order does not matter."""
    names: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    for name in sorted(names):
        try:
            yield name, (root / name).read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):  # another encoding, or a dangling link
            continue


def is_held_out(name: str) -> bool:
    """By a hash of the path, so that a file stays on its side when other files are added or removed."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 1000 < _HELD_OUT_PER_MILLE


def _docstrings(code: str) -> str:
    """The docstrings of the module, its classes and functions in the order of the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings that are not ours
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _line(text: str, source: str) -> str:
    return json.dumps({"text": text, "source": source}) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    try:
        main(folder_of_sympy(), parser.parse_args().out_dir)
    except (ValueError, OSError) as error:
        parser.error(str(error))
