"""Make a small real corpus from the running interpreter's standard library: no download, the same every time.

    python scripts/quickstart_corpus.py OUT_DIR

writes two sources, each as JSON lines {"text", "source"} in a training and a held-out part:
`code`, one document per source file, and `prose`, the docstrings of one file per document.
About 3% of the files are held out, whole, so that no docstring of a held-out file is trained on.
"""

import argparse
import ast
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Not the library itself: installed packages, tests (large, and absent from some installs) and caches.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Written when the interpreter was built: they differ between machines and spell out their paths.
_BUILD_PREFIXES = ("_sysconfigdata", "config-")
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
        raise ValueError(f"no Python sources under {root}; use a Python whose library has its .py files")

    for name, lines in documents.items():
        content = "".join(lines).encode()
        path, temporary = out_dir / f"{name}.jsonl", out_dir / f"{name}.jsonl.tmp"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        print(f"{path}: {len(lines)} documents, {len(content) / 1e6:.1f} MB")


def sources(root: Path) -> Iterator[tuple[str, str]]:
    """Relative path and content of each file, sorted by path: the filesystem's order does not matter."""
    names: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = filter(_is_library, subfolders)
        names += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in files
            if name.endswith(".py") and _is_library(name)
        ]
    for name in sorted(names):
        try:
            yield name, (root / name).read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):  # another encoding, or a dangling link
            continue


def _is_library(name: str) -> bool:
    return name not in _SKIPPED_FOLDERS and not name.startswith(_BUILD_PREFIXES)


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
        main(Path(sysconfig.get_path("stdlib")), parser.parse_args().out_dir)
    except (ValueError, OSError) as error:
        parser.error(str(error))
