"""The typed recipe of a chain of stages."""

from pydantic import model_validator

from pipeline.recipe.published_result import PublishedResult
from pipeline.recipe.schema import StageRecipe
from pipeline.recipe.sections import FCMAESettings
from pipeline.recipe.settings_base import Seed, Settings


class ChainRecipe(Settings):
    """A named chain of stages, in order."""

    name: str
    seed: Seed = 0
    published: PublishedResult | None = None
    """A result to compare with; not part of the experiment."""
    stages: dict[str, StageRecipe]

    @model_validator(mode="after")
    def _check_stages(self) -> "ChainRecipe":
        for name, stage in self.stages.items():
            before = self.stages.get(stage.previous or "")
            if before is not None and before.model.family != stage.model.family:
                raise ValueError(
                    f"stages.{name}.model.name is {stage.model.name} but the stage before hands on a"
                    f" {before.model.name}; make them one family, or init.start scratch"
                )
            if before is not None and stage.init.channels == "keep":
                ours, theirs = stage.model.in_channels, before.model.in_channels
                if ours != theirs:
                    raise ValueError(
                        f"stages.{name}.model.in_channels is {ours} but the stage before hands on weights for {theirs};"
                        f" make them equal, or set stages.{name}.init.channels to {'sum' if ours == 1 else 'repeat'}"
                    )
            if (
                stage.init.head == "map"
                and stage.init.weights is None
                and (before is None or isinstance(before.objective, FCMAESettings))
            ):
                raise ValueError(
                    f"stages.{name}.init.head is map but no stage of classification is before it; make it new"
                )
        return self
