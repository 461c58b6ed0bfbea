"""Read sizes of a model from the shapes of its tensors."""

from collections.abc import Mapping

from pipeline.errors import CheckpointError

Shape = tuple[int, ...]


class Shapes:
    """The shapes of a file's tensors by internal name. `layout` is the file's, for error texts."""

    def __init__(self, shapes: Mapping[str, Shape], layout: str):
        self.named, self.layout = shapes, layout

    def size(self, name: str, rank: int, axis: int) -> int:
        """The size of one axis of a tensor.

        Raises:
            CheckpointError: if the tensor is absent or empty or does not have `rank` axes.
        """
        shape = self.named.get(name)
        if shape is None or len(shape) != rank or 0 in shape:
            actual = "absent" if shape is None else shape
            raise CheckpointError(
                f"{name} is {actual} in the file, but must have {rank} axes in the {self.layout} layout, the nearest "
                "one, because it holds a size of the model; fetch the file again"
            )
        return shape[axis]

    def count(self, prefix: str) -> int:
        """Count the numbers 0, 1, 2, ... that follow the prefix in names.

        Raises:
            CheckpointError: if there is none, or one is left out.
        """
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
        """Whether any name begins with the prefix."""
        return any(name.startswith(prefix) for name in self.named)
