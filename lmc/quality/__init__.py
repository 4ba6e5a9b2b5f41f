"""What blending costs in quality: measured once, asked at every request."""

from lmc.blend import STRATEGIES

# What a config may name: strategies, and what stands for one by what was measured.
BLENDS = STRATEGIES.with_entries(
    {
        "auto": "lmc.quality.auto:Auto",
        "controlled": "lmc.quality.controlled:Controlled",
    }
)
