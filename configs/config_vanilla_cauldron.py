"""The vanilla baseline of `dual_tower_cauldron`: the same data, encoder and language model, everything through one decoder."""

from dataclasses import replace

from configs.config_dual_tower_cauldron import CONFIG as DUAL

CONFIG = replace(
    DUAL,
    model=replace(DUAL.model, left_context="none"),
    data=replace(
        DUAL.data, left_length=0, right_length=4096, max_tiles=40
    ),  # both of the dual tower's budgets in one stream; its number of tiles
)
