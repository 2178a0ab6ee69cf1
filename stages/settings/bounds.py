"""The types of single settings with their bounds, and what every section of settings has in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST = 2**40  # no count in here is sensible above this; beyond it sizes overflow far from their cause

Count = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Share = Annotated[float, Field(ge=0, le=1)]  # a part of a whole, none and all included
Keep = Annotated[float, Field(gt=0, le=1)]  # a part kept: something always stays
HeldOut = Annotated[float, Field(gt=0, le=0.5)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
RotaryWidth = Annotated[int, Field(ge=2, le=MOST)]
RotaryBase = Annotated[float, Field(gt=1, le=1e12)]
Momentum = Annotated[float, Field(ge=0, le=0.9999)]
Word = Annotated[str, Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")]
Blank = Annotated[str, Field(pattern=r"^[^\x00]+$")]  # as a separator may be
NotStrict = Field(strict=False)  # a list of YAML is a tuple here
Some = Field(strict=False, min_length=1)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
