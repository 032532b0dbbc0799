"""What a user can mend, told without a traceback."""

from ctllm_jax.config.statuses import WRONG_INPUT


class UserError(ValueError):
    """Wrong input at the user's boundary. The message names the field or file, the value, and what is needed; exit status 2."""

    status: int = WRONG_INPUT
