"""The model as MLflow serves it: text in, text continued. MLflow runs this file, so nothing is pickled.

    model = mlflow.pyfunc.load_model("models:/<model id>")
    model.predict(["def main("], params={"new_tokens": 32, "temperature": 0.0})

    mlflow models serve --env-manager local -m models:/<model id> --timeout 20
    curl 127.0.0.1:5000/invocations -H 'Content-Type: application/json' \\
        -d '{"inputs": ["def main("], "params": {"new_tokens": 32}}'

Options: new_tokens from 1 to 4096, temperature from 0 (the likeliest token) to 10, seed from 0 to 2**32 - 1. Any other
value or option, and a prompt of more than 4096 tokens, is answered with HTTP 400 and one line.

A model that is served cannot see that its client has left. It stops at the time limit of a request, when the server has
answered 504 (`--timeout`, 60 s by default), and at SIGTERM or Ctrl-C at once.
"""

import logging
import math
import os
import signal
import time

import mlflow
from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc import PythonModel

DEFAULTS = {"new_tokens": 64, "temperature": 0.0, "seed": 0}
MOST_TOKENS = 4096  # new ones, and of a prompt
MOST_CHARACTERS = 16 * MOST_TOKENS  # of a prompt: a longer one is not worth its tokenizing
HOTTEST = 10.0
SEEDS = 2**32


class ServedModel(PythonModel):
    """Loads the weights and the tokenizer that were logged with it."""

    def load_context(self, context):
        from stages.data import shards  # torch is needed to serve, not to log
        from stages.model import hub as models

        self.model = models.load(context.artifacts["model"])
        self.tokenizer = shards.load_tokenizer(context.artifacts["tokenizer"])
        logger = logging.getLogger("mlflow.models.utils")
        logger.setLevel(logging.WARNING)  # also where MLFLOW_LOGGING_LEVEL silences it
        logger.addFilter(_refuse_unknown_options)

    # MLflow asks for type hints here, but with them it drops the options from the signature.
    def predict(self, context, model_input, params=None):
        from stages.model.generation import generate

        if hasattr(model_input, "iloc"):  # MLflow makes a table of a list
            model_input = model_input.iloc[:, 0].tolist()
        prompts = [model_input] if isinstance(model_input, str) else list(model_input)
        options = _checked(params or {})
        before_each = _time_limit()
        end = self.tokenizer.end_of_text
        texts = []
        for number, prompt in enumerate(prompts):
            before_each()
            tokens = self._tokens(prompt, number) or [end]  # a text begins where another ended
            new = generate(self.model, tokens, end_of_text=end, before_each=before_each, **options)
            texts.append(self.tokenizer.decode(new))
        return texts

    def _tokens(self, prompt, number):
        if not isinstance(prompt, str):
            raise _refusal(f"prompt {number} is {type(prompt).__name__}, not text")
        tokens = self.tokenizer.encode(prompt) if len(prompt) <= MOST_CHARACTERS else None
        if tokens is None or len(tokens) > MOST_TOKENS:
            most = f"{MOST_TOKENS} tokens and {MOST_CHARACTERS} characters"
            raise _refusal(f"prompt {number} has {len(prompt)} characters: a prompt has at most {most}")
        return tokens


def _checked(params):
    """The options with their defaults; a wrong one is refused by name."""
    unknown = sorted(set(params) - set(DEFAULTS))
    if unknown:
        raise _refusal(f"unknown option {', '.join(unknown)}: there are {', '.join(DEFAULTS)}")
    options = DEFAULTS | params
    for name, least, most in (("new_tokens", 1, MOST_TOKENS), ("seed", 0, SEEDS - 1)):
        if not _is_number(options[name]) or options[name] != int(options[name]):
            raise _refusal(f"{name} = {options[name]}: must be a whole number")
        options[name] = int(options[name])
        if not least <= options[name] <= most:
            raise _refusal(f"{name} = {options[name]}: must be from {least} to {most}")
    if not _is_number(options["temperature"]) or not 0 <= options["temperature"] <= HOTTEST:
        raise _refusal(f"temperature = {options['temperature']}: must be a number from 0 to {HOTTEST:g}")
    return options


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refusal(message):
    return MlflowException.invalid_parameter_value(message)  # the server answers it with 400


def _time_limit():
    """What to call before each token: it raises when nobody waits for the answer any more."""
    served = os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT") == "true"
    deadline = time.monotonic() + (MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get() if served else math.inf)

    def before_each():
        if _server_is_ending():
            raise MlflowException("the server is ending", TEMPORARILY_UNAVAILABLE)
        if time.monotonic() > deadline:
            raise MlflowException("the time limit of a request is over", TEMPORARILY_UNAVAILABLE)

    return before_each


def _server_is_ending():
    """On a signal uvicorn waits for its requests; the owner of its signal handler knows whether one came."""
    return getattr(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), "should_exit", False)


def _refuse_unknown_options(record):
    """MLflow drops an option that the signature does not name, and only logs that; the model never sees it."""
    message = record.getMessage()
    if message.startswith("Unrecognized params") and all(f"'{name}'" in message for name in DEFAULTS):
        raise _refusal(f"unknown option {message.split('[')[1].split(']')[0]}: there are {', '.join(DEFAULTS)}")
    return True


mlflow.models.set_model(ServedModel())
