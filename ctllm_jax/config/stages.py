"""The registry of training stages: a new stage is one entry here, and files of its own. No jax, and no schema, is imported
before a stage is asked for it.

A stage has a schema, which extends `PretrainConfig`, and a module with two functions:

- `open_stage(config, *, directory, keep_texts) -> training.objective.Opened`: data, objective, and the config without
  gaps.
- `print_data(report, console)`: prints the `report` of its data, where the data has one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from ctllm_jax.config.pretrain import PretrainConfig


class Stage(NamedTuple):
    """A stage of training, which is also a command.

    Attributes:
      name: of the command, and in metrics and messages.
      summary: what the list of commands says.
      schema_path: `module:class` of its schema.
      module_name: its module.
      plans_without_data: whether the config alone decides the model and the steps, so that a plan can do without data.
      object_stores: keys that may name an object store, as a regular expression.
      mark: a key that every config of this stage has and no other: the stage of a run is read from its config.yaml.
    """

    name: str
    summary: str
    schema_path: str
    module_name: str
    plans_without_data: bool = False
    object_stores: str = r"run\.dir|init|compute\.compilation_cache"
    mark: str | None = None

    @property
    def schema(self) -> type[PretrainConfig]:
        """The schema of its config."""
        module, _, name = self.schema_path.partition(":")
        return getattr(import_module(module), name)

    def open(self, config: PretrainConfig, **options: Any) -> Any:
        """`open_stage` of its module."""
        return import_module(self.module_name).open_stage(config, **options)

    def print_data(self, data: Any, console: Any) -> None:
        """Print the report of its data, if there is one."""
        if (report := getattr(data, "report", None)) is not None:
            import_module(self.module_name).print_data(report, console)


STAGES = {stage.name: stage for stage in (
    Stage("pretrain", "train a model from a config, or go on with a run", "ctllm_jax.config.pretrain:PretrainConfig",
          "ctllm_jax.training.pretrain", plans_without_data=True,
          object_stores=r"run\.dir|init|compute\.compilation_cache|data\.sources\..*\.path"),
    Stage("sft", "teach a pretrained model to answer, from dialogues", "ctllm_jax.config.sft:SFTConfig",
          "ctllm_jax.training.sft", mark="data.loss_on"),
    Stage("dpo", "teach a tuned model which answers are preferred, from pairs", "ctllm_jax.config.dpo:DPOConfig",
          "ctllm_jax.training.dpo", object_stores="", mark="loss.beta"),
)}
StageName = Literal[tuple(STAGES)]
"""The type of a config key that names a stage."""


def stage_of(config: PretrainConfig) -> Stage:
    """The stage whose schema a config has."""
    return next(stage for stage in STAGES.values() if type(config) is stage.schema)


def stage_of_run(values: dict[str, Any]) -> Stage:
    """The stage of a run, from the values of its config.yaml; pretraining where no stage's mark is there."""
    for stage in STAGES.values():
        if stage.mark is not None:
            section, _, name = stage.mark.partition(".")
            if name in (values.get(section) or {}):
                return stage
    return STAGES["pretrain"]
