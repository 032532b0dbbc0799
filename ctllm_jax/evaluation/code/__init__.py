"""Evaluation by running generated code: the tasks and the sandbox that runs it."""
