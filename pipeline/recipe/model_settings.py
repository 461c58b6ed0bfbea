"""The recipe's `model` section: one class for each family, selected by `name`."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.recipe.settings_base import MOST_CHANNELS, Settings, added, operational

Blocks = Annotated[int, Field(ge=0, le=1000)]
Channels = Annotated[int, Field(ge=1, le=MOST_CHANNELS)]
Edge = Annotated[int, Field(ge=1, le=1023)]
"""Of a kernel, in sites."""


class ModelSettings(Settings):
    """The fields that all families have. Fields have the names of `pipeline.models.create_model`'s options."""

    name: str
    """A published size, or the family together with depths and dims."""
    depths: tuple[Blocks, ...] | None = None
    """Blocks of each stage; None is the named size's."""
    dims: tuple[Channels, ...] | None = None
    """Channels of each stage."""
    in_channels: int = added(3, ge=0, le=MOST_CHANNELS)
    """Channels of the input: 3; or 1, for which images become grey on the device."""
    stem_stride: int = Field(4, ge=1, le=1024)
    """Edge of a stem patch in pixels."""
    checkpointing: bool = operational(False)
    """Recompute the activations inside a block in the backward pass: less memory, a third more work."""

    @property
    def family(self) -> str:
        return self.name.partition("_")[0]

    @property
    def stride(self) -> int:
        """Edge in pixels of one site of the last stage, which is a cell of FCMAE's masks."""
        return self.stem_stride * 2 ** (self.stages - 1)

    @property
    def stages(self) -> int:
        """The number of stages; all published sizes have four."""
        return 4 if self.depths is None else len(self.depths)

    @property
    def counts_batches(self) -> bool:
        """Whether the model has a BatchNorm, whose batch is a slot."""
        return True

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `create_model` other than the name."""
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "name"}
        return {name: value for name, value in fields.items() if name not in ("depths", "dims") or value is not None}

    @property
    def weights_facts(self) -> dict[str, Any]:
        """The model's entry in the facts of a weights file."""
        absent = {
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) in (field.json_schema_extra or {}).get("same_as_absent", ())
        }
        return self.model_dump(mode="json", exclude={"checkpointing", *absent})

    @field_validator("in_channels")
    @classmethod
    def _check_channels(cls, count: int) -> int:
        if count not in (1, 3):
            raise ValueError(f"{count} is not supported: images are stored in colour; set it to 3, or to 1 for grey")
        return count

    @model_validator(mode="after")
    def _check_size(self) -> "ModelSettings":
        if (self.depths is None) != (self.dims is None) or len(self.depths or ()) != len(self.dims or ()):
            raise ValueError(
                f"depths {self.depths} and dims {self.dims} must be given together, one number for each stage"
            )
        # Without any key this is the default of a recipe without a model section, which is refused when it is used.
        if self.model_fields_set and (self.name == self.family) != (self.depths is not None):
            raise ValueError(
                f"name {self.name} and depths {self.depths} do not go together; {self.family} needs depths and dims,"
                " the published sizes have their own"
            )
        return self


class ConvNeXtSettings(ModelSettings):
    name: Literal[
        "convnextv2", "convnextv2_atto", "convnextv2_femto", "convnextv2_pico", "convnextv2_nano", "convnextv2_tiny",
        "convnextv2_base", "convnextv2_large", "convnextv2_huge",
    ] = "convnextv2"  # fmt: skip
    response: Literal["grn", "none", "lrn", "bn", "ln", "se", "cbam"] = "grn"
    """The normalisation of a block's 4C channels. ConvNeXt V1 is none, with a layer_scale of 1e-6."""
    grn_aggregation: Literal["l2", "l1", "average"] = "l2"
    """GRN: how the sites of a channel are reduced to one number."""
    grn_normaliser: Literal["mean", "sum", "inverse", "standardise"] = "mean"
    """GRN: a channel's number divided by the mean or the sum of all channels, one over the mean, or standardised."""
    grn_residual: bool = True
    """GRN: whether its input is added."""
    layer_scale: float | None = Field(None, gt=0, le=1e6)
    """Initial value of a factor on each block's branch, as in ConvNeXt V1; null means no factor."""
    init: Literal["plain", "official"] = "plain"
    """Initial weights: plain is normal with deviation 0.02; official is that of the official pre-training, which starts
    FCMAE at a loss of 16 and overflows half precision. In a classifier both are the same."""

    @property
    def counts_batches(self) -> bool:
        return self.response == "bn"

    @model_validator(mode="after")
    def _check_grn_fields(self) -> "ConvNeXtSettings":
        for name in ("grn_aggregation", "grn_normaliser", "grn_residual"):
            value = getattr(self, name)
            if self.response != "grn" and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {value} but response is {self.response}; remove it, or make response grn")
        return self


class SLaKSettings(ModelSettings):
    """SLaK: ConvNeXt V1 with large kernels, in SLaK's or RepLKNet's form, or plain."""

    name: Literal["slak", "slak_tiny", "slak_small", "slak_base"]
    width: float = Field(1.3, gt=0, le=1000)
    """Factor on the dims."""
    kernel_sizes: tuple[Edge, ...] = (51, 49, 47, 13)
    """Long edge of the kernels of each stage, odd."""
    small_kernel: int | None = Field(5, ge=1, le=1023)
    """Short edge of the stripes and edge of the small kernel beside them; null, with form square, means none."""
    form: Literal["decomposed", "square"] = "decomposed"
    """decomposed: two stripes, as in SLaK; square: one square, as in RepLKNet, or plain without a small kernel."""
    order: Literal["parallel", "sequential"] = "parallel"
    """parallel: both stripes see the same input, as published; sequential: the second sees the first one's output."""
    layer_scale: float = Field(1e-6, gt=0, le=1e6)
    """Initial value of the factor on each block's branch."""


class NextViTSettings(ModelSettings):
    """Next-ViT: convolution blocks (NCB) with a transformer block (NTB) at the end of each group."""

    name: Literal["nextvit", "nextvit_small", "nextvit_base", "nextvit_large"]
    stem_stride: Literal[1, 2, 4] = 4
    stem_dim: int = Field(64, ge=2, le=MOST_CHANNELS)
    """Channels of the stem."""
    pattern: str = Field("CHHH", pattern="^[CHT]+$")
    """A letter for each stage: C convolution blocks, H hybrid, T transformer blocks. CHHH is the released model, HHHH
    the one that the paper's text describes."""
    convolutions_per_transformer: Blocks | tuple[Blocks, ...] = 4
    """N of the paper's (NCB x N + NTB) x L, for all hybrid stages or one for each stage; L follows from the depths."""
    shrink: float = Field(0.75, gt=0, le=1)
    """Share r of a transformer block's channels that passes through self-attention."""
    norm: Literal["batch", "layer"] = "batch"
    activation: Literal["relu", "gelu"] = "relu"
    pooling: Literal["1d", "2d"] = "1d"
    """How keys and values are averaged: 1d along rows, as the released weights need it, or 2d over squares."""
    head_dim: int = Field(32, ge=1, le=MOST_CHANNELS)
    """Channels of an attention head and of a group of the 3x3 convolutions."""
    block: Literal["ncb", "bottleneck", "convnext", "local_attention", "pooling"] = added("ncb")
    """The convolution block: ncb as published, or that of ResNet, ConvNeXt, Twins or PoolFormer in its place, with its
    own norm and activation."""

    @property
    def counts_batches(self) -> bool:
        return self.norm == "batch" or self.block == "bottleneck"
