"""What runs inside of this process share."""

import inspect
import json

import pytest

from ctllm_jax.training import run
from ctllm_jax.training.run import StepPlan


@pytest.fixture(scope="session")
def plans():
    """{config without its paths: (plan, program)}."""
    return {}


@pytest.fixture
def planned_once(monkeypatch, plans):
    """The step of a pretraining config is traced and compiled once, for all runs of it."""
    plan_step, compile_plan, compiled = run.plan_step, StepPlan.compile, {}

    def plan_once(config, mesh, objective):
        text = inspect.getclosurevars(objective.make_loss_fn).nonlocals["token_bytes"] is not None
        values = config.model_dump(mode="json", exclude={"run", "checkpoint", "data", "watchdog"})
        key = json.dumps({**values, "bad_steps": values["bad_steps"]["spikes"], "mesh": str(mesh),
                          "text": text}, sort_keys=True)
        if key not in plans:
            plan = plan_step(config, mesh, objective=objective)
            plans[key] = plan, compile_plan(plan)
        plan, program = plans[key]
        compiled[id(plan)] = program
        return plan

    monkeypatch.setattr(run, "plan_step", plan_once)
    monkeypatch.setattr(StepPlan, "compile", lambda self, options=None: compiled[id(self)])
