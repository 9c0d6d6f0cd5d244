"""The typed YAML schema: what a run file may say, how it is read, and what its errors look like. No torch here."""

from jetmoe_megatron.config.load import dump_run, load_run
from jetmoe_megatron.config.schema import Model, Run

__all__ = ["Model", "Run", "dump_run", "load_run"]
