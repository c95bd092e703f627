"""transformers v5 front end."""

from icecache.hf.attention import register
from icecache.hf.cache import IceCache
from icecache.hf.model_stats import ModelStats
from icecache.hf.switch import disable, enable, stats

register()

__all__ = ["IceCache", "ModelStats", "disable", "enable", "stats"]
