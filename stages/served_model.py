"""The model as MLflow serves it: text in, text continued. MLflow runs this file, so nothing is pickled.

    model = mlflow.pyfunc.load_model("models:/<model id>")
    model.predict(["def main("], params={"new_tokens": 32, "temperature": 0.0})
"""

import mlflow
from mlflow.pyfunc import PythonModel


class ServedModel(PythonModel):
    """Loads the weights and the tokenizer that were logged with it."""

    def load_context(self, context):
        from stages import models, shards  # torch is needed to serve, not to log

        self.model = models.load(context.artifacts["model"])
        self.tokenizer = shards.load_tokenizer(context.artifacts["tokenizer"])

    # MLflow asks for type hints here, but with them it drops the options from the signature.
    def predict(self, context, model_input, params=None):
        from stages.generation import generate

        if hasattr(model_input, "iloc"):  # MLflow makes a table of a list
            model_input = model_input.iloc[:, 0].tolist()
        prompts = [model_input] if isinstance(model_input, str) else list(model_input)
        options = {"new_tokens": 64, "temperature": 0.0, "seed": 0, **(params or {})}
        end = self.tokenizer.end_of_text
        texts = []
        for prompt in prompts:
            tokens = self.tokenizer.encode(prompt) or [end]  # a text begins where another ended
            texts.append(self.tokenizer.decode(generate(self.model, tokens, end_of_text=end, **options)))
        return texts


mlflow.models.set_model(ServedModel())
