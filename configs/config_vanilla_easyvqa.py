"""The vanilla baseline of `dual_tower_easyvqa`: the same data, encoder and decoder size, everything through one decoder."""

from dataclasses import replace

from configs.config_dual_tower_easyvqa import CONFIG as DUAL

CONFIG = replace(
    DUAL,
    model=replace(DUAL.model, left_context="none", left_attention="causal"),
    # A question now carries its image: some 17 + 14 tokens each, three or four in a row.
    data=replace(DUAL.data, left_length=1, right_length=128),
)
