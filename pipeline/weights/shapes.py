"""Reading a model's sizes off the shapes of its tensors."""

from collections.abc import Mapping

from pipeline.errors import CheckpointError

Shape = tuple[int, ...]


class Shapes:
    """Shapes by name, of a file in `layout`; what tells a size must be there and make sense."""

    def __init__(self, shapes: Mapping[str, Shape], layout: str):
        self.named, self.layout = shapes, layout

    def size(self, name: str, rank: int, axis: int) -> int:
        """An axis of a tensor that must have `rank` of them."""
        shape = self.named.get(name)
        if shape is None or len(shape) != rank or 0 in shape:
            found = "absent" if shape is None else shape
            raise CheckpointError(
                f"{name} is {found} in the file, but tells the shape of the model and must have {rank} axes in the "
                f"{self.layout} layout, the nearest one; fetch the file again"
            )
        return shape[axis]

    def count(self, prefix: str) -> int:
        """How many numbers follow the prefix; they must be 0, 1, 2, ..."""
        parts = {name.removeprefix(prefix).partition(".")[0] for name in self.named if name.startswith(prefix)}
        numbers = {int(part) for part in parts if part.isdecimal()}
        for number in range(max(len(numbers), 1)):
            if number not in numbers:
                later = f", though {prefix}{max(numbers)} is there" if numbers else ""
                raise CheckpointError(
                    f"{prefix}{number} is absent in the file{later}; the {self.layout} layout, the nearest one, "
                    "numbers without gaps, so fetch the file again"
                )
        return len(numbers)

    def has(self, prefix: str) -> bool:
        """Whether a name begins so."""
        return any(name.startswith(prefix) for name in self.named)
