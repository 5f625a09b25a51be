"""The vanilla baseline of `dual_tower_cauldron`: same data, encoder and language model, with one decoder."""

from dataclasses import replace

from configs.config_dual_tower_cauldron import CONFIG as DUAL

CONFIG = replace(
    DUAL,
    model=replace(DUAL.model, left_context="none"),
    # One stream as long as the dual tower's two, and its number of tiles.
    data=replace(DUAL.data, left_length=0, right_length=4096, max_tiles=40),
)
