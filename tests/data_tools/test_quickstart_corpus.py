"""The quickstart's corpus: which files it takes, and that nothing held out is in the training part."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_tools.datasets import records

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart_corpus.py"
MAKE = f"""
import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})
from pathlib import Path
from quickstart_corpus import main
main(Path(sys.argv[1]), Path(sys.argv[2]))
"""
MODULE = '"""{0}"""\n\n\nclass A:\n    def f(self):\n        """Second:\n\n        a\n            b\n        """\n'


def make(root: Path, out_dir: Path) -> dict[str, list[dict[str, str]]]:
    subprocess.run([sys.executable, "-c", MAKE, str(root), str(out_dir)], check=True, capture_output=True)
    return {path.stem: records(path) for path in out_dir.iterdir()}


def test_files_and_docstrings(tmp_path: Path) -> None:
    root, long = tmp_path / "lib", "First." + " More." * 40
    files = {
        "good.py": MODULE.format(long).encode(),
        "short.py": b'"""Too short."""\nx = 1\n',
        "empty.py": b"",
        "latin.py": b"# \xe9\n",
        "python2.py": b'"""' + long.encode() + b'"""\nprint "x"\n',
        "deep/er.py": b"y = 2\n",
        "notes.txt": b"no",
        **{f"{folder}/x.py": b"z = 3\n" for folder in ("tests", "a/tests", "benchmarks", "b/_antlr")},
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    corpus = make(root, tmp_path / "out")
    assert corpus["code.heldout"] == corpus["prose.heldout"] == []
    taken = ["deep/er.py", "good.py", "python2.py", "short.py"]
    assert corpus["code.train"] == [{"text": files[name].decode(), "source": name} for name in taken]
    prose = f"{long}\n\nSecond:\n\na\n    b"
    assert corpus["prose.train"] == [{"text": prose, "source": "good.py"}]


def test_sympy(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "out"], check=True, capture_output=True, text=True)
    names = ["code.train", "code.heldout", "prose.train", "prose.heldout"]
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        documents = (tmp_path / "out" / f"{name}.jsonl").read_bytes().count(b"\n")
        assert line.startswith(f"{tmp_path}/out/{name}.jsonl: {documents} documents, ")
    size = {name: (tmp_path / "out" / f"{name}.jsonl").stat().st_size for name in names}
    assert 5e6 < size["code.train"] < 40e6
    assert 5e5 < size["prose.train"] < 2e7
    sources = {name: {record["source"] for record in records(tmp_path / "out" / f"{name}.jsonl")} for name in names}
    heldout = sources["code.heldout"] | sources["prose.heldout"]
    assert 0.01 < len(sources["code.heldout"]) / len(sources["code.train"]) < 0.1
    assert not heldout & (sources["code.train"] | sources["prose.train"])


def test_failures_are_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed = subprocess.run([sys.executable, SCRIPT, tmp_path / "file"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("quickstart_corpus.py: error: ")

    (tmp_path / "lib").mkdir()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        make(tmp_path / "lib", tmp_path / "out")
    assert f"ValueError: no Python sources under {tmp_path}/lib" in caught.value.stderr.decode()
