"""Run files, phase files, model files, overrides and layouts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tests.malformed.world import LONG, Case, World

TextEdit = Callable[[str], str | bytes]


def _text(name: str, edit: TextEdit, said: str) -> Case:
    return Case(f"file, {name}", lambda world: world.train_text(edit), said)


def _value(key: str, value: Any, said: str) -> Case:
    shown = repr(value) if len(repr(value)) < 30 else repr(value)[:30]
    return Case(f"{key}={shown}", lambda world: world.train(**{key: value}), rf"run\.yaml: {said}")


def _override(override: str, said: str) -> Case:
    return Case(f"override {override[:40]!r}", lambda world: world.train(override), said)


def _named_file(key: str, name: str, content: bytes | None, said: str) -> Case:
    """content: None for a folder."""

    def make(world: World) -> list[Any]:
        world.write("other.yaml", content) if content is not None else (world / "other.yaml").mkdir()
        return world.train(**{key: "other.yaml"})

    return Case(f"{key} file, {name}", make, said)


def _layout(ranks: str, changes: dict[str, Any], said: str) -> Case:
    def make(world: World) -> list[Any]:
        return world.train("--dry-run", f"--world={ranks}", **changes)

    return Case(f"layout of {ranks}, {changes}", make, said)


def _at(key: str, path: str) -> Callable[[World], list[Any]]:
    return lambda world: world.train("--dry-run", **{key: str(world / path)})


def _arguments(name: str, make: Callable[[World], list[Any]], said: str) -> Case:
    return Case(f"arguments, {name}", make, said)


def _show(arguments: list[Any]) -> list[Any]:
    """Of a training command: its run file, shown."""
    return ["jetmoe", "config", "show", *arguments[1:]]


def _loop(world: World) -> list[Any]:
    os.symlink(world / "run.yaml", world / "run.yaml")
    return ["pretrain", world / "run.yaml"]


def _long_file(world: World) -> list[Any]:
    return ["pretrain", world / ("x" * 300 + ".yaml")]


def _bomb(levels: int = 9) -> str:
    lines = ["b0: &b0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


def _merge_bomb(levels: int = 9) -> str:
    lines = ["b0: &b0 {x: 1}"]
    lines += [f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 9)}]}}" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


INVALID = r"run\.yaml:.* not valid YAML: "
TEXTS = [
    _text("comments alone", lambda text: "# nothing\n# here\n", "found nothing"),
    _text("two documents", lambda text: f"{text}---\n{text}", INVALID),
    _text("a number", lambda text: "42\n", r"run\.yaml: expected `key: value` lines at the top, found int"),
    _text("a date", lambda text: "2026-11-22\n", r"run\.yaml: expected .* found date"),
    _text("true", lambda text: "true\n", r"run\.yaml: expected .* found bool"),
    _text("UTF-16 with its mark", lambda text: text.encode("utf-16"), r"run\.yaml: not a UTF-8 text file"),
    _text("UTF-16 without", lambda text: text.encode("utf-16-le"), INVALID),
    _text("Latin-1", lambda text: f"# Läuft\n{text}".encode("latin-1"), r"run\.yaml: not a UTF-8 text file"),
    _text("gzip", lambda text: b"\x1f\x8b\x08\x00" + bytes(range(128, 256)), "not a UTF-8 text file"),
    _text("a mark alone", lambda text: b"\xef\xbb\xbf", "found nothing"),
    _text("a zero byte", lambda text: text.replace("small", "sm\0all", 1), INVALID),
    _text("a control character", lambda text: text + "seed: \x01\n", INVALID),
    _text("JSON cut short", lambda text: '{"name": "small", "model": {', INVALID),
    _text("a quote that does not end", lambda text: text + 'tokenizer: "data\n', INVALID),
    _text("two colons", lambda text: text + "seed: 1: 2\n", INVALID),
    _text("an indent too many", lambda text: text + "   seed: 1\n", INVALID),
    _text("a tab in a list", lambda text: text + "data:\n\t- x\n", INVALID),
    _text("a backtick", lambda text: text + "seed: `date`\n", INVALID),
    _text("an unknown directive", lambda text: f"%YAML 9.9\n---\n{text}", INVALID),
    _text("a key twice", lambda text: text + "precision: bf16\n", "line .*'precision' is there twice"),
    _text(
        "a key twice, further in",
        lambda text: text.replace("  top_k: 2\n", "  top_k: 2\n  hidden_size: 64\n", 1),
        "line .*'hidden_size' is there twice",
    ),
    _text("a list as key", lambda text: text + "? [a, b]\n: 1\n", INVALID),
    _text("a mapping as key", lambda text: text + "{a: b}: 1\n", INVALID),
    _text("a number as key", lambda text: text + "7: 1\n", r"run\.yaml: 7: "),
    _text("nothing as key", lambda text: text + "~: 1\n", r"run\.yaml: None: "),
    _text("a bare no as key", lambda text: text + "no: 1\n", "Keys should be strings, not False"),
    _text("an empty key", lambda text: text + '"": 1\n', r"run\.yaml: '': unknown key"),
    _text("a key of two lines", lambda text: text + '"a\\nb": 1\n', r"run\.yaml: .*a\\nb.*"),
    _text("a key with a bracket", lambda text: text + '"seed[0]": 1\n', r"seed\[0\]: unknown key; did you mean 'seed'"),
    _text("a key named int", lambda text: text.replace("  top_k: 2\n", "  int: 2\n", 1), r"model\.int: unknown key"),
    _text("an alias of nothing", lambda text: text + "data: *nothing\n", INVALID),
    _text("an alias of itself", lambda text: text + "data: &data {cache: *data}\n", INVALID),
    _text("an alias in its own list", lambda text: text + "x: &x [*x]\n", INVALID),
    _text("aliases of aliases of aliases", lambda text: _bomb() + text, INVALID),
    _text("merges of merges of merges", lambda text: _merge_bomb() + text, INVALID),
    _text("deeply nested lists", lambda text: text + "x: " + "[" * 20_000, INVALID),
    _text("deeply nested mappings", lambda text: text + "x: " + "{a: " * 20_000, INVALID),
    _text("a python name", lambda text: text + "seed: !!python/name:os.system\n", INVALID),
    _text("a python object", lambda text: text + "seed: !!python/object/new:os.mkdir [witness]\n", INVALID),
    _text("a python module", lambda text: text + "seed: !!python/module:os\n", INVALID),
    _text("a tag of its own", lambda text: text + "seed: !seed 1\n", INVALID),
    _text("binary for text", lambda text: text + "tokenizer: !!binary aGVsbG8=\n", "tokenizer: must be a valid string"),
    _text("broken binary", lambda text: text + "tokenizer: !!binary x\n", INVALID),
    _text("a set", lambda text: text + "data: !!set {a, b}\n", "data: must be a valid dictionary"),
    _text("a date for text", lambda text: text.replace("name: small", "name: 2026-11-22", 1), "name: must be a valid"),
    _text("a day that is not", lambda text: text + "tokenizer: 2026-02-30\n", INVALID),
    _text("a number of 5000 digits", lambda text: text + f"seed: {'9' * 5000}\n", INVALID),
    _text("a zero byte in a path", lambda text: text.replace('/run"', "") + 'tokenizer: "a\\0b"\n', "tokenizer: "),
    _text("a line end in a path", lambda text: text + 'tokenizer: "a\\nb"\n', "tokenizer: .*control character"),
    _text("a name that turns around", lambda text: text.replace("name: small", 'name: "\\u202e"', 1), "name: .*u202e"),
    _text(
        "a name with nothing to see", lambda text: text.replace("name: small", 'name: "a\\u200b"', 1), "name: .*u200b"
    ),
    _text("a line separator as key", lambda text: text + '"a\\u2028b": 1\n', r"run\.yaml: .*a\\u2028b"),
    _text("an escape sequence as key", lambda text: text + '"a\\e[2J": 1\n', r"run\.yaml: .*x1b"),
    _text("half a character", lambda text: text.replace("name: small", 'name: "\\ud800"', 1), "name: .*character"),
    _text("half a character as key", lambda text: text + '"\\ud800": 1\n', r"run\.yaml: .*ud800"),
    _text("no output_dir", lambda text: text.replace("output_dir", "output_folder", 1), "output_folder: unknown key"),
    _text("no phases", lambda text: text[: text.index("phases:")], "phases: required key is missing"),
    _text("no model", lambda text: text.replace("model:", "modell:", 1), "modell: unknown key; did you mean 'model'"),
    _text(
        "an environment variable", lambda text: text + "tokenizer: ${NO_SUCH_NAME}/t\n", "tokenizer: .* NO_SUCH_NAME"
    ),
]

VALUES = [
    _value("seed", -1, "seed: must be greater than or equal to 0, not -1"),
    _value("seed", 1.5, "seed: must be a valid integer, not 1.5"),
    _value("seed", "one", "seed: must be a valid integer, not 'one'"),
    _value("seed", False, "seed: must be a valid integer, not False"),
    _value("seed", 2**80, "seed: must be less than or equal to "),
    _value("seed", [1], "seed: must be a valid integer"),
    _value("seed", float("inf"), "seed: must be a valid integer, not inf"),
    _value("seed", float("nan"), "seed: must be a valid integer, not nan"),
    _value("name", "", "name: must have at least 1 character"),
    _value("name", 7, "name: must be a valid string, not 7"),
    _value("name", None, "name: must be a valid string, not None"),
    _value("output_dir", "", "output_dir: must have at least 1 character"),
    _value("output_dir", ["a"], "output_dir: must be a valid string"),
    _value("model__num_layers", -2, "model.num_layers: must be greater than or equal to 1, not -2"),
    _value("model__num_layers", 1e300, "model.num_layers: must be less than or equal to "),
    _value("model__num_layers", 10**12, "model.*num_layers"),
    _value("model__hidden_size", 0, "model.hidden_size: must be greater"),
    _value("model__hidden_size", 2**50, "model: .* parameters"),
    _value("model__hidden_size", {"x": 1}, "model.hidden_size: must be a valid integer"),
    _value("model__num_kv_heads", "2", "model.num_kv_heads: must be a valid integer, not '2'"),
    _value("model__kv_channels", 1, "model.kv_channels: 1 is odd"),
    _value("model__ffn_hidden_size", 48.5, "model.ffn_hidden_size: must be a valid integer, not 48.5"),
    _value("model__num_experts", 0, "model.num_experts: must be greater"),
    _value("model__top_k", -1, "model.top_k: must be greater"),
    _value("model__vocab_size", float("-inf"), "model.vocab_size: must be"),
    _value("model__rope_theta", 0, "model.rope_theta: must be greater than 0, not 0"),
    _value("model__rope_theta", float("inf"), ".*rope_theta: must be a finite number, not inf"),
    _value("model__norm_eps", -1e-5, "model.norm_eps: must be greater than 0"),
    _value("model__init_std", "0.01", "model.init_std: must be a valid number, not '0.01'"),
    _value("model__init_std", float("nan"), ".*init_std: must be"),
    _value("model", 7, "model: must be a valid dictionary"),
    _value("model", None, "model: must be a valid dictionary"),
    _value("losses__balance", -0.1, "losses.balance: must be greater than or equal to 0"),
    _value("losses__z", float("inf"), ".*z: must be a finite number"),
    _value("losses__scope", "batch", "losses.scope: must be 'micro_batch' or 'global_batch', not 'batch'"),
    _value("losses", [], "losses: must be a valid dictionary"),
    _value("parallel__tensor", 0, "parallel.tensor: must be greater"),
    _value("parallel__layers_per_stage", [0, 2], "parallel.layers_per_stage.0: must be greater"),
    _value("parallel__layers_per_stage", 2, "parallel.layers_per_stage: must be a valid list"),
    _value("parallel__timeout_minutes", 0, "parallel.timeout_minutes: must be greater than 0"),
    _value("parallel__timeout_minutes", 1e300, "parallel.timeout_minutes: must be less"),
    _value("parallel__start_timeout_minutes", 0, "parallel.start_timeout_minutes: must be greater than 0"),
    _value("device", "gpu", "device: must be 'auto', 'cuda' or 'cpu', not 'gpu'"),
    _value("parallel__attention_experts", "split", "parallel.attention_experts: must be 'replicated' or 'sharded'"),
    _value("parallel__distributed_optimizer", "yes", "parallel.distributed_optimizer: must be a valid boolean"),
    _value("parallel__distributed_optimiser", True, "parallel.distributed_optimiser: unknown key; did you mean"),
    _value("precision", "FP32", "precision: must be 'bf16' or 'fp32', not 'FP32'"),
    _value("recompute", True, "recompute: must be 'none', 'selective' or 'full', not True"),
    _value("batch__sequence_length", 0, "batch.sequence_length: must be greater"),
    _value("batch__sequence_length", 10**9, "batch.global_tokens: 256 is not a multiple of batch.sequence_length"),
    _value("batch__global_tokens", 0, "batch.global_tokens: must be greater"),
    _value("batch__global_tokens", "4M", "batch.global_tokens: must be a valid integer, not '4M'"),
    _value("batch__micro_sequences", -1, "batch.micro_sequences: must be greater"),
    _value("batch__micro_batch", 1, "batch.micro_batch: unknown key; did you mean 'micro_sequences'"),
    _value("optimizer__max_lr", 0, "optimizer.max_lr: must be greater than 0"),
    _value("optimizer__lr", 1e-3, "optimizer.lr: unknown key"),
    _value("optimizer__betas", "0.9, 0.95", "optimizer.betas: must be a valid list"),
    _value("optimizer__betas", [0.9, 0.95, 0.99], "optimizer.betas: must have at most 2 items"),
    _value("optimizer__betas", [-0.1, 0.95], "optimizer.betas.0: must be greater than or equal to 0"),
    _value("optimizer__eps", 0, "optimizer.eps: must be greater than 0"),
    _value("optimizer__weight_decay", float("nan"), ".*weight_decay: must be"),
    _value("optimizer__clip_grad", -1, "optimizer.clip_grad: must be greater than or equal to 0"),
    _value("schedule__warmup_tokens", -1, "schedule.warmup_tokens: must be greater"),
    _value("schedule__initial_lr_ratio", 1.5, "schedule.initial_lr_ratio: must be less than or equal to 1"),
    _value("start_from", 3, "start_from: must be a valid string, not 3"),
    _value("phase", "decay", "phase: must be a valid integer, not 'decay'"),
    _value("phase", True, "phase: must be a valid integer, not True"),
    _value("tokenizer", {"path": "x"}, "tokenizer: must be a valid string"),
    _value("data__cache", 1, "data.cache: must be a valid string"),
    _value("data__build_limit_tokens", 0, "data.build_limit_tokens: must be greater"),
    _value("data__warn_epochs", 0, "data.warn_epochs: must be greater than 0"),
    _value("data__mask_loss", True, "tokenizer: data.reset_positions, mask_attention and mask_loss need it"),
    _value("data__mask_loss", "on", "data.mask_loss: must be a valid boolean, not 'on'"),
    _value("data", ["data/code"], "data: must be a valid dictionary"),
    _value("guard__on_bad_step", "ignore", "guard.on_bad_step: must be 'stop', 'skip' or 'rollback', not 'ignore'"),
    _value("guard__spike_factor", -1, "guard.spike_factor: must be greater"),
    _value("guard__window", 7, "guard.window: must be greater than or equal to 8"),
    _value("guard__window", 128.5, "guard.window: must be a valid integer"),
    _value("guard__budget", None, "guard.budget: must be a valid integer, not None"),
    _value("checkpoint__keep_last", 0, "checkpoint.keep_last: must be greater"),
    _value("checkpoint__keep_every_tokens", 700, "checkpoint.keep_every_tokens: 700 is not a multiple of checkpoint"),
    _value("checkpoint__resume", "always", "checkpoint.resume: must be 'auto' or 'never', not 'always'"),
    _value("checkpoint__may_change", "optimizer.max_lr", "checkpoint.may_change: must be a valid list"),
    _value("checkpoint__may_change", ["optimizer.maxlr"], "checkpoint.may_change: 'optimizer.maxlr' is none of losses"),
    _value("checkpoint__may_change", ["batch"], "checkpoint.may_change: 'batch' is none of losses, optimizer"),
    _value("checkpoint__may_change", [1], "checkpoint.may_change.0: must be a valid string, not 1"),
    _value("evaluation__sequences", 0, "evaluation.sequences: must be greater"),
    _value("evaluation__data", {"name": "a", "path": "b"}, "evaluation.data: must be a valid list"),
    _value("evaluation__data", [{"name": "a"}], "evaluation.data.0.path: required key is missing"),
    _value("evaluation__data", [{"name": "a", "path": "b"}] * 2, "evaluation.data: two entries have the same name"),
    _value("logging__every_steps", 0, "logging.every_steps: must be greater"),
    _value("logging__wandb", 1, "logging.wandb: must be 'off', 'offline' or 'online', not 1"),
    _value("profile__steps", [3], "profile.steps: must have at least 2 items"),
    _value("profile__steps", [0, 3], "profile.steps.0: must be greater"),
    _value("profile__steps", [4, 3], r"profile.steps: the last step \(3\) is before the first \(4\)"),
    _value("profile__ranks", [], "profile.ranks: must have at least 1 item"),
    _value("profile__ranks", [-1], "profile.ranks.0: must be greater"),
    _value("debug__max_steps", 0, "debug.max_steps: must be greater"),
    _value("debug__check_sync", -1, "debug.check_sync: must be greater"),
    _value("phases", {"name": "stable"}, "phases: must be a valid list"),
    _value("phases", [None], "phases.0: must be a valid dictionary"),
    _value("phases", [[]], "phases.0: must be a valid dictionary"),
    _value("phases", [], "phases: must have at least 1 item"),
    _value("phases__0__tokens", 0, "phases.0.tokens: must be greater"),
    _value("phases__0__tokens", 10**400, "phases.0.tokens: must be less than or equal to "),
    _value("phases__0__tokens", "1T", "phases.0.tokens: must be a valid integer, not '1T'"),
    _value("phases__0__learning_rate", ["constant"], "phases.0.learning_rate: must be 'constant' or 'exponential'"),
    _value("phases__0__data", {"code": 1}, "phases.0.data: must be a valid list"),
    _value("phases__0__data", ["code"], "phases.0.data.0: must be a valid dictionary"),
    _value("phases__0__data__0__weight", float("inf"), "phase 'stable': data: the weight of 'code' is inf"),
    _value("phases__0__data__0__weight", float("nan"), "phase.*weight"),
    _value("phases__0__data__0__weight", "3", "phases.0.data.0.weight: must be a valid number, not '3'"),
    _value("phases__0__data__0__path", "", "phases.0.data.0.path: must have at least 1 character"),
    _value("phases__1__data__0__name", "", "phases.1.data.0.name: must have at least 1 character"),
]

# What a run file cannot show by itself.
ENVIRONMENT = [
    Case("output_dir too long", lambda world: world.train(output_dir=str(world / LONG)), "x{300}.*File name too long"),
    Case("data.cache too long", lambda world: world.train(data__cache=str(world / LONG)), "x{300}.*File name too long"),
    Case("tokenizer too long", lambda world: world.train(tokenizer=str(world / LONG)), "x{300}.*File name too long"),
    Case("start_from too long", lambda world: world.train(start_from=str(world / LONG)), "x{300}.*File name too long"),
    Case("phase file too long", lambda world: world.train(phases=[LONG]), "x{300}.*File name too long"),
    Case(
        "output_dir is a file",
        lambda world: world.train(output_dir=str(world.write("taken", "x"))),
        "output_dir: .*taken is a file",
    ),
    Case(
        "output_dir below a file",
        lambda world: world.train(output_dir=str(world.write("taken", "x") / "run")),
        "output_dir: .*taken is a file",
    ),
    Case(
        "checkpoints is a file",
        lambda world: [world.write("run/checkpoints", "x"), *world.train()][1:],
        "output_dir: .*run/checkpoints is a file",
    ),
    Case(
        "config.yaml is a folder",
        lambda world: [(world / "run/config.yaml").mkdir(parents=True), *world.train()][1:],
        "output_dir: .*run/config.yaml is a folder",
    ),
    Case(
        "data.cache is a file",
        lambda world: world.train(data__cache=str(world.write("taken", "x"))),
        "data.cache: .*taken is a file",
    ),
    *(
        Case(
            f"{key} {name}",
            _at(key, path),
            f"{key.replace('__', '.')}: .* cannot be made in .*: {said}",
        )
        for key in ("output_dir", "data__cache")
        for name, path, said in (
            ("below a folder that takes none", "/proc/runs/one", "No such file"),
            ("too long, below what is to be made", f"new/{LONG}", "File name too long"),
        )
    ),
    Case(
        "output_dir is a link to nothing",
        lambda world: [os.symlink("nowhere", world / "link"), *world.train(output_dir=str(world / "link/run"))][1:],
        "output_dir: .*link is a link to nothing",
    ),
    Case("more tokens than memory", lambda world: world.train(phases__0__tokens=2**50), "memory"),
]

NAMED = [
    _named_file("model", "empty", b"", r"other\.yaml \(named in .*run\.yaml\): .*found nothing"),
    _named_file("model", "a folder", None, r"other\.yaml \(named in .*run\.yaml\): Is a directory"),
    _named_file("model", "a list", b"- 1\n", r"other\.yaml \(named in .*\): .*found a list"),
    _named_file("model", "binary", bytes(range(256)), r"other\.yaml \(named in .*\): not a UTF-8 text file"),
    _named_file(
        "model", "an unknown key", b"num_layer: 2\n", r"model.num_layer: unknown key; did you mean 'num_layers'"
    ),
    _named_file("model", "a key twice", b"top_k: 2\ntop_k: 2\n", r"other\.yaml \(named in .*'top_k' is there twice"),
    _named_file("model", "a phase", b"name: stable\ntokens: 5\n", "model.name: unknown key"),
    _named_file("phases__0", "empty", b"# soon\n", r"other\.yaml \(named in .*run\.yaml\): .*found nothing"),
    _named_file("phases__0", "a folder", None, r"other\.yaml \(named in .*run\.yaml\): Is a directory"),
    _named_file("phases__1", "broken", b"name: [\n", r"other\.yaml \(named in .*\):.* not valid YAML"),
    _named_file("phases__1", "a bomb", _bomb().encode(), r"other\.yaml \(named in .*\):.* not valid YAML"),
    _named_file("phases__1", "python", b"a: !!python/name:os.system\n", r"other\.yaml \(named in .*not valid YAML"),
    _named_file("phases__1", "a file of its own", b"phases: [other.yaml]\n", "phases.1.phases: unknown key"),
    _named_file("phases__0", "no tokens", b"name: a\nlearning_rate: constant\ndata: []\n", "phases.0.tokens: required"),
    Case(
        "phase file, missing", lambda world: world.train(phases=["none.yaml"]), r"none\.yaml \(named in .*No such file"
    ),
    Case("phase file, a number", lambda world: world.train(phases=[1, 2]), "phases.0: must be a valid dictionary"),
]

OVERRIDES = [
    _override("seed", "override 'seed': write it as section.key=value"),
    _override("=", "override '=': write it as section.key=value"),
    _override("seed=", "seed: must be a valid integer, not None"),
    _override("seed=" + "9" * 5000, "override 'seed=9{40}.*': the value is not valid YAML"),
    _override("seed=2026-99-99", "override 'seed=2026-99-99': the value is not valid YAML"),
    _override("seed=" + "[" * 5000, "the value is not valid YAML"),
    _override("seed={", "override 'seed={': the value is not valid YAML"),
    _override("seed=!!python/name:os.system", "the value is not valid YAML"),
    _override("seed=1e400", "seed: must be a valid integer, not inf"),
    _override("sede=1", "sede: unknown key; did you mean 'seed'"),
    _override("model..top_k=1", "model.*: unknown key"),
    _override(".=1", "unknown key"),
    _override("phases.stable.tokens=1", "override 'phases.stable.tokens=1': there is no 'phases.stable' to set"),
    _override("phases.-1.tokens=1", "there is no 'phases.-1' to set"),
    _override("phases.0.tokens.x=1", "'phases.0.tokens' has no key 'x'"),
    _override("model=none.yaml", r"none\.yaml \(named in .*No such file"),
    _override("model=[]", "model: must be a valid dictionary"),
    _override("phases=null", "phases: must be a valid list"),
    _override("optimizer.betas=0.9", "optimizer.betas: must be a valid list, not 0.9"),
    _override("seed=a\nb", "seed: must be a valid integer"),
    _override("a\nb=1", r"a\\nb"),
]

LAYOUTS = [
    _layout("0", {}, "--world: must be 1 or more"),
    _layout("-4", {}, "--world: must be 1 or more"),
    _layout("two", {}, "argument --world: invalid int value: 'two'"),
    _layout("1", {"parallel__layers_per_stage": [1, 1]}, "parallel.layers_per_stage: has 2 entries for 1 stages"),
    _layout("2", {"parallel": {"pipeline": 2, "layers_per_stage": [1, 2]}}, "adds up to 3, not to model.num_layers"),
    _layout("1", {"parallel__layers_per_stage": []}, "parallel.layers_per_stage: has 0 entries for 1 stages"),
    _layout(
        "2", {"parallel__overlap_param_gather": True}, "parallel.overlap_param_gather: needs distributed_optimizer"
    ),
    _layout(
        "2", {"parallel": {"expert_tensor": 2, "attention_experts": "sharded"}}, "parallel.attention_experts: shard"
    ),
    _layout("2", {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}, "= 4 does not divide model.num_layers"),
    _layout("7", {"parallel__tensor": 7}, "parallel.tensor: 7 does not divide model.num_kv_heads"),
    _layout("16", {}, "8 sequences per step .* do not divide into 16 data-parallel ranks"),
    _layout("2", {"parallel__context": 2}, "parallel.context: context parallelism needs Transformer Engine"),
    _layout("1", {"model__expert_backend": "te"}, "model.expert_backend: te needs a GPU"),
    _layout(
        "1", {"model__expert_backend": "torch", "model__ffn_hidden_size": 50}, "needs widths that are multiples of 4"
    ),
    _layout(
        "2",
        {"model__expert_backend": "torch", "model__ffn_hidden_size": 36, "parallel": {"expert_tensor": 2}},
        r"ffn_hidden_size / expert_tensor \(36 / 2 = 18\) is not: use loop",
    ),
    _layout(
        "2",
        {"model__expert_backend": "torch", "model__kv_channels": 6, "parallel": {"tensor": 2}},
        r"num_kv_heads x kv_channels / tensor \(12 / 2 = 6\) is not: use loop",
    ),
    _layout("1", {"schedule__warmup_tokens": 1281}, "schedule.warmup_tokens: 1281 is more than the 1280 tokens"),
]

ARGUMENTS = [
    _arguments("none", lambda world: ["pretrain"], "the following arguments are required: RUN.yaml"),
    _arguments("an unknown option", lambda world: world.train("--dryrun"), "unrecognized arguments: --dryrun"),
    _arguments("--world alone", lambda world: world.train("--world", "2"), "--world goes with --dry-run"),
    _arguments("--hardware alone", lambda world: world.train("--hardware", "h100"), "--hardware goes with --dry-run"),
    _arguments(
        "hardware that nobody knows",
        lambda world: world.train("--dry-run", "--hardware", "h1000"),
        "--hardware: 'h1000' is not known: a100, b200, h100, h200, or a YAML file",
    ),
    _arguments(
        "hardware of another kind",
        lambda world: world.train("--dry-run", "--hardware", world.write("gpu.yaml", "gpu: {}")),
        r"gpu\.yaml: gpu: must be ",
    ),
    _arguments("no such run file", lambda world: ["pretrain", world / "no.yaml"], r"no\.yaml: No such file"),
    _arguments("a folder", lambda world: ["pretrain", world.folder], ": Is a directory"),
    _arguments(
        "below a file", lambda world: ["pretrain", world.write("a", "") / "b.yaml"], "a/b.yaml: Not a directory"
    ),
    _arguments("a file name of 300 characters", _long_file, "x{300}.*File name too long"),
    _arguments("a link to itself", _loop, r"run\.yaml: Too many levels of symbolic links"),
    _arguments("a device", lambda world: ["pretrain", "/dev/null"], "/dev/null: .*found nothing"),
    _arguments("a name of two lines", lambda world: ["pretrain", world / "a\nb.yaml"], r"a\\nb\.yaml: No such file"),
    _arguments("the override first", lambda world: ["pretrain", "seed=1", world / "run.yaml"], "seed=1: No such file"),
    _arguments(
        "jetmoe data mix of a missing file", lambda world: ["jetmoe", "data", "mix", "no.yaml"], "no.yaml: No such"
    ),
    _arguments(
        "jetmoe data prepare of a bad run",
        lambda world: ["jetmoe", "data", "prepare", world.train(seed=-1)[1]],
        r"run\.yaml: seed: must be",
    ),
]

SHOW = [
    Case("config show, a value", lambda world: _show(world.train(seed=-1)), r"run\.yaml: seed: must be"),
    Case(
        "config show, a relation",
        lambda world: _show(world.train(batch__global_tokens=250)),
        r"run\.yaml: batch\.global_tokens: 250 is not a multiple",
    ),
    Case(
        "config show, a file that the run file names",
        lambda world: _show(world.train(model="none.yaml")),
        r"none\.yaml \(named in .*No such file",
    ),
    Case(
        "config show, a hostile key",
        lambda world: _show(world.train_text(lambda text: text + '"a\\e[2J\\nb": 1\n')),
        r"a\\x1b\[2J\\nb' holds a control character",
    ),
    Case(
        "config show, an override", lambda world: [*_show(world.train()), "sede=1"], "sede: unknown key; did you mean"
    ),
    Case(
        "config show, an option",
        lambda world: [*_show(world.train()), "--world=2"],
        "unrecognized arguments: --world=2",
    ),
    Case("config show, no file", lambda world: ["jetmoe", "config", "show"], "arguments are required: RUN.yaml"),
    Case(
        "config show, deeply nested", lambda world: _show(world.train_text(lambda text: "x: " + "[" * 20_000)), INVALID
    ),
    Case(
        "config show, a mapping that is a key all the same",
        lambda world: _show(world.train_text(lambda text: text + "? !!str {=: sede}\n: 5\n")),
        r"run\.yaml: sede: unknown key",
    ),
    Case("config schema of a data set", lambda world: ["jetmoe", "config", "schema", "data"], "invalid choice: 'data'"),
    Case("config, no command", lambda world: ["jetmoe", "config"], "arguments are required: COMMAND"),
]

CASES = [*TEXTS, *VALUES, *ENVIRONMENT, *NAMED, *OVERRIDES, *LAYOUTS, *ARGUMENTS, *SHOW]
