"""A finished run whose classifier tells the tiny images apart, made in a second: random features, a fitted head."""

from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from pipeline.models import create_model
from pipeline.objectives.pixels import normalise
from pipeline.recipe import load_recipe, write_recipe
from pipeline.stage.directory import Stage
from pipeline.weights.safetensors_file import write_weights
from tests.oracles import randomise
from tests.support import CLASSES, open_journal, tiny_image, tiny_recipe
from tools.prepare.image_pixels import ReadingSettings

READING = ReadingSettings()
SIZE = 24  # of the tiny images, and of the classifier's input


def fitted_classifier(images: int = 120) -> torch.nn.Module:
    """A model of the tiny recipe whose head is a ridge regression of the classes on random features."""
    options = {"depths": (1, 2), "dims": (8, 16), "stem_stride": 2}
    model = create_model("convnextv2", len(CLASSES), **options).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in randomise(model.state_dict()).items()})
    pixels, labels = zip(*map(tiny_image, range(images)), strict=True)
    with torch.no_grad():
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        features = model.pooled_features(normalise(batch, torch.float32)).double()
        inputs = torch.cat([features, torch.ones(images, 1)], 1)
        target = 8 * torch.nn.functional.one_hot(torch.tensor(labels), len(CLASSES)).double()
        fit = torch.linalg.solve(inputs.T @ inputs + 0.01 * torch.eye(inputs.shape[1]), inputs.T @ target).float()
        model.head.weight.copy_(fit[:-1].T)
        model.head.bias.copy_(fit[-1])
    return model


def write_fitted_run(run: Path, reading: ReadingSettings = READING) -> Path:
    """A run directory with one finished stage, `finetune`, of the fitted classifier.

    reading: how its training images were prepared.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    raw = tiny_recipe(run.parent)
    raw["defaults"]["data"] |= {"image_size": SIZE, "crop_pct": 1.0}
    raw["stages"] = {"finetune": {**raw["stages"]["finetune"], "data": {}}}
    path = run.parent / "fitted.yaml"
    path.write_text(yaml.safe_dump(raw))
    chain = load_recipe(path)
    recipe = chain.stages["finetune"]
    stage = Stage.create(run / "finetune", recipe)
    write_recipe(chain, run / "recipe.yaml")
    with open_journal(stage.directory) as journal:
        journal.write("attempt", step=0, total_steps=1, world_size=1, threads=1, device="cpu", host="here")
        journal.write("data", train={"settings": reading.side_car(), "sha256": "0", "path": "train.beton"})
        journal.write("evaluate", step=1, metrics={"top1": 90.0})
    facts = {
        "model": recipe.model.model_dump(mode="json", exclude={"checkpointing"}), "image_size": SIZE,
        "classes": list(CLASSES), "weights": "ema",
    }  # fmt: skip
    digest = write_weights(stage.directory / "weights.safetensors", fitted_classifier().state_dict(), facts)
    stage.finish({"weights": "weights.safetensors", "weights_sha256": digest}, 1)
    return run


def write_photos(folder: Path) -> Path:
    """One picture of each class, as `photos/rings.jpg`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1000, 1000 + len(CLASSES)):
        pixels, label = tiny_image(number)
        Image.fromarray(pixels).save(folder / f"{CLASSES[label]}.{'png' if label == 3 else 'jpg'}", quality=95)
    return folder
