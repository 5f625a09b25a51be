"""The vanilla baseline of `dual_tower_easyvqa`: same data, encoder and decoder size, with one decoder."""

from dataclasses import replace

from configs.config_dual_tower_easyvqa import CONFIG as DUAL

CONFIG = replace(
    DUAL,
    model=replace(DUAL.model, left_context="none", left_attention="causal"),
    # Each question has its own image: some 17 + 14 tokens, three or four questions per row.
    data=replace(DUAL.data, left_length=1, right_length=128),
)
