"""transformers v5 front end."""

from icecache.hf.attention import register
from icecache.hf.cache import IceCache
from icecache.hf.enable import disable, enable, stats
from icecache.hf.stats import ModelStats

register()

__all__ = ["IceCache", "ModelStats", "disable", "enable", "stats"]
