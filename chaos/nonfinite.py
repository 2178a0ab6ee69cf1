"""Numbers that are not finite."""

import json

from chaos.bench import Bench, Row
from chaos.commands import NO_SERVER, refuses, stage_command
from stages.files.artifacts import sha256_of


def nan_weights(bench: Bench, row: Row, readers: tuple = ("evaluate", "distill")) -> None:
    """a NaN in a model's weights, with hashes that match"""
    import safetensors.torch

    tree = bench.copy("nan-weights")
    folder = tree / "artifacts/teacher"
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("config_sha256")
    config["weights_sha256"] = sha256_of(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for reader in readers:
        row.tried += 1
        out = tree / f"outputs/{reader}"
        words = stage_command(reader, f"hydra.run.dir={out}")
        row.message = refuses(
            tree, "model.norm.weight holds a non-finite number", *words, MLFLOW_TRACKING_URI=NO_SERVER
        )
        assert not list(out.glob("artifacts/**/*")) and not list(out.glob("metrics/*"))
        row.survived += 1
    bench.finish(tree, row)


def nonfinite_gradients(bench: Bench, row: Row) -> None:
    """gradients that overflow (learning rate 1e9)"""
    tree = bench.copy("nonfinite-gradients")
    row.tried += 1
    words = stage_command("pretrain", "optimizer.adamw_learning_rate=1e9", f"hydra.run.dir={tree / 'outputs/broken'}")
    row.message = refuses(tree, "not finite at step", *words, MLFLOW_TRACKING_URI=NO_SERVER)
    assert not list((tree / "outputs/broken").glob("artifacts/**/*.safetensors"))
    bench.finish(tree, row)
    row.survived += 1
